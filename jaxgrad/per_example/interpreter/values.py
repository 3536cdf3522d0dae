"""What a variable of a gradient program may stand for while `walk` evaluates it: an array, or one of these."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jaxgrad.per_example.algebra.maps import Call, Input, Map, Node, Result, inputs_of
from jaxgrad.per_example.algebra.place import Axis
from jaxgrad.per_example.algebra.product import Product, form, unfolded
from jaxgrad.per_example.interpreter import views
from jaxgrad.per_example.interpreter.cost_model import worth_holding
from jaxgrad.per_example.interpreter.products import product, times_one
from jaxgrad.per_example.interpreter.reasons import ADDED, Reason


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("terms",),
    meta_fields=("shape", "dtype"),
    drop_fields=("maps", "as_written", "measure"),
)
@dataclass(frozen=True)
class Unevaluated:
    """A sum of unevaluated products; zero if there are none.

    Attributes:
        terms: the products, each of this shape.
        shape, dtype: those of the variable.
        maps: further summands: linear maps, shared by all examples, of products or small arrays. They are applied
            before a value leaves a loop or a branch.
        as_written: a function that evaluates the sum as the program computes it, equation by equation; None if that is
            not available.
        measure: its norm, if a loop has taken it (`measuring`).
    """

    terms: tuple[Product, ...]
    shape: tuple[int, ...]
    dtype: jnp.dtype
    maps: tuple[Node, ...] = ()
    as_written: Any = field(default=None, compare=False)
    measure: Any = field(default=None, compare=False)

    @property
    def inputs(self) -> list[Any]:
        """The inputs of the maps."""
        return [x.value for x in inputs_of(self.maps)]

    @property
    def held(self) -> int:
        """The number of entries in the operands."""
        behind = sum(x.held if isinstance(x, Unevaluated) else x.size for x in self.inputs)
        return sum(term.held for term in self.terms) + behind

    @property
    def size(self) -> int:
        """The number of entries in the sum."""
        return math.prod(self.shape)

    @property
    def has_windows(self) -> bool:
        """Whether there is a convolution among them; whether to materialize it is decided at the end."""
        return any(term.windows for term in self.terms) or any(
            isinstance(x, Unevaluated) and x.has_windows for x in self.inputs
        )

    @property
    def reason(self) -> Reason | None:
        """Why part of it was materialized; None if nothing was."""
        return next((term.reason for term in self.terms if term.reason is not None), None)


@dataclass(frozen=True)
class Broadcast:
    """An unevaluated lax.broadcast_in_dim(source, shape, dims): a product needs no operand along a repeated axis.

    Attributes:
        source: the array that is repeated.
        dims: for each axis of source, the axis of the result that it becomes.
        shape: the result's shape.
        zero: whether the program states that it is zero.
        shared: whether it is the same for all examples.
    """

    source: Any
    dims: tuple[int, ...]
    shape: tuple[int, ...]
    zero: bool = False
    shared: bool = False

    @property
    def varies(self) -> tuple[int, ...]:
        """The axes of the result along which source is not repeated."""
        return tuple(d for d, n in zip(self.dims, self.source.shape, strict=True) if n != 1)

    @property
    def compact(self) -> Any:
        """The source, with only the axes in `varies`."""
        return self.source.reshape([n for n in self.source.shape if n != 1])


@dataclass(frozen=True)
class Plain:
    """An array that leads to a gradient and is not a product, and the reason."""

    array: Array
    reason: Reason
    measure: Any = None


@dataclass(frozen=True)
class Shared:
    """An array shared by all examples: it was computed from the parameters and from shared arguments."""

    array: Any


Value = Any  # an Array, Unevaluated, Broadcast or Plain


def array_of(value: Value) -> Any:
    """Materialize the value; a literal number is returned as it is."""
    match value:
        case Unevaluated(as_written=function) if function is not None:
            return function()
        case Unevaluated(terms, shape, dtype, maps):
            parts = [form(term, dtype) for term in terms]
            if maps:
                behind, inputs, shared = Map.of(maps)
                parts.append(behind([array_of(x.value) for x in inputs], shared).astype(dtype))
            return functools.reduce(jnp.add, parts) if parts else jnp.zeros(shape, dtype)
        case Broadcast(source, dims, shape, _):
            if source.shape == shape:
                return source
            repeated = lax.broadcast_in_dim(source, shape, dims)
            views.note_squeezed(repeated, source)
            return repeated
        case Plain(array) | Shared(array):
            return array
    return value


def own_array(value: Value) -> Any:
    """The array of a value that is one, and not known to be the same for all examples; None for any other value."""
    if value is None or isinstance(value, Unevaluated | Broadcast) or is_shared(value):
        return None
    return array_of(value)


def without_as_written(value: Value) -> Value:
    """Drop `as_written`, also from the inputs of the maps, for use in a program that is traced by itself, such as a
    branch or a step of a loop: results evaluated there would be cached and leak into the program around it."""
    if not isinstance(value, Unevaluated):
        return value
    value = dataclasses.replace(value, as_written=None)
    if not value.maps:
        return value
    function, inputs, shared = Map.of(value.maps)
    nodes = function.nodes([Input(without_as_written(x.value)) for x in inputs], shared)
    return dataclasses.replace(value, maps=tuple(nodes))


def is_shared(value: Value) -> bool:
    """Whether the value is the same for all examples, as numbers and constants in the program are."""
    if isinstance(value, Broadcast):
        return value.zero or value.shared
    return isinstance(value, Shared | np.ndarray | np.generic)


def numbers(value: Value) -> int:
    """The number of entries of the value; repeated entries count once."""
    return int(np.size(value.source if isinstance(value, Broadcast) else array_of(value)))


def maps_materialized(value: Value) -> Value:
    """Convert a value to one that may leave a loop or a branch: products stay, values with maps are materialized."""
    return array_of(value) if isinstance(value, Unevaluated) and value.maps else value


def is_zero(value: Value) -> bool:
    """Whether the value is known from the program to be zero everywhere."""
    if isinstance(value, Broadcast):
        return value.zero
    return isinstance(value, Unevaluated) and not value.terms and not value.maps


def zero(shape: Sequence[int], dtype: Any) -> Broadcast:
    """Zeros, as a value that is known to be zero."""
    return Broadcast(jnp.zeros((), dtype), (), tuple(shape), True)


def literal(value: Any, dtype: Any) -> Value:
    """A literal of the program: a Python, NumPy or typed scalar becomes an array of the variable's dtype."""
    array = np.asarray(value, dtype)
    return Broadcast(array, (), (), True) if array.ndim == 0 and not array else array


def as_broadcast(value: Value) -> Broadcast | None:
    """The value as a Broadcast; None for an unevaluated product."""
    if isinstance(value, Broadcast):
        return value
    if isinstance(value, Unevaluated):
        return None
    array = array_of(value)
    return Broadcast(array, tuple(range(np.ndim(array))), tuple(np.shape(array)))


def spread(value: Broadcast, dtype: Any) -> Unevaluated | None:
    """A repeated array as a product with ones; None if that is not smaller than the array."""
    varying = value.varies or tuple(k for k, n in enumerate(value.shape) if n != 1)[:1]
    left = value.compact.astype(dtype) * jnp.ones([value.shape[k] for k in varying], dtype)
    ones = [k for k, n in enumerate(value.shape) if n != 1 and k not in varying]
    term = product(left, jnp.ones([value.shape[k] for k in ones], dtype), [], [])
    axes = dict(zip((*varying, *ones), term.place, strict=True))
    term = dataclasses.replace(term, place=tuple(axes.get(k, Axis(1)) for k in range(len(value.shape))))
    result = Unevaluated((term,), value.shape, jnp.dtype(dtype))
    return result if ones and worth_holding(result.held, result.size) else None


def added(value: Value, other: Value) -> Value:
    """The sum of two values; unevaluated products in it stay unevaluated."""
    if is_zero(value):
        return other
    if is_zero(other):
        return value
    first, second = (v if isinstance(v, Unevaluated) else _as_unevaluated(v) for v in (value, other))
    return Unevaluated((*first.terms, *second.terms), first.shape, first.dtype, (*first.maps, *second.maps))


def _as_unevaluated(value: Value) -> Unevaluated:
    if isinstance(value, Broadcast):
        repeated = spread(value, value.source.dtype)
        if repeated is not None:
            return repeated
    if isinstance(value, Shared):
        return times_shared(jnp.ones((), value.array.dtype), value.array)
    array = array_of(value)
    reason = value.reason if isinstance(value, Plain) else Reason("add_any", "", ADDED)
    return Unevaluated((times_one(array, reason),), tuple(array.shape), array.dtype)


def times_shared(number: Array, array: Array) -> Unevaluated:
    """A per-example number times an array shared by all examples."""
    ones = [1] * array.ndim
    call = Call(lambda arrays: [arrays[0].reshape(ones) * arrays[1]], ("times", array.ndim), (Input(number), array))
    return Unevaluated((), tuple(array.shape), array.dtype, (Result(call, 0),))


def mapped(
    value: Unevaluated, shape: Sequence[int], dtype: Any, function: Callable[[Product], Any], on_windows: bool = False
) -> Unevaluated | None:
    """Apply to every term a function that returns a term, several terms, or None if it cannot; then return None.

    Args:
        on_windows: whether the function accepts terms whose windows are not unfolded.
    """
    terms: list[Product] = []
    for term in value.terms:
        result = function(term if on_windows else unfolded(term))
        if result is None:
            return None
        terms += result if isinstance(result, tuple) else (result,)
    return Unevaluated(nonempty(terms), tuple(shape), dtype)


def nonempty(terms: Iterable[Product]) -> tuple[Product, ...]:
    """The terms that have entries; a block of size zero that is put into zeros is zero."""
    return tuple(term for term in terms if term.count(term.out) and 0 not in term.shape)
