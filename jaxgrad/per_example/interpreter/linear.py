"""Scale, mask or sum an unevaluated product, multiply it by a matrix, or put it at an index that is data.

A function here returns None if its result is not an unevaluated product.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxgrad.per_example.algebra.place import Axis, labels_of, put, read, whole
from jaxgrad.per_example.algebra.product import Product, einsum, squeezed
from jaxgrad.precision import working_dtype


def on_smaller(p: Product, function: Callable[[Any], Any]) -> Product:
    """Apply a linear elementwise function to the smaller side."""
    if p.row is None and p.left.size < p.right.size:
        return dataclasses.replace(p, left=function(p.left))
    return dataclasses.replace(p, right=function(p.right))


def aligned(p: Product, value: Array, dims: Sequence[int]) -> tuple[str, Array] | None:
    """Align `value`, which has one axis for each axis of the result in `dims`, with the axes of one side.

    Returns:
        ("left" or "right", the value with an axis of full size or size 1 for each axis of that side); None if it varies
        along axes of both sides.
    """
    place = [p.place[k] for k in dims]
    labels = labels_of(place)
    side = "right" if set(labels) <= set(p.right_labels) else "left"
    of: tuple[int, ...] = getattr(p, f"{side}_labels")
    if not set(labels) <= set(of) or (p.row is not None and side == "left"):
        return None
    value = read(value, [x for x in of if x in labels], place, p.sizes)
    return side, value.reshape([p.sizes[x] if x in labels else 1 for x in of])


def sums(p: Product, dims: Sequence[int]) -> Product | None:
    """Sum the product over axes of the result."""
    summed = set(labels_of([p.place[k] for k in dims]))
    if p.row in summed:
        return None
    changes: dict[str, Any] = {}
    for name, other in (("left", p.right_labels), ("right", p.left_labels)):
        a, labels = getattr(p, name), getattr(p, f"{name}_labels")
        alone = [x for x in labels if x in summed and x not in other]
        if alone:
            changes[name] = a.sum([labels.index(x) for x in alone], dtype=working_dtype(a.dtype))
            changes[f"{name}_labels"] = tuple(x for x in labels if x not in alone)
    place = tuple(axis for k, axis in enumerate(p.place) if k not in dims)
    return dataclasses.replace(p, place=place, **changes)


def contract(
    p: Product,
    C: Array,
    contracted: Sequence[tuple[int, int]],
    batch: Sequence[tuple[int, int]],
    product_first: bool,
    precision: object,
) -> Product | None:
    """dot_general of the product with an array C, applied to one side: (δ aᵀ) C = δ (Cᵀ a)ᵀ.

    Args:
        contracted, batch: (axis of the product, axis of C).
        product_first: whether the product is dot_general's first operand.
    """
    place_of = {axis: p.place[k] for k, axis in (*contracted, *batch)}
    summed, kept = labels_of([p.place[k] for k, _ in contracted]), labels_of([p.place[k] for k, _ in batch])
    sides = [side for side in ("left", "right") if {*summed, *kept} <= set(getattr(p, f"{side}_labels"))]
    sides = [side for side in sides if p.row is None or side == "right"]
    if not sides or p.row in (*summed, *kept):
        return None
    side = min(sides, key=lambda side: getattr(p, side).size)
    of, operand = getattr(p, f"{side}_labels"), getattr(p, side)
    other = p.right_labels if side == "left" else p.left_labels
    # C is read at the product's entries, with an axis for each label.
    free = [axis for axis in range(C.ndim) if axis not in place_of]
    new, sizes = whole([C.shape[axis] for axis in free], len(p.sizes))
    sizes = (*p.sizes, *sizes)
    place = [place_of[axis] if axis in place_of else new[free.index(axis)] for axis in range(C.ndim)]
    C_labels = labels_of(place)
    C = read(C, C_labels, place, sizes)
    out = (*(x for x in of if x not in summed or x in other), *labels_of(new))
    work = working_dtype(operand.dtype, C.dtype)
    dtype = operand.dtype if operand.dtype == C.dtype else work
    value = einsum(operand, of, C, C_labels, out, work, precision).astype(dtype)
    used = {k for k, _ in (*contracted, *batch)}
    both, own_axes = [p.place[k] for k, _ in batch], [axis for k, axis in enumerate(p.place) if k not in used]
    changes: dict[str, Any] = {side: value, f"{side}_labels": out}
    order = (*both, *own_axes, *new) if product_first else (*both, *new, *own_axes)
    return dataclasses.replace(p, place=order, sizes=sizes, **changes)


def embedded(p: Product, dim: int, start: Array, full: int, mode: str) -> Product | None:
    """Put the product into zeros along one axis, at an index known only at run time.

    Args:
        mode: "clip" or "drop", for an index out of range.
    """
    axis = p.place[dim]
    if p.row is not None or not axis.is_whole(p.sizes):
        return None
    if mode == "clip":  # a negative start does not count from the end
        start = jnp.clip(start, 0, full - axis.size)
    if axis.size == 1:  # multiply the smaller side by a one-hot vector
        hot = jnp.arange(full, dtype=start.dtype) == start
        label, side = len(p.sizes), "left" if p.left.size <= p.right.size else "right"
        a, labels = getattr(p, side), getattr(p, f"{side}_labels")
        a = jnp.where(hot.reshape(full, *[1] * a.ndim), a[None], jnp.zeros_like(a)[None])
        changes: dict[str, Any] = {side: a, f"{side}_labels": (label, *labels), "sizes": (*p.sizes, full)}
    else:
        sides = [side for side in ("left", "right") if set(axis.labels) <= set(getattr(p, f"{side}_labels"))]
        if len(axis.labels) != 1 or len(sides) != 1 or mode != "clip":
            return None
        (label,), (side,) = axis.labels, sides
        a, at = getattr(p, side), getattr(p, f"{side}_labels").index(label)
        zeros = jnp.zeros((*a.shape[:at], full, *a.shape[at + 1 :]), a.dtype)
        sizes = tuple(full if x == label else n for x, n in enumerate(p.sizes))
        changes = {side: lax.dynamic_update_slice_in_dim(zeros, a, start, at), "sizes": sizes}
    axis = Axis(full, 0, ((label, 1),))
    return squeezed(dataclasses.replace(p, place=(*p.place[:dim], axis, *p.place[dim + 1 :]), **changes))


def contracted_with(p: Product, C: Array, dims: Sequence[int]) -> Array:
    """Σ over axes of the result of (product ⊙ C)."""
    work = working_dtype(p.left.dtype, p.right.dtype, C.dtype)
    kept = [axis for k, axis in enumerate(p.place) if k not in dims]
    arrays = [a.astype(work) for a in (p.left, p.right, read(C, p.out, p.place, p.sizes))]
    labels = [list(x) for x in (p.left_labels, p.right_labels, p.out)]
    operands = [x for pair in zip(arrays, labels, strict=True) for x in pair]
    value = jnp.einsum(*operands, labels_of(kept), optimize="optimal", precision=p.precision)
    return put(value, labels_of(kept), kept, p.sizes)


def real(p: Product) -> tuple[Product, ...]:
    """The real part of a product of complex operands: Re·Re - Im·Im."""
    (a, b), (c, d) = _parts(p)
    return _products(p, (a, c), (_minus(b), d))


def imag(p: Product) -> tuple[Product, ...]:
    """The imaginary part: Re·Im + Im·Re."""
    (a, b), (c, d) = _parts(p)
    return _products(p, (a, d), (b, c))


def _products(p: Product, *sides: tuple[Array | None, Array | None]) -> tuple[Product, ...]:
    return tuple(dataclasses.replace(p, left=x, right=y) for x, y in sides if x is not None and y is not None)


def _parts(p: Product) -> list[tuple[Array, Array | None]]:
    """(real part, imaginary part) of both operands; the imaginary part of a real operand is None."""
    complex_ = [jnp.issubdtype(a.dtype, jnp.complexfloating) for a in (p.left, p.right)]
    return [(a.real, a.imag) if c else (a, None) for a, c in zip((p.left, p.right), complex_, strict=True)]


def _minus(a: Array | None) -> Array | None:
    return None if a is None else -a


def conjugate(p: Product) -> Product:
    """The product with both operands conjugated."""
    return dataclasses.replace(p, left=p.left if p.row is not None else jnp.conj(p.left), right=jnp.conj(p.right))
