"""Transpose, reshape, slice, reverse or pad an unevaluated product.

A function here returns None if its result is not an unevaluated product.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxgrad.per_example.interpreter.undone import Labels, Term, replace


def transpose(term: Term, permutation: Sequence[int]) -> Term:
    """The product with its axes permuted."""
    box = None if term.box is None else tuple(term.box[k] for k in permutation)
    return replace(term, dims=tuple(term.dims[k] for k in permutation), box=box)


def reshape(term: Term, shape: Sequence[int]) -> Term | None:
    """Merge and split axes of the result, if the operands' own axes can be split in the same way."""
    if 0 in term.shape or 0 in shape:
        return None
    dims: list[Labels] = []
    box: list[tuple[int, int, int]] = []
    for old, new in _blocks(term.shape, tuple(shape)):
        target = [shape[k] for k in new]
        wide = [k for k in old if term.shape[k] != 1 or not term.whole(k)]
        if all(term.whole(k) for k in old):
            divided = _divided(term, [label for k in old for label in term.dims[k]], target)
            if divided is None:
                return None
            term, groups = divided
            dims += groups
            box += [(0, 1, n) for n in target]
            continue
        # The product covers a part of the first axis, and the other axes as a whole. All of them merge into one axis
        # of the new shape; its other axes have size 1.
        first, *rest = wide
        start, stride, full = term.place(first)
        several = [n for n in target if n != 1][1:]
        if several and not rest:  # one axis is split, at the edges of the part
            inner, n = math.prod(several), term.sizes[first]
            if stride != 1 or start % inner or n % inner:
                return None
            at = next(i for i, m in enumerate(target) if m != 1)
            sizes = [n // inner if i == at else m for i, m in enumerate(target)]
            divided = _divided(term, list(term.dims[first]), sizes)
            if divided is None:
                return None
            term, groups = divided
            dims += groups
            box += [(start // inner, 1, m) if i == at else (0, 1, m) for i, m in enumerate(target)]
            continue
        inner = math.prod(term.shape[k] for k in rest)
        if not all(term.whole(k) for k in rest) or (stride != 1 and inner != 1) or target.count(1) < len(target) - 1:
            return None
        labels = tuple(label for k in wide for label in term.dims[k])
        at = next((i for i, n in enumerate(target) if n != 1), 0)
        dims += [labels if i == at else () for i in range(len(target))]
        box += [(start * inner, stride, full * inner) if i == at else (0, 1, 1) for i in range(len(target))]
    return replace(term, dims=tuple(dims), box=tuple(box))


def _blocks(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Group the axes of two shapes into runs with equal products, as short as possible."""
    blocks: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        a, b = [], []
        m = n = 1
        if i < len(old):
            a, m, i = [i], old[i], i + 1
        if j < len(new):
            b, n, j = [j], new[j], j + 1
        while m != n:
            if m < n:
                a, m, i = [*a, i], m * old[i], i + 1
            else:
                b, n, j = [*b, j], n * new[j], j + 1
        blocks.append((a, b))
    return blocks


def _divided(term: Term, labels: list[int], sizes: list[int]) -> tuple[Term, list[Labels]] | None:
    """Group the labels, in order, into axes of these sizes; a label whose axis is too large is split in two."""
    groups: list[Labels] = []
    rest = [label for label in labels if term.size_of(label) != 1]
    for need in sizes:
        group: list[int] = []
        while need != 1:
            if not rest:
                return None
            label, n = rest[0], term.size_of(rest[0])
            if need % n == 0:
                group.append(rest.pop(0))
                need //= n
            elif n % need == 0 and (term.row is None or label != term.row[0]):
                new = term.fresh()
                term = _split_label(term, label, new, need)
                group.append(new)
                need = 1
            else:
                return None
        groups.append(tuple(group))
    return (term, groups) if not rest else None


def _split_label(term: Term, label: int, outer: int, size: int) -> Term:
    """Split an axis in two: `outer` of the given size, and `label` of the remaining size."""

    def side(a: Array, labels: Labels) -> tuple[Array, Labels]:
        if label not in labels:
            return a, labels
        k = labels.index(label)
        a = a.reshape(*a.shape[:k], size, a.shape[k] // size, *a.shape[k + 1 :])
        return a, (*labels[:k], outer, *labels[k:])

    left, left_labels = side(term.left, term.left_labels)
    right, right_labels = side(term.right, term.right_labels)
    dims = tuple(tuple(x for y in d for x in ((outer, y) if y == label else (y,))) for d in term.dims)
    return dataclasses.replace(
        term, left=left, right=right, left_labels=left_labels, right_labels=right_labels, dims=dims
    )


def pad(term: Term, config: Sequence[tuple[int, int, int]]) -> Term | None:
    """Put zeros around the product and between its entries; negative edges cut."""
    cut = [
        (max(-lo, 0), n - max(-hi, 0)) if step == 0 else (0, n)
        for (lo, hi, step), n in zip(config, term.shape, strict=True)
    ]
    if any((lo < 0 or hi < 0) and step for lo, hi, step in config):
        return None
    parts = cut_out(term, [a for a, _ in cut], [b for _, b in cut], [1] * len(cut))
    if parts is None or not parts:
        return None
    term = parts[0]
    box = []
    for k, (lo, hi, step) in enumerate(config):
        start, stride, full = term.place(k)
        lo, hi = max(lo, 0), max(hi, 0)
        box.append((lo + start * (step + 1), stride * (step + 1), lo + hi + full + max(full - 1, 0) * step))
    return replace(term, box=tuple(box))


def cut_out(
    term: Term, starts: Sequence[int], limits: Sequence[int], strides: Sequence[int]
) -> tuple[Term, ...] | None:
    """A slice of the product; no term if the slice contains none of its entries."""
    for k, (a, b, step) in enumerate(zip(starts, limits, strides, strict=True)):
        if (a, b, step) == (0, term.shape[k], 1):
            continue
        if not len(range(a, b, step)):
            return ()
        start, stride, _ = term.place(k)
        n = term.sizes[k]
        if term.whole(k):
            taken: Term | None = _take(term, k, a, b, step)
            place = (0, 1, len(range(a, b, step)))
        elif step == 1 and stride == 1:
            first, last = max(a, start), min(b, start + n)
            if first >= last:
                return ()
            taken, place = _take(term, k, first - start, last - start, 1), (first - a, 1, b - a)
        elif n == 1:
            if start not in range(a, b, step):
                return ()
            taken, place = term, ((start - a) // step, 1, len(range(a, b, step)))
        else:
            return None
        if taken is None:
            return None
        box = tuple(
            place if i == k else taken.place(i) if term.box is None else term.box[i] for i in range(len(starts))
        )
        term = replace(taken, box=box)
    return (term,)


def _take(term: Term, dim: int, start: int, limit: int, stride: int) -> Term | None:
    """A slice of the product itself along one axis, without the zeros around it."""
    n = term.sizes[dim]
    if (start, limit, stride) == (0, n, 1):
        return dataclasses.replace(term, box=None)
    labels = [label for label in term.dims[dim] if term.size_of(label) != 1]
    if len(labels) == 0:
        return None  # an empty slice
    inner = math.prod(term.size_of(label) for label in labels[1:])
    if (stride != 1 and inner != 1) or start % inner or limit % inner:
        return None
    label, start, limit = labels[0], start // inner, limit // inner
    if limit <= start:
        return None
    if term.row is not None and label == term.row[0]:
        if stride != 1:
            return None
        return dataclasses.replace(term, left=_within(term, start, limit), row=(label, limit - start), box=None)

    def side(a: Array, of: Labels) -> Array:
        return lax.slice_in_dim(a, start, limit, stride, of.index(label)) if label in of else a

    return dataclasses.replace(
        term, left=side(term.left, term.left_labels), right=side(term.right, term.right_labels), box=None
    )


def _within(term: Term, start: int, limit: int) -> Array:
    """Row numbers counted from `start`; one outside the slice becomes the number of rows, which adds nothing."""
    inside = (term.left >= start) & (term.left < limit)
    return jnp.where(inside, term.left - start, jnp.full_like(term.left, limit - start))


def reverse(term: Term, dims: Sequence[int]) -> Term | None:
    """The product with axes reversed."""
    flipped = {label for k in dims for label in term.dims[k]}
    if term.row is not None and term.row[0] in flipped:
        return None

    def side(a: Array, labels: Labels) -> Array:
        return lax.rev(a, [k for k, label in enumerate(labels) if label in flipped])

    box = term.box
    if box is not None:
        turned = [
            (full - 1 - (start + (n - 1) * stride), stride, full)
            for (start, stride, full), n in zip(box, term.sizes, strict=True)
        ]
        box = tuple(turned[k] if k in dims else box[k] for k in range(len(box)))
    return replace(term, left=side(term.left, term.left_labels), right=side(term.right, term.right_labels), box=box)
