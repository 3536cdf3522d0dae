"""One factor in place of many adjacent ones in a parameter, which a loop over experts or stacked layers produces."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp

from jaxgrad.per_example.algebra.factors import Factor, Outer
from jaxgrad.per_example.algebra.layout import Layout

FEW = 3  # up to this many factors are not grouped, because a group copies its members' sides


def grouped(factors: Sequence[Factor]) -> tuple[Factor, ...]:
    """Join Outers of one example that differ only in where their boxes start into one, with a group for each of them.

    Cost: linear in their number; without it, operations on n factors would take n terms, or n² pairs.
    """
    found = list(factors)
    for axis in range(len(found[0].layout.shape) if found else 0):
        if len(found) > FEW:
            found = _along(found, axis)
    return tuple(found)


def _along(factors: Sequence[Factor], axis: int) -> list[Factor]:
    alike: dict[Any, list[Outer]] = {}
    seen: dict[Any, int] = {}
    result: list[Factor] = []
    for f in factors:
        if not isinstance(f, Outer) or f.layout.box is None:
            result.append(f)
            continue
        key = (_without_start(f.layout, axis), f.positions_first, *((a.shape, a.dtype) for a in (f.left, f.right)))
        again = (key, f.layout.box)  # a second factor with the same box belongs to a second group
        seen[again] = seen.get(again, -1) + 1
        alike.setdefault((key, seen[again]), []).append(f)
    for same in alike.values():
        for run in _runs(sorted(same, key=lambda f: _box(f)[axis][0]), axis):
            layout = _together([f.layout for f in run], axis) if len(run) > FEW else None
            result += run if layout is None else [_group(run, layout)]
    return result


def _group(run: Sequence[Outer], layout: Layout) -> Outer:
    left, right = (jnp.concatenate(sides) for sides in zip(*((f.left, f.right) for f in run), strict=True))
    return dataclasses.replace(run[0], left=left, right=right, layout=layout)


def _runs(factors: Sequence[Outer], axis: int) -> Iterator[list[Outer]]:
    """Runs of neighbors at equal distances."""
    starts = [_box(f)[axis][0] for f in factors]
    run: list[Outer] = []
    for k, f in enumerate(factors):
        if len(run) > 1 and starts[k] - starts[k - 1] != starts[k - 1] - starts[k - 2]:
            yield run
            run = []
        run.append(f)
    yield run


def _together(layouts: Sequence[Layout], axis: int) -> Layout | None:
    """The layout of a group of boxes whose starts are equally spaced along an axis; None if they form no box."""
    first, n = layouts[0], len(layouts)
    box = _box_of(first)
    start, size, stride = box[axis]
    distance = _box_of(layouts[1])[axis][0] - start
    if size == 1:
        whole, inner = (start, n, distance), 1
    elif stride == 1 and distance == size:  # consecutive boxes
        whole, inner = (start, n * size, 1), 1
    elif stride == n and distance == 1:  # interleaved boxes
        whole, inner = (start, n * size, 1), size
    else:
        return None
    before = inner  # product of the box's sizes in front of the group's axis
    for _, count, _ in box[:axis]:
        before *= count
    split = first.split or ()
    place, seen = 0, 1
    while seen < before and place < len(split):
        seen, place = seen * split[place], place + 1
    if seen != before:
        return None  # an axis of split straddles this place
    G, F, K = first.matrix
    return dataclasses.replace(
        first,
        box=(*box[:axis], whole, *box[axis + 1 :]),
        split=(*split[:place], n, *split[place:]),
        axes=(place, *(a + (a >= place) for a in first.axes)),
        matrix=(n * G, F, K),
    )


def _without_start(layout: Layout, axis: int) -> Any:
    box = list(_box_of(layout))
    box[axis] = (0, *box[axis][1:])
    return (layout.shape, layout.dtype, layout.axes, layout.matrix, layout.split, tuple(box))


def _box(f: Outer) -> tuple[tuple[int, int, int], ...]:
    return _box_of(f.layout)


def _box_of(layout: Layout) -> tuple[tuple[int, int, int], ...]:
    assert layout.box is not None
    return layout.box
