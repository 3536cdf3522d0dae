"""Transpose, reshape, slice, reverse or pad an unevaluated product: arithmetic on its place.

A function here returns the product, () if nothing of it is left, or None if the result is not one product.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxgrad.per_example.algebra.place import Axis
from jaxgrad.per_example.algebra.product import Product, squeezed
from jaxgrad.precision import index_dtype

Moved = Product | tuple[()] | None


def transpose(p: Product, permutation: Sequence[int]) -> Product:
    """The product with its axes permuted."""
    return dataclasses.replace(p, place=tuple(p.place[k] for k in permutation))


def reverse(p: Product, dims: Sequence[int]) -> Product:
    """The product with axes reversed."""
    place = (axis.moved(axis.size - 1, -1) if k in dims else axis for k, axis in enumerate(p.place))
    return dataclasses.replace(p, place=tuple(place))


def pad(p: Product, config: Sequence[tuple[int, int, int]]) -> Moved:
    """Put zeros around the product and between its entries; negative edges cut."""
    for k, (lo, hi, step) in enumerate(config):
        size = lo + hi + p.shape[k] + max(p.shape[k] - 1, 0) * step
        moved = _within(_with_axis(p, k, p.place[k].moved(lo, step + 1, size)), k)
        if not moved:
            return moved
        p = moved
    return p


def cut_out(p: Product, starts: Sequence[int], limits: Sequence[int], strides: Sequence[int]) -> Moved:
    """A slice of the product."""
    for k, (start, limit, stride) in enumerate(zip(starts, limits, strides, strict=True)):
        if (start, limit, stride) == (0, p.shape[k], 1):
            continue
        moved = _within(_with_axis(p, k, p.place[k].moved(-start, 1, max(limit - start, 0))), k)
        moved = _every(moved, k, stride) if moved else moved
        if not moved:
            return moved
        p = moved
    return p


def reshape(p: Product, shape: Sequence[int]) -> Product | None:
    """Merge and split axes of the result; the sides are split if an axis of theirs lies across the new axes."""
    if 0 in p.shape or 0 in shape:
        return None
    place: list[Axis] = []
    for old, new in _blocks(p.shape, tuple(shape)):
        rest = Axis(1)
        for k in old:  # merged into one axis
            axis = p.place[k]
            moved = rest.moved(axis.start, axis.size, rest.size * axis.size)
            rest = moved._replace(steps=moved.steps + axis.steps)
        for k in new[:-1]:
            divided = _divided(p, rest, rest.size // shape[k])
            if divided is None:
                return None
            p, axis, rest = divided
            place.append(axis)
        place += [rest] if new else []
    return squeezed(dataclasses.replace(p, place=tuple(place)))


def _with_axis(p: Product, k: int, axis: Axis) -> Product:
    return dataclasses.replace(p, place=(*p.place[:k], axis, *p.place[k + 1 :]))


def _within(p: Product, k: int) -> Moved:
    """The part of the product that is inside its array along one axis."""
    axis = p.place[k]
    first, last = axis.extent(p.sizes)
    if first >= 0 and last < axis.size:
        return p
    if last < 0 or first >= axis.size:
        return ()
    (label, stride), *rest = axis.steps
    lo, hi = axis._replace(steps=tuple(rest)).extent(p.sizes)
    inside = _between(-lo, axis.size - 1 - hi, stride, p.sizes[label])
    touched = _between(-hi, axis.size - 1 - lo, stride, p.sizes[label])
    if not touched:
        return ()
    return _take(p, label, inside.start, inside.stop, 1) if inside == touched else None


def _between(lo: int, hi: int, stride: int, n: int) -> range:
    """The i with 0 ≤ i < n and lo ≤ stride · i ≤ hi."""
    if stride < 0:
        lo, hi, stride = -hi, -lo, -stride
    return range(max(0, -(-lo // stride)), min(n, hi // stride + 1))


def _every(p: Product, k: int, step: int) -> Moved:
    """Every step-th entry along one axis, from the first on."""
    axis = p.place[k]
    across = [(label, stride) for label, stride in axis.steps if stride % step]
    if len(across) > 1:
        return None
    for label, stride in across:
        period = step // math.gcd(stride, step)
        first = next((i for i in range(min(period, p.sizes[label])) if (axis.start + stride * i) % step == 0), None)
        if first is None:
            return ()
        p = _take(p, label, first, p.sizes[label], period)
    axis = p.place[k]
    if axis.start % step:
        return ()
    steps = tuple((label, stride // step) for label, stride in axis.steps)
    return _with_axis(p, k, Axis(-(-axis.size // step), axis.start // step, steps))


def _take(p: Product, label: int, start: int, limit: int, step: int) -> Product:
    """A slice of the product along the axis with this label."""
    n = len(range(start, limit, step))
    changes: dict[str, Any] = {}
    for name in ("left", "right"):
        a, labels = getattr(p, name), getattr(p, f"{name}_labels")
        if label in labels:
            changes[name] = lax.slice_in_dim(a, start, limit, step, labels.index(label))
    if label == p.row:
        ids = p.left.astype(index_dtype(p.left.dtype)) - start
        inside = (ids >= 0) & (ids < limit - start) & (ids % step == 0)
        changes["left"] = jnp.where(inside, ids // step, jnp.full_like(ids, -1))
    place = list(p.place)
    for k, axis in enumerate(place):
        moved = dict(axis.steps).get(label)
        if moved is not None:
            steps = tuple((x, stride * step if x == label else stride) for x, stride in axis.steps)
            place[k] = Axis(axis.size, axis.start + moved * start, steps)
    sizes = tuple(n if x == label else size for x, size in enumerate(p.sizes))
    return squeezed(dataclasses.replace(p, place=tuple(place), sizes=sizes, **changes))


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


def _divided(p: Product, axis: Axis, inner: int) -> tuple[Product, Axis, Axis] | None:
    """(the product, with its sides' axes split if they must be; the axis over `inner`; the axis modulo `inner`)."""
    while True:
        outer = tuple((label, stride // inner) for label, stride in axis.steps if stride % inner == 0)
        rest = axis._replace(steps=tuple((label, stride) for label, stride in axis.steps if stride % inner))
        first, last = rest.extent(p.sizes)
        block = first // inner
        if block == last // inner:
            return p, Axis(axis.size // inner, block, outer), Axis(inner, axis.start - block * inner, rest.steps)
        if not rest.steps:
            return None
        label, stride = rest.steps[0]
        n, width = p.sizes[label], inner // abs(stride)
        if inner % stride or n % width or n == width or label == p.row:
            return None
        new = len(p.sizes)
        p = _split(p, label, new, n // width)
        at = axis.steps.index((label, stride))
        axis = axis._replace(steps=(*axis.steps[:at], (new, stride * width), *axis.steps[at:]))


def _split(p: Product, label: int, outer: int, size: int) -> Product:
    """Split an axis of the sides in two: `outer` of the given size, and `label` of the remaining size."""
    changes: dict[str, Any] = {}
    for name in ("left", "right"):
        a, labels = getattr(p, name), getattr(p, f"{name}_labels")
        if label in labels:
            k = labels.index(label)
            changes[name] = a.reshape(*a.shape[:k], size, a.shape[k] // size, *a.shape[k + 1 :])
            changes[f"{name}_labels"] = (*labels[:k], outer, *labels[k:])
    sizes = (*(n // size if x == label else n for x, n in enumerate(p.sizes)), size)
    return dataclasses.replace(p, sizes=sizes, **changes)
