"""Constructors of products for a batch, by the names under which `explain` prints them."""

import re
from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import Array

from jaxgrad.per_example.algebra.arrangement import arranged
from jaxgrad.per_example.algebra.place import Axis, axis_of, whole
from jaxgrad.per_example.algebra.product import Product, squeezed


class Outer:
    """Σ_t left ⊗ right: the gradient of a weight that enters through a matrix product."""

    @staticmethod
    def of_matrix(left: Array, right: Array, dtype: jax.typing.DTypeLike) -> Product:
        """Make one product per example from left [B, F] and right [B, K], for an [F, K] parameter of `dtype`.

        Example:
            >>> f = Outer.of_matrix(jnp.ones((4, 3)), jnp.ones((4, 2)), jnp.float32)
            >>> f.kind, f.left.shape, f.right.shape, f.shape
            ('Outer', (4, 3), (4, 2), (3, 2))
        """
        return Outer.of("f,k->fk", left, right, dtype)

    @staticmethod
    def of(pattern: str, left: Array, right: Array, dtype: jax.typing.DTypeLike) -> Product:
        """Make products from a pattern of the axes of left, right and the parameter, as in an einsum of one example.

        Args:
            pattern: such as "tf,tk->fk": a letter for each axis; letters in parentheses are one axis of the parameter.
            left, right: the sides of a batch: the example axis, then the axes that the pattern names.
            dtype: the parameter's dtype.

        Example:
            >>> Outer.of("gtf,gtk->k(gf)", jnp.ones((4, 2, 7, 3)), jnp.ones((4, 2, 7, 5)), jnp.float32).shape
            (5, 6)
        """
        sides, _, result = pattern.partition("->")
        names = list(dict.fromkeys(sides.replace(",", "")))
        axes, axes_ = ([names.index(x) for x in side] for side in sides.split(","))
        known = dict(zip((*axes, *axes_), (*left.shape[1:], *right.shape[1:]), strict=True))
        sizes = tuple(known[k] for k in range(len(names)))
        for a, labels in ((left, axes), (right, axes_)):
            if a.shape[1:] != tuple(sizes[x] for x in labels):
                raise ValueError(f"Outer.of: expected sides as in {pattern}, got {left.shape} and {right.shape}.")
        place = [
            axis_of([names.index(x) for x in part.strip("()")], sizes) for part in re.findall(r"\(\w+\)|\w", result)
        ]
        return _held(Product(left, right, tuple(axes), tuple(axes_), tuple(place), sizes), dtype)


class Rows:
    """Values added to rows of a table: the gradient of an embedding. Repeated ids add up."""

    @staticmethod
    def of_table(
        ids: Array, values: Array, rows: int, dtype: jax.typing.DTypeLike, transposed: bool = False
    ) -> Product:
        """Make the gradient of a [rows, K] parameter of `dtype`, or of a [K, rows] parameter if `transposed`.

        Args:
            ids: [B, T], integer; an id outside 0 ≤ id < rows (a padding id) contributes nothing.
            values: [B, T, K], floating; or [B, K] if they are the same at all positions (a mean of embeddings).
            rows: the number of rows.
            dtype: the parameter's dtype.
            transposed: whether the parameter is [K, rows].

        Example:
            >>> f = Rows.of_table(jnp.array([[0, 2], [2, 2]]), jnp.ones((2, 2, 3)), rows=5, dtype=jnp.float32)
            >>> f.kind, f.rows, f.shape
            ('Rows', 5, (5, 3))
        """
        T, K = ids.shape[1], values.shape[-1]
        place = (Axis(rows, 0, ((2, 1),)), Axis(K, 0, ((1, 1),)))
        labels = (0, 1) if values.ndim == 3 else (1,)
        p = Product(ids, values, (0,), labels, place[::-1] if transposed else place, (T, K, rows), row=2)
        return _held(p, dtype)


class Dense:
    """The materialized gradients."""

    @staticmethod
    def of(value: Array, dtype: jax.typing.DTypeLike) -> Product:
        """Make materialized gradients from value [B, *shape], for a parameter of this shape and of `dtype`.

        Example:
            >>> Dense.of(jnp.ones((4, 3)), jnp.float32).kind
            'Dense'
        """
        return jax.vmap(lambda a: arranged(dense(a, a.shape), dtype))(value)


def dense(value: Any, shape: Sequence[int]) -> Product:
    """A materialized array of this shape as a product with 1."""
    place, sizes = whole(shape)
    return Product(value.reshape(sizes), None, tuple(range(len(sizes))), (), place, sizes)


def _held(p: Product, dtype: Any) -> Product:
    """The product of a batch in the form that is held, without axes of size 1."""
    return jax.vmap(lambda p: arranged(squeezed(p), dtype))(p)
