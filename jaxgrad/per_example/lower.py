"""Decide which products of a gradient are held, and materialize those that are smaller as arrays.

The cost model uses shapes alone: a parameter's gradient is held as factors if they hold fewer numbers than it does,
Σ T·(F + K) < F·K for one example, and is materialized otherwise. So no factors are larger than the gradient they hold.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from jaxgrad.per_example.algebra.arrangement import arranged, fewer
from jaxgrad.per_example.algebra.constructors import Dense, dense
from jaxgrad.per_example.algebra.factors import Factor, written_out
from jaxgrad.per_example.algebra.layout import Layout
from jaxgrad.per_example.algebra.mapped import Common, Mapped, Same
from jaxgrad.per_example.algebra.maps import Map, Node, inputs_of
from jaxgrad.per_example.algebra.place import Axis
from jaxgrad.per_example.algebra.product import Product
from jaxgrad.per_example.interpreter.cost_model import worth_holding
from jaxgrad.per_example.interpreter.reasons import FORMED, Reason
from jaxgrad.per_example.interpreter.values import (
    Broadcast,
    Plain,
    Shared,
    Unevaluated,
    Value,
    array_of,
    is_zero,
    spread,
    times_shared,
)
from jaxgrad.precision import added
from jaxgrad.sharding import with_automatic_axes


class Lowered(NamedTuple):
    """One parameter's gradient, for one example.

    Attributes:
        factors: the factors, without the example axis.
        how: "factored", "formed" (a product, materialized because the array is smaller), "vector" (at most one axis),
            "unused" or "direct" (computed as vmap(jax.grad) would).
        reason: why the route is direct, or why part of the product was materialized.
    """

    factors: tuple[Factor, ...]
    how: str
    reason: Reason | None


def lower(value: Value, shape: tuple[int, ...], dtype: Any) -> Lowered:
    """The factors of a gradient, and the reason for that choice."""
    size, matrix = math.prod(shape), sum(n != 1 for n in shape) > 1
    if is_zero(value):
        return Lowered((_nothing(shape, dtype),), "unused", None)
    if isinstance(value, Broadcast):
        value = spread(value, dtype) or value
    if isinstance(value, Shared) and matrix:
        value = times_shared(jnp.ones((), value.array.dtype), value.array)
    if isinstance(value, Unevaluated) and worth_holding(value.held, size) and (matrix or not value.maps):
        factors = _factors(value.terms, dtype) + _behind_maps(value.maps, shape, dtype)
        direct = matrix and value.reason not in (None, FORMED)
        return Lowered(factors, "direct" if direct else "factored", value.reason if direct else None)
    if (
        isinstance(value, Unevaluated) and value.has_windows
    ):  # `convolutions_materialized` materializes it, several examples at a time
        others = [term for term in value.terms if not term.windows]
        factors = tuple(arranged(term, dtype) for term in value.terms if term.windows)
        factors += _behind_maps(value.maps, shape, dtype)
        factors += (_dense(array_of(Unevaluated(tuple(others), shape, dtype)), shape, dtype),) if others else ()
        return Lowered(factors, "formed" if value.reason in (None, FORMED) else "direct", value.reason)
    reason = value.reason if isinstance(value, Plain | Unevaluated) else None
    how = "vector" if not matrix else "formed" if reason in (None, FORMED) else "direct"
    return Lowered((_dense(array_of(value), shape, dtype),), how, reason if how == "direct" else None)


def factors_of(value: Value, shape: tuple[int, ...], dtype: Any) -> tuple[Factor, ...]:
    """The factors of a gradient, even if they are larger than the gradient: for results that need them only once."""
    matrix = sum(n != 1 for n in shape) > 1
    if isinstance(value, Unevaluated) and not is_zero(value) and (matrix or not value.maps):
        return _factors(value.terms, dtype) + _behind_maps(value.maps, shape, dtype)
    return lower(value, shape, dtype).factors


def convolutions_materialized(factors: tuple[Factor, ...], lowered: Lowered) -> tuple[Factor, ...]:
    """The factors of a batch; convolutions that are smaller as arrays are materialized, a few examples at a time."""
    if has_its_final_form(factors, lowered):
        return factors
    return (Dense.of(_total(factors), factors[0].layout.dtype),)


@with_automatic_axes(by_example=True)
def _total(factors: tuple[Factor, ...]) -> Array:
    return added([written_out(f) for f in factors])


def has_its_final_form(factors: tuple[Factor, ...], lowered: Lowered) -> bool:
    """Whether there is nothing left to materialize."""
    return lowered.how == "factored" or not any(_has_windows(f) for f in factors)


def _has_windows(f: Factor) -> bool:
    if isinstance(f, Mapped):
        return any(_has_windows(part) for factors in f.inputs for part in factors)
    return isinstance(f, Product) and bool(f.windows)


def _factors(terms: Sequence[Product], dtype: Any) -> tuple[Factor, ...]:
    return fewer([arranged(term, dtype) for term in terms])


def _behind_maps(nodes: Sequence[Node], shape: tuple[int, ...], dtype: Any) -> tuple[Factor, ...]:
    """One `Common` factor for each scalar input of the maps, and one `Mapped` factor for all their larger inputs."""
    numbers: dict[int, list[Node]] = {}
    larger: list[Node] = []
    for node in nodes:
        inputs = inputs_of([node])
        if len(inputs) == 1 and not isinstance(inputs[0].value, Unevaluated) and inputs[0].value.size == 1:
            numbers.setdefault(id(inputs[0].value), []).append(node)
        else:
            larger.append(node)
    layout = Layout.of_array(shape, dtype)
    factors: list[Factor] = []
    for same in numbers.values():
        function, (number,), shared = Map.of(same)
        for part, one in _real_parts(number.value):
            factors.append(Common(part.reshape(()), Same(function([one], shared)), layout))
    if larger:
        function, inputs, shared = Map.of(larger)
        shapes = tuple((tuple(x.value.shape), jnp.dtype(x.value.dtype)) for x in inputs)
        parts = tuple(
            _factors(x.value.terms, like[1]) if isinstance(x.value, Unevaluated) else (_dense(x.value, *like),)
            for x, like in zip(inputs, shapes, strict=True)
        )
        factors.append(Mapped(parts, Same(tuple(jnp.asarray(a) for a in shared)), function, shapes, layout))
    return tuple(factors)


def _real_parts(number: Any) -> list[tuple[Any, Any]]:
    """[(a, one)] with number = Σ a · one: a map from complex to real numbers is linear only over the real numbers."""
    one = jnp.ones_like(number)
    return [(number.real, one), (number.imag, 1j * one)] if jnp.iscomplexobj(number) else [(number, one)]


def _dense(array: Any, shape: tuple[int, ...], dtype: Any) -> Product:
    return arranged(dense(jnp.asarray(array), shape), dtype)


def _nothing(shape: tuple[int, ...], dtype: Any) -> Factor:
    """An empty product (T = 0): a parameter that the loss does not use holds nothing."""
    side = jnp.zeros(0, dtype)
    return Product(side, side, (0,), (0,), tuple(Axis(n) for n in shape), (0,), jnp.dtype(dtype))
