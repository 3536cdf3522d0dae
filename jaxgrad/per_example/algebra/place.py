"""Where the entries of a product are in a larger array of zeros.

The axes of a product's sides have labels. Entry (i, j, …) of the labels is, along one axis of the array, at

    start + i · (stride of its label) + j · (stride of its label) + …

Transposing, padding, reversing, slicing and reshaping the array is arithmetic on these numbers. A label belongs to one
axis of the array at most, and no label has size 1 (but that of a table's rows).
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

Labels = tuple[int, ...]
Sizes = Mapping[int, int] | Sequence[int]  # the size of each label


class Axis(NamedTuple):
    """One axis of the array.

    Attributes:
        size: its full size.
        start: where the entry is whose indices are all 0.
        steps: (label, stride) of each label, with the longest stride first.
    """

    size: int
    start: int = 0
    steps: tuple[tuple[int, int], ...] = ()

    @property
    def labels(self) -> Labels:
        """The labels, slowest first."""
        return tuple(label for label, _ in self.steps)

    def extent(self, sizes: Sizes) -> tuple[int, int]:
        """(the first entry, the last entry)."""
        ends = [stride * (sizes[label] - 1) for label, stride in self.steps]
        return self.start + sum(min(end, 0) for end in ends), self.start + sum(max(end, 0) for end in ends)

    def is_whole(self, sizes: Sizes) -> bool:
        """Whether every entry of the axis is an entry of the product, in the order of its labels."""
        return self == axis_of(self.labels, sizes)

    def moved(self, by: int, scale: int = 1, size: int | None = None) -> "Axis":
        """The axis with its entries at by + scale · (where they are now), in a new size."""
        steps = tuple((label, stride * scale) for label, stride in self.steps)
        return Axis(self.size if size is None else size, by + scale * self.start, steps)


Place = tuple[Axis, ...]


def axis_of(labels: Sequence[int], sizes: Sizes) -> Axis:
    """An axis that consists of these labels, slowest first."""
    steps: list[tuple[int, int]] = []
    size = 1
    for label in reversed(labels):
        steps.insert(0, (label, size))
        size *= sizes[label]
    return Axis(size, 0, tuple(steps))


def whole(shape: Sequence[int], first: int = 0) -> tuple[Place, tuple[int, ...]]:
    """(the place of a whole array, the sizes of its labels): each axis is a label, unless its size is 1."""
    labels = itertools.count(first)
    place = tuple(Axis(n, 0, ((next(labels), 1),)) if n != 1 else Axis(1) for n in shape)
    return place, tuple(n for n in shape if n != 1)


def labels_of(place: Sequence[Axis]) -> Labels:
    """The labels of all axes, in the order of the array."""
    return tuple(label for axis in place for label in axis.labels)


def apart(place: Sequence[Axis], sizes: Sizes, place_: Sequence[Axis], sizes_: Sizes) -> bool:
    """True if two products in one array are known to have no entry in common."""
    for a, b in zip(place, place_, strict=True):
        (first, last), (first_, last_) = a.extent(sizes), b.extent(sizes_)
        step = math.gcd(*(stride for _, stride in (*a.steps, *b.steps)))
        if last < first_ or last_ < first or (step > 1 and (a.start - b.start) % step):
            return True
    return any(0 in [n[label] for label in labels_of(p)] for p, n in ((place, sizes), (place_, sizes_)))


def put(value: Array, order: Sequence[int], place: Sequence[Axis], sizes: Sizes) -> Array:
    """`[*batch, *order]`, an axis for each label → `[*batch, *shape]`, with zeros between and around the entries."""
    batch, shape = value.ndim - len(order), [axis.size for axis in place]
    if 0 in value.shape[batch:]:
        return jnp.zeros((*value.shape[:batch], *shape), value.dtype)
    value = _turned(value.transpose(*range(batch), *(batch + order.index(k) for k in labels_of(place))), batch, place)
    runs = [_runs(axis, sizes) for axis in place]
    value = value.reshape(*value.shape[:batch], *(n for each in runs for n, _ in each))
    edges = [(0, 0, 0)] * batch
    for at, (axis, each) in enumerate(zip(place, runs, strict=True), batch):
        while len(each) > 1:  # the fastest runs: fill the gaps with zeros, and merge
            (n, stride), (m, inner) = each[-2:]
            last = at + len(each) - 1
            value = _padded(value, last, (0, stride - (m - 1) * inner - 1, inner - 1))
            value = value.reshape(*value.shape[: last - 1], n * stride, *value.shape[last + 1 :])
            each[-2:] = [(n * stride, 1)]
        ((n, stride),) = each or [(1, 1)]
        value = value if each else jnp.expand_dims(value, at)
        start = axis.extent(sizes)[0]
        edges.append((start, axis.size - start - (n - 1) * stride - 1, stride - 1))
    if list(value.shape[batch:]) == shape and all(lo == 0 for lo, _, _ in edges):
        return value
    return lax.pad(value, jnp.zeros((), value.dtype), edges)


def read(value: Array, order: Sequence[int], place: Sequence[Axis], sizes: Sizes) -> Array:
    """`[*batch, *shape]` → `[*batch, *order]`: the entries at which the product is, with an axis for each label."""
    batch = value.ndim - len(place)
    if any(sizes[label] == 0 for label in order):
        return jnp.zeros((*value.shape[:batch], *(sizes[label] for label in order)), value.dtype)
    runs = [_runs(axis, sizes) for axis in place]
    parts = [slice(None)] * batch
    for axis, each in zip(place, runs, strict=True):
        first, last = axis.extent(sizes)
        parts.append(slice(first, last + 1, each[0][1] if len(each) == 1 else 1))
    if any(
        (part.start, part.stop, part.step) != (0, n, 1)
        for part, n in zip(parts[batch:], value.shape[batch:], strict=True)
    ):
        value = value[tuple(parts)]
    at = batch
    for each in runs:
        for k, (n, stride) in enumerate(each[:-1]):
            value = _padded(value, at, (0, n * stride - value.shape[at], 0))
            value = value.reshape(*value.shape[:at], n, stride, *value.shape[at + 1 :])
            at += 1
            if k == len(each) - 2:
                m, inner = each[-1]
                value = lax.slice_in_dim(value, 0, (m - 1) * inner + 1, inner, at)
        at += 1
    labels = labels_of(place)
    value = _turned(value.reshape(*value.shape[:batch], *(sizes[label] for label in labels)), batch, place)
    return value.transpose(*range(batch), *(batch + labels.index(label) for label in order))


def _turned(value: Array, batch: int, place: Sequence[Axis]) -> Array:
    """Reverse the axes of labels with a negative stride."""
    strides = [stride for axis in place for _, stride in axis.steps]
    backwards = [batch + k for k, stride in enumerate(strides) if stride < 0]
    return lax.rev(value, backwards) if backwards else value


def _padded(value: Array, axis: int, edges: tuple[int, int, int]) -> Array:
    """Zeros after and between the entries along one axis."""
    if edges == (0, 0, 0):
        return value
    return lax.pad(value, jnp.zeros((), value.dtype), [edges if k == axis else (0, 0, 0) for k in range(value.ndim)])


def _runs(axis: Axis, sizes: Sizes) -> list[tuple[int, int]]:
    """(size, stride) of its labels, slowest first, without signs; labels without gaps between them are merged."""
    runs: list[tuple[int, int]] = []
    for label, stride in axis.steps:
        n, stride = sizes[label], abs(stride)
        if runs and runs[-1][1] == n * stride:
            runs[-1] = (runs[-1][0] * n, stride)
        else:
            runs.append((n, stride))
    return runs


def is_nested(axis: Axis, sizes: Sizes) -> bool:
    """Whether the entries of faster labels fit between those of slower ones, as `put` and `read` require."""
    extent = 1
    for label, stride in reversed(axis.steps):
        if abs(stride) < extent:
            return False
        extent += abs(stride) * (sizes[label] - 1)
    return True
