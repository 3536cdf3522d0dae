"""Gradients that are a linear map of smaller ones, where all examples share the map: the kinds `Mapped` and `Common`.

Arrays shared by all examples have no example axis. They are wrapped in `Same`, so that slicing of examples skips them.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxgrad.per_example.algebra.layout import Layout
from jaxgrad.per_example.algebra.maps import Map

MARGIN = 4.0
"""After six steps from an unlucky start, the power method is too low by a factor near n^(1/13), 2.9 for n = 10⁶."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=("value",), meta_fields=())
@dataclass(frozen=True)
class Same:
    """An array, or a tuple of arrays, shared by all examples.

    Attributes:
        value: the array or arrays, without an example axis.

    Example:
        >>> loss = lambda W, x: jnp.tanh(W @ x).sum() + 0.1 * (W**2).sum()
        >>> g = jg.per_example_grad(loss)(jnp.ones((30, 20)), jnp.ones((4, 20)))
        >>> g.factors[1].array.value.shape, g[:2].factors[1].array.value.shape
        ((30, 20), (30, 20))
    """

    value: Any


@functools.partial(jax.tree_util.register_dataclass, data_fields=("number", "array"), meta_fields=("layout",))
@dataclass(frozen=True)
class Common:
    """number_b times one array: the gradient of a penalty on the parameters.

    Attributes:
        number: [B], floating.
        array: a `Same` with the parameter's shape.
        layout: the parameter's shape and dtype.

    Example:
        >>> loss = lambda W, x: jnp.tanh(W @ x).sum() + 0.1 * (W**2).sum()
        >>> g = jg.per_example_grad(loss)(jnp.ones((30, 20)), jnp.ones((4, 20)))
        >>> [f.kind for f in g.factors]
        ['Outer', 'Common']
    """

    number: Any
    array: Same
    layout: Layout
    kind: ClassVar[str] = "Common"


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("inputs", "shared"), meta_fields=("map", "shapes", "layout")
)
@dataclass(frozen=True)
class Mapped:
    """A linear map, shared by all examples, of other gradients: those of a weight in the form that the loss uses.

    Attributes:
        inputs: for each input of the map, a tuple of factors that add up to it.
        shared: a `Same` with the arrays that the map depends on.
        map: the map.
        shapes: (shape, dtype) of each input.
        layout: the parameter's shape and dtype.

    Example:
        >>> loss = lambda W, x: jnp.tanh(jnp.exp(W) @ x).sum()
        >>> g = jg.per_example_grad(loss)(jnp.ones((30, 20)), jnp.ones((4, 20)))
        >>> f = g.factors[0]
        >>> f.kind, f.inputs[0][0].kind
        ('Mapped', 'Outer')
    """

    inputs: tuple[tuple[Any, ...], ...]
    shared: Same
    map: Map
    shapes: tuple[tuple[tuple[int, ...], jnp.dtype], ...]
    layout: Layout
    kind: ClassVar[str] = "Mapped"

    def avals(self, dtype: Any) -> list[jax.ShapeDtypeStruct]:
        """Shape of one example of each input, in `dtype`."""
        return [jax.ShapeDtypeStruct(shape, dtype) for shape, _ in self.shapes]

    def apply(self, inputs: Sequence[Array]) -> Array:
        """Apply the map to one array for each input."""
        return self.map(inputs, self.shared.value)

    def back(self, cotangent: Array) -> Any:
        """Apply the map's transpose to an array of the parameter's shape."""
        return self.map.transposed(self.avals(cotangent.dtype), self.shared.value, cotangent)

    def norm(self, dtype: Any) -> Array:
        """Upper bound on the map's operator norm; for some maps an estimate.

        For an elementwise map it is a true bound. For other maps it is `MARGIN` times the result of six steps of the
        power method from a random start; the probability that this is below the norm is negligible but not zero.
        """
        if self.map.entrywise() == () and [shape for shape, _ in self.shapes] == [self.layout.shape]:
            return jnp.abs(self.apply([jnp.ones(self.shapes[0][0], dtype)])).max(initial=0)
        return MARGIN * self.map.norm(self.avals(dtype), self.shared.value)


def is_same(node: Any) -> bool:
    """Test for `Same`, for JAX's `is_leaf`."""
    return isinstance(node, Same)


def map_examples_of(function: Callable[..., Any], *trees: Any) -> Any:
    """`jax.tree.map` over arrays with an example axis; arrays shared by all examples are taken from the first tree."""
    return jax.tree.map(lambda *a: a[0] if is_same(a[0]) else function(*a), *trees, is_leaf=is_same)


def of_examples(tree: Any) -> list[Any]:
    """The arrays with an example axis."""
    return [a for a in jax.tree.leaves(tree, is_leaf=is_same) if not is_same(a)]


def without_shared(tree: Any) -> tuple[Any, list[Any]]:
    """(the tree without the arrays shared by all examples, these arrays)."""
    treedef: Any
    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_same)
    shared = [a.value for a in leaves if is_same(a)]
    return treedef.unflatten([Same(()) if is_same(a) else a for a in leaves]), shared


def with_shared(tree: Any, shared: Sequence[Any]) -> Any:
    """The inverse of `without_shared`."""
    treedef: Any
    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_same)
    rest = iter(shared)
    return treedef.unflatten([Same(next(rest)) if is_same(a) else a for a in leaves])
