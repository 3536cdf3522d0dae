"""Make unevaluated products, for one example, from arrays. `moves` and `linear` then rearrange and scale them."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from jaxgrad.per_example.algebra.place import Axis, axis_of, whole
from jaxgrad.per_example.algebra.product import Product, squeezed
from jaxgrad.per_example.interpreter.reasons import Reason
from jaxgrad.per_example.interpreter.views import note_squeezed


def times_one(array: Array, reason: Reason | None) -> Product:
    """An array as a product with 1."""
    place, sizes = whole(array.shape)
    return Product(
        array.reshape(sizes), jnp.ones((), array.dtype), tuple(range(len(sizes))), (), place, sizes, reason=reason
    )


def product(
    left: Array,
    right: Array,
    contracted: Sequence[tuple[int, int]],
    batch: Sequence[tuple[int, int]],
    precision: Any = None,
) -> Product:
    """dot_general of two arrays; `contracted` and `batch` are pairs (axis of left, axis of right)."""
    left_labels = tuple(range(left.ndim))
    shared = {r: k for k, r in (*contracted, *batch)}
    right_labels = tuple(shared.get(k, left.ndim + k) for k in range(right.ndim))
    joint = {k for k, _ in (*contracted, *batch)}
    free = [k for k in (*left_labels, *right_labels) if k not in joint]
    out = [*(k for k, _ in batch), *free]
    sizes = (*left.shape, *right.shape)
    place = tuple(axis_of([k], sizes) for k in out)
    found = squeezed(Product(left, right, left_labels, right_labels, place, sizes, precision=precision))
    for after, before in ((found.left, left), (found.right, right)):
        note_squeezed(after, before)
    return found


def lookup(ids: Array, values: Array, positions: Sequence[int], dims: Sequence[int | None], rows: int) -> Product:
    """`values`, added to rows of a table of zeros.

    Args:
        ids: integers, with an axis for each axis of positions; one out of range adds nothing.
        positions: the axes of values that are positions, in the order of ids' axes; values may have size 1 there.
        dims: for each axis of the table, the corresponding axis of values; None for the rows.
        rows: the number of rows of the table.
    """
    row = values.ndim
    sizes = [*values.shape, rows]
    labels = tuple(k for k, n in enumerate(values.shape) if k not in positions or n == ids.shape[positions.index(k)])
    for k, n in zip(positions, ids.shape, strict=True):
        sizes[k] = n
    place = tuple(Axis(sizes[k], 0, ((k, 1),)) for k in (row if k is None else k for k in dims))
    values = values.reshape([sizes[k] for k in labels])
    return squeezed(Product(ids, values, tuple(positions), labels, place, tuple(sizes), row=row))
