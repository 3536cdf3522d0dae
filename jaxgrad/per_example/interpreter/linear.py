"""Scale, mask or sum an unevaluated product, multiply it by a matrix, or put it at an index that is data.

A function here returns None if its result is not an unevaluated product.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxgrad.per_example.interpreter.undone import Labels, Term, einsum, replace
from jaxgrad.precision import working_dtype


def on_smaller(term: Term, function: Callable[[Any], Any]) -> Term:
    """Apply a linear elementwise function to the smaller operand."""
    if term.row is None and term.left.size < term.right.size:
        return replace(term, left=function(term.left))
    return replace(term, right=function(term.right))


def aligned(term: Term, value: Array, dims: Sequence[int]) -> tuple[str, Array] | None:
    """Align `value`, which has one axis for each axis of the result in `dims`, with the axes of one operand.

    Returns:
        ("left" or "right", the value with an axis of full size or size 1 for each axis of that operand); None if it
        varies along axes of both operands.
    """
    labels = [label for k in dims for label in term.dims[k]]
    side = "right" if all(label in term.right_labels for label in labels) else "left"
    of = term.right_labels if side == "right" else term.left_labels
    if not all(label in of for label in labels) or (term.row is not None and side == "left"):
        return None
    if term.box is not None:
        for axis, k in enumerate(dims):
            start, stride, _ = term.box[k]
            value = lax.slice_in_dim(value, start, start + (term.sizes[k] - 1) * stride + 1, stride, axis)
    value = value.reshape([term.size_of(label) for label in labels])
    present = [label for label in of if label in labels]
    value = value.transpose([labels.index(label) for label in present])
    return side, value.reshape([term.size_of(label) if label in labels else 1 for label in of])


def sums(term: Term, dims: Sequence[int]) -> Term | None:
    """Sum the product over axes of the result."""
    gone = {label for k in dims for label in term.dims[k]}
    if term.row is not None and term.row[0] in gone:
        return None

    def side(a: Array, labels: Labels, others: Labels) -> tuple[Array, Labels]:
        alone = [label for label in labels if label in gone and label not in others]
        if not alone:
            return a, labels
        total = a.sum([labels.index(label) for label in alone], dtype=working_dtype(a.dtype))
        return total, tuple(label for label in labels if label not in alone)

    left, left_labels = side(term.left, term.left_labels, term.right_labels)
    right, right_labels = side(term.right, term.right_labels, term.left_labels)
    kept = [k for k in range(len(term.dims)) if k not in dims]
    box = None if term.box is None else tuple(term.box[k] for k in kept)
    changed = dataclasses.replace(
        term,
        left=left,
        right=right,
        left_labels=left_labels,
        right_labels=right_labels,
        dims=tuple(term.dims[k] for k in kept),
        box=None,
    )
    return replace(changed, box=box)


def contract(
    term: Term,
    C: Array,
    contracted: Sequence[tuple[int, int]],
    batch: Sequence[tuple[int, int]],
    undone_first: bool,
    precision: object,
) -> Term | None:
    """dot_general of the product with an array C, applied to one operand: (δ aᵀ) C = δ (Cᵀ a)ᵀ.

    Args:
        contracted, batch: (axis of the product, axis of C).
        undone_first: whether the product is dot_general's first operand.
    """
    met = [label for k, _ in (*contracted, *batch) for label in term.dims[k]]
    if term.row is not None and term.row[0] in met:
        return None
    for k, axis in contracted:
        if not term.whole(k):
            start, stride, _ = term.place(k)
            C = lax.slice_in_dim(C, start, start + (term.sizes[k] - 1) * stride + 1, stride, axis)
    if not all(term.whole(k) for k, _ in batch):
        return None
    sides = [s for s in ("left", "right") if all(label in getattr(term, f"{s}_labels") for label in met)]
    if term.row is not None:
        sides = [s for s in sides if s == "right"]
    if not sides:
        return None
    side = min(sides, key=lambda s: getattr(term, s).size)
    of, operand = getattr(term, f"{side}_labels"), getattr(term, side)
    other = term.right_labels if side == "left" else term.left_labels
    free = [axis for axis in range(C.ndim) if axis not in {b for _, b in (*contracted, *batch)}]
    new = {axis: term.fresh() + i for i, axis in enumerate(free)}
    # Split C's axes as the product's are split.
    at = {axis: term.dims[k] for k, axis in (*contracted, *batch)}
    C_labels = tuple(label for axis in range(C.ndim) for label in at.get(axis, (new[axis],) if axis in new else ()))
    sizes = [[term.size_of(label) for label in at[k]] if k in at else [C.shape[k]] for k in range(C.ndim)]
    C = C.reshape([n for part in sizes for n in part])
    gone = {label for k, _ in contracted for label in term.dims[k]} - set(other)
    kept = tuple(label for label in of if label not in gone)
    out = (*kept, *new.values())
    work = working_dtype(operand.dtype, C.dtype)
    dtype = operand.dtype if operand.dtype == C.dtype else work
    value = einsum(operand, of, C, C_labels, out, work, precision).astype(dtype)
    used = {k for k, _ in (*contracted, *batch)}
    mine = [k for k in range(len(term.dims)) if k not in used]
    ours = [(term.dims[k], term.place(k)) for k in mine]
    theirs = [((new[axis],), (0, 1, C.shape[C_labels.index(new[axis])])) for axis in free]
    both = [(term.dims[k], term.place(k)) for k, _ in batch]
    order = [*both, *ours, *theirs] if undone_first else [*both, *theirs, *ours]
    changes: dict[str, Any] = {side: value, f"{side}_labels": out}
    changed = dataclasses.replace(term, **changes, dims=tuple(labels for labels, _ in order), box=None)
    return replace(changed, box=tuple(place for _, place in order))


def embedded(term: Term, dim: int, start: Array, full: int, mode: str) -> Term | None:
    """Put the product into zeros along one axis, at an index known only at run time.

    Args:
        mode: "clip" or "drop", for an index out of range.
    """
    if not term.whole(dim) or term.row is not None:
        return None
    n = term.sizes[dim]
    place = [term.place(k) for k in range(len(term.dims))]
    if mode == "clip":  # a negative start does not count from the end
        start = jnp.clip(start, 0, full - n)
    if n == 1:  # multiply the smaller operand by a one-hot vector
        hot = jnp.arange(full, dtype=start.dtype) == start
        new, side = term.fresh(), "left" if term.left.size <= term.right.size else "right"
        a, labels = getattr(term, side), getattr(term, f"{side}_labels")
        a = jnp.where(hot.reshape(full, *[1] * a.ndim), a[None], jnp.zeros_like(a)[None])
        changes: dict[str, Any] = {side: a, f"{side}_labels": (new, *labels)}
        dims = tuple((new,) if k == dim else d for k, d in enumerate(term.dims))
    else:
        label = term.dims[dim]
        sides = [s for s in ("left", "right") if all(x in getattr(term, f"{s}_labels") for x in label)]
        if len(label) != 1 or len(sides) != 1 or mode != "clip":
            return None
        a, labels = getattr(term, sides[0]), getattr(term, f"{sides[0]}_labels")
        axis = labels.index(label[0])
        zeros = jnp.zeros((*a.shape[:axis], full, *a.shape[axis + 1 :]), a.dtype)
        changes = {sides[0]: lax.dynamic_update_slice_in_dim(zeros, a, start, axis)}
        dims = term.dims
    box = tuple((0, 1, full) if k == dim else p for k, p in enumerate(place))
    return replace(dataclasses.replace(term, **changes, dims=dims, box=None), box=box)


def contracted_with(term: Term, C: Array, dims: Sequence[int]) -> Array:
    """Σ over axes of the result of (product ⊙ C); the product must cover the whole result."""
    work = working_dtype(term.left.dtype, term.right.dtype, C.dtype)
    sides = [term.left, term.left_labels, term.right, term.right_labels]
    sides += [C.reshape([term.size_of(label) for label in term.out]), term.out]
    kept = [k for k in range(len(term.dims)) if k not in dims]
    out = [label for k in kept for label in term.dims[k]]
    arrays = [a.astype(work) if k % 2 == 0 else list(a) for k, a in enumerate(sides)]
    value = jnp.einsum(*arrays, out, optimize="optimal", precision=term.precision)
    return value.reshape([term.sizes[k] for k in kept])


def real(term: Term) -> tuple[Term, ...]:
    """The real part of a product of complex operands: Re·Re - Im·Im."""
    (a, b), (c, d) = _parts(term)
    return tuple(replace(term, left=x, right=y) for x, y in ((a, c), (_minus(b), d)) if x is not None and y is not None)


def imag(term: Term) -> tuple[Term, ...]:
    """The imaginary part: Re·Im + Im·Re."""
    (a, b), (c, d) = _parts(term)
    return tuple(replace(term, left=x, right=y) for x, y in ((a, d), (b, c)) if x is not None and y is not None)


def _parts(term: Term) -> list[tuple[Array, Array | None]]:
    """(real part, imaginary part) of both operands; the imaginary part of a real operand is None."""
    complex_ = [jnp.issubdtype(a.dtype, jnp.complexfloating) for a in (term.left, term.right)]
    return [(a.real, a.imag) if c else (a, None) for a, c in zip((term.left, term.right), complex_, strict=True)]


def _minus(a: Array | None) -> Array | None:
    return None if a is None else -a


def conjugate(term: Term) -> Term:
    """The product with both operands conjugated."""
    return replace(term, left=term.left if term.row is not None else jnp.conj(term.left), right=jnp.conj(term.right))
