"""The form in which products are held; and fewer of them: uses of one weight are merged, neighbors are grouped."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from jaxgrad.per_example.algebra.place import Axis, Labels, is_nested
from jaxgrad.per_example.algebra.product import Product, Unfolded, spread
from jaxgrad.precision import joined, working_dtype
from jaxgrad.sharding import merged as merged_axes
from jaxgrad.sharding import spread_over

MERGED = 3  # up to this many products of one layout stay apart
FEW = 3  # up to this many neighbors are not grouped, because a group copies its members' sides


def arranged(p: Product, dtype: Any) -> Product:
    """The product of one example in the form that is held: left is [G, T, F] and right [G, T, K], with labels in the
    order of the parameter. Left has the parameter's first free axis, so that like products have one layout."""
    p = dataclasses.replace(p, dtype=jnp.dtype(dtype), precision=None, reason=None, over=())
    if p.windows:
        return _numbered(p)
    if p.is_scaled_array:
        p = dataclasses.replace(p, left=_times(p.left, p.right), right=None)
    elif p.row is None and next((x for x in p.out if x not in p.roles[0]), None) in p.roles[3]:
        p = p.turned()
    p = _numbered(_joined_labels(p))
    G, T, F, K = (sorted(labels) for labels in p.roles)  # numbered as they are in the parameter
    T = [x for x in p.left_labels if x in T]
    T.sort(key=lambda x: x not in _divided(p))  # sharded labels come first, so merging them moves no data
    if p.row is not None:
        T += [x for x in p.left_labels if x not in T]
        values = _ordered(p.right, p.right_labels, [*T, *K])
        present = [x for x in T if x in p.right_labels]
        if present and len(present) < len(T):
            values = jnp.expand_dims(values, [k for k, x in enumerate(T) if x not in present])
            values, present = jnp.broadcast_to(values, [p.sizes[x] for x in (*T, *K)]), T
        return _with(p, _ordered(p.left, p.left_labels, T), values, [T], [present, K])
    left = _ordered(p.left, p.left_labels, [*G, *T, *F])
    right = None if p.right is None else _ordered(p.right, p.right_labels, [*G, *T, *K])
    return _with(p, left, right, [F] if right is None else [G, T, F], [G, T, K])


def _with(p: Product, left: Array, right: Any, runs: Sequence[Labels | list[int]], runs_: Sequence[Any]) -> Product:
    """The product with these sides, each of these runs of axes merged into one; a `Dense` keeps its axes."""
    if right is not None:
        left, right = (merged_axes(a, *(len(run) for run in each if run)) for a, each in ((left, runs), (right, runs_)))
    labels = tuple(x for run in runs for x in run)
    labels_ = () if right is None else tuple(x for run in runs_ for x in run)
    return dataclasses.replace(p, left=left, right=right, left_labels=labels, right_labels=labels_)


def _times(a: Array, number: Any) -> Array:
    if number is None:
        return a
    dtype = a.dtype if a.dtype == number.dtype else working_dtype(a.dtype, number.dtype)
    return a.astype(dtype) * number.astype(dtype)


def _ordered(a: Array, labels: Sequence[int], order: Sequence[int]) -> Array:
    """The array with its axes in this order; axes whose labels are not in `order` are summed."""
    gone = [k for k, x in enumerate(labels) if x not in order]
    a = a.sum(gone, dtype=a.dtype) if gone else a
    kept = [x for x in labels if x in order]
    return a.transpose([kept.index(x) for x in order if x in kept])


def _divided(p: Product) -> set[int]:
    """The labels of axes that are sharded on an explicit mesh."""
    sides = [(p.left, p.left_labels), (p.right, p.right_labels)]
    return {x for a, labels in sides if a is not None for x, on in zip(labels, spread_over(a), strict=True) if on}


def _joined_labels(p: Product) -> Product:
    """Neighbors in one axis of the parameter with one role, and nothing between them, become one label."""
    for k, axis in enumerate(p.place):
        for (x, stride), (y, inner) in zip(axis.steps, axis.steps[1:], strict=False):
            role = next(part for part in p.roles if x in part)
            if y in role and p.row not in (x, y) and stride == p.sizes[y] * inner:
                return _joined_labels(_joined_label(p, k, x, y, inner))
    return p


def _joined_label(p: Product, k: int, x: int, y: int, inner: int) -> Product:
    changes: dict[str, Any] = {}
    for name in ("left", "right"):
        a, labels = getattr(p, name), getattr(p, f"{name}_labels")
        if x in labels:
            order = [z for z in labels if z != y]
            order.insert(order.index(x) + 1, y)
            a = merged_axes(_ordered(a, labels, order), *(1 + (z == x) for z in order if z != y))
            changes |= {name: a, f"{name}_labels": tuple(z for z in order if z != y)}
    axis = p.place[k]
    steps = tuple((z, inner if z == x else stride) for z, stride in axis.steps if z != y)
    sizes = tuple(n * p.sizes[y] if z == x else n for z, n in enumerate(p.sizes))
    place = (*p.place[:k], axis._replace(steps=steps), *p.place[k + 1 :])
    return dataclasses.replace(p, place=place, sizes=sizes, **changes)


def _numbered(p: Product) -> Product:
    """The same product with its labels numbered in the order of the parameter, then in that of the sides."""
    hidden = [x for w in p.windows for x in w[:3]]
    row = [] if p.row is None else [p.row]
    labels = list(dict.fromkeys([*p.out, *row, *p.left_labels, *p.right_labels, *hidden]))
    number = {x: k for k, x in enumerate(labels)}

    def renamed(of: Sequence[int]) -> Labels:
        return tuple(number[x] for x in of)

    return dataclasses.replace(
        p,
        left_labels=renamed(p.left_labels),
        right_labels=renamed(p.right_labels),
        place=tuple(Axis(*axis[:2], tuple((number[x], stride) for x, stride in axis.steps)) for axis in p.place),
        sizes=tuple(p.sizes[x] for x in labels),
        row=None if p.row is None else number[p.row],
        windows=tuple(Unfolded(number[w.axis], number[w.place], number[w.position], w.window) for w in p.windows),
    )


# --- Fewer products ------------------------------------------------------------------------------------------------


def fewer(products: Sequence[Product]) -> tuple[Product, ...]:
    """Merge many uses of one weight, as in an unrolled loop, into one product with their positions concatenated; and
    group many neighbors in the parameter."""
    alike: dict[Any, list[Product]] = {}
    found: list[Product] = []
    for p in products:
        if p.windows or p.right is None or (p.row is not None and p.repeated):
            found.append(p)  # merged, it would hold more
        else:
            G, _, F, K = p.roles
            key = (p.place, tuple(p.sizes[x] for x in p.out), p.row, G, F, K)
            alike.setdefault(key, []).append(p)
    for same in alike.values():
        found += same if len(same) <= MERGED else [_with_all_positions(same)]
    return grouped(found)


def _with_all_positions(same: Sequence[Product]) -> Product:
    """One product of one example with the positions of all of these, which have one layout."""
    parts = [with_positions(p, p.positions) for p in same]
    axis, first = parts[0].left_labels.index(len(parts[0].out)), parts[0]
    left, right = (joined([getattr(p, side) for p in parts], axis) for side in ("left", "right"))
    return dataclasses.replace(first, left=left, right=right, sizes=(*first.sizes[:-1], sum(p.positions for p in same)))


def with_positions(p: Product, T: int) -> Product:
    """The product of one example, as it is held, with one axis of T positions; those that it does not have are zero."""
    G, _, F, K = p.roles
    left_free, groups = ((), ()) if p.row is not None else (F, G)
    n, label = p.positions, len(p.out)

    def side(a: Array, free: Labels, n: int) -> Array:
        a = a.reshape(*[p.count(groups)] * bool(groups), n, *[p.count(free)] * bool(free))
        at = 1 if groups else 0
        a = jnp.broadcast_to(a, (*a.shape[:at], p.positions, *a.shape[at + 1 :]))
        return jnp.pad(a, [(0, T - p.positions if k == at else 0) for k in range(a.ndim)])

    return dataclasses.replace(
        p,
        left=side(p.left, left_free, n),
        right=side(p.right, K, 1 if p.row is not None and p.repeated else n),
        left_labels=(*groups, label, *left_free),
        right_labels=(*groups, label, *K),
        sizes=(*(p.sizes[x] for x in range(label)), T),
        stepped=False,
    )


def grouped(products: Sequence[Product]) -> tuple[Product, ...]:
    """Join products of one example that differ only in where they start into one, with a group for each of them.

    Loops over experts or stacked layers produce them. Cost: linear in their number; without it, operations on n
    products would take n terms, or n² pairs.
    """
    found = list(products)
    for axis in range(len(found[0].place) if found else 0):
        if len(found) > FEW:
            found = _along(found, axis)
    return tuple(found)


def _along(products: Sequence[Product], k: int) -> list[Product]:
    alike: dict[Any, list[Product]] = {}
    seen: dict[Any, int] = {}
    result: list[Product] = []
    for p in products:
        if p.row is not None or p.windows or p.right is None:
            result.append(p)
            continue
        place = (*p.place[:k], p.place[k]._replace(start=0), *p.place[k + 1 :])
        sides = tuple((a.shape, a.dtype) for a in (p.left, p.right))
        key = (place, p.sizes, p.left_labels, p.right_labels, p.dtype, p.stepped, sides)
        again = (key, p.place[k].start)  # a second product at the same place belongs to a second group
        seen[again] = seen.get(again, -1) + 1
        alike.setdefault((key, seen[again]), []).append(p)
    for same in alike.values():
        for run in _runs(sorted(same, key=lambda p: p.place[k].start), k):
            group = _group(run, k) if len(run) > FEW else None
            result += run if group is None else [group]
    return result


def _runs(products: Sequence[Product], k: int) -> Iterator[list[Product]]:
    """Runs of neighbors at equal distances."""
    starts = [p.place[k].start for p in products]
    run: list[Product] = []
    for i, p in enumerate(products):
        if len(run) > 1 and starts[i] - starts[i - 1] != starts[i - 1] - starts[i - 2]:
            yield run
            run = []
        run.append(p)
    yield run


def _group(run: Sequence[Product], k: int) -> Product | None:
    """The products as one, whose new label is a group; None if their entries lie across each other."""
    first, label = spread(run[0]), len(run[0].sizes)
    axis, sizes = first.place[k], (*first.sizes, len(run))
    distance = run[1].place[k].start - axis.start
    steps = sorted((*axis.steps, (label, distance)), key=lambda step: -abs(step[1]))
    axis = axis._replace(steps=tuple(steps))
    if not is_nested(axis, sizes):
        return None
    left, right = (jnp.stack([getattr(spread(p), name) for p in run]) for name in ("left", "right"))
    group = dataclasses.replace(
        first,
        left=left,
        right=right,
        left_labels=(label, *first.left_labels),
        right_labels=(label, *first.right_labels),
        place=(*first.place[:k], axis, *first.place[k + 1 :]),
        sizes=sizes,
    )
    return arranged(group, first.dtype)
