"""Where the entries of a product's matrices [G, F, K] are in the parameter."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxgrad.per_example.algebra.place import Labels, Place, apart, labels_of, put, read, whole


@dataclass(frozen=True)
class Layout:
    """Where the entries of [G, F, K] are in the parameter; outside of them a product is zero.

    Attributes:
        place: for each axis of the parameter, where the entries are.
        sizes: the size of each label.
        order: the labels that G, F and K consist of.
        dtype: the parameter's dtype, in which sums and materialized gradients are returned.

    Example:
        >>> left, right = jnp.ones((4, 2, 3)), jnp.ones((4, 2, 5))
        >>> layout = jg.per_example.Outer.of("gf,gk->k(gf)", left, right, jnp.float32).layout
        >>> layout.shape, layout.to_matrix(jnp.zeros((4, 5, 6))).shape
        ((5, 6), (4, 2, 5, 3))
    """

    place: Place
    sizes: tuple[int, ...]
    order: tuple[Labels, Labels, Labels]
    dtype: Any

    @staticmethod
    def of_array(shape: Sequence[int], dtype: jax.typing.DTypeLike) -> "Layout":
        """The layout of a whole parameter, all of whose axes are F."""
        place, sizes = whole(shape)
        return Layout(place, sizes, ((), labels_of(place), ()), jnp.dtype(dtype))

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's shape."""
        return tuple(axis.size for axis in self.place)

    @property
    def size(self) -> int:
        """Number of entries in the parameter."""
        return math.prod(self.shape)

    @property
    def matrix(self) -> tuple[int, int, int]:
        """The sizes of G, F and K."""
        G, F, K = (math.prod(self.sizes[label] for label in labels) for labels in self.order)
        return G, F, K

    def to_matrix(self, value: Array) -> Array:
        """`[*batch, *shape]` → `[*batch, G, F, K]`."""
        batch = value.shape[: value.ndim - len(self.place)]
        return read(value, [x for labels in self.order for x in labels], self.place, self.sizes).reshape(
            *batch, *self.matrix
        )

    def from_matrix(self, value: Array) -> Array:
        """`[*batch, G, F, K]` → `[*batch, *shape]`."""
        labels = [x for part in self.order for x in part]
        value = value.reshape(*value.shape[:-3], *(self.sizes[x] for x in labels))
        return put(value, labels, self.place, self.sizes)

    def disjoint(self, other: "Layout") -> bool:
        """True if the two are known to have no entry in common."""
        return apart(self.place, self.sizes, other.place, other.sizes)

    def same_place(self, other: "Layout") -> bool:
        """True if each entry of [G, F, K] is at the same place in the parameter."""
        return self.where == other.where

    def turned(self) -> "Layout":
        """The layout with F and K exchanged."""
        G, F, K = self.order
        return dataclasses.replace(self, order=(G, K, F))

    @functools.cached_property
    def where(self) -> Any:
        """What does not depend on the labels' numbers."""
        labels = labels_of(self.place)
        axes = [(axis.size, axis.start, [(self.sizes[x], stride) for x, stride in axis.steps]) for axis in self.place]
        return axes, [[labels.index(x) for x in part] for part in self.order]
