"""From undone products to factors: what is kept as a product, and what is carried out because it is smaller so.

The cost model, on shapes alone: a parameter's gradient is kept as factors if those hold fewer numbers than it does,
Σ T·(F + K) < F·K for one example, and is formed otherwise. So nothing that is kept is larger than what it stands for.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxgrad.per_example.factors import Dense, Factor, Layout, Outer, Rows
from jaxgrad.per_example.undone import Reason, Term
from jaxgrad.per_example.values import FORMED, Broadcast, Plain, Undone, Value, array_of, is_zero, spread

MERGED = 3  # more products of one layout than this become one, its positions one after another


class Finished(NamedTuple):
    """One parameter's gradient, of one example.

    Attributes:
        factors: without the example axis.
        how: "factored", "formed" (a product, carried out because it is smaller so), "vector" (at most one axis),
            "unused" or "direct" (as vmap(jax.grad) would).
        reason: why it is direct, or what was added to the product.
    """

    factors: tuple[Factor, ...]
    how: str
    reason: Reason | None


def finish(value: Value, shape: tuple[int, ...], dtype: Any) -> Finished:
    """The factors that a gradient is, and why those."""
    size, matrix = math.prod(shape), sum(n != 1 for n in shape) > 1
    if is_zero(value):
        return Finished((_nothing(shape, dtype),), "unused", None)
    if isinstance(value, Broadcast):
        value = spread(value, dtype) or value
    if isinstance(value, Undone) and value.held < size:
        factors = _merged([_factor(term, shape, dtype) for term in value.terms])
        direct = matrix and value.reason not in (None, FORMED)
        return Finished(factors, "direct" if direct else "factored", value.reason if direct else None)
    reason = value.reason if isinstance(value, Plain | Undone) else None
    how = "vector" if not matrix else "formed" if reason in (None, FORMED) else "direct"
    array = array_of(value)
    layout = Layout(shape, jnp.dtype(dtype), tuple(range(len(shape))), (1, 1, size))
    return Finished((Dense(jnp.asarray(array), layout),), how, reason if how == "direct" else None)


def _nothing(shape: tuple[int, ...], dtype: Any) -> Factor:
    """No product at all: a parameter that the loss does not use holds nothing."""
    F, K = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
    layout = Layout(shape, jnp.dtype(dtype), (0, 1), (1, F, K), (F, K))
    return Outer(jnp.zeros((1, 0, F), dtype), jnp.zeros((1, 0, K), dtype), layout)


def _factor(term: Term, shape: tuple[int, ...], dtype: Any) -> Factor:
    kinds = {label: _kind(term, label) for label in term.out}
    if next((kind for kind in kinds.values() if kind != "group"), "left") == "right" and term.row is None:
        term = _turned(term)  # the first free axis of the parameter is left's, so that like lies like
        kinds = {label: _kind(term, label) for label in term.out}
    runs: list[tuple[str, list[int]]] = []
    for label in term.out:
        if runs and runs[-1][0] == kinds[label]:
            runs[-1][1].append(label)
        else:
            runs.append((kinds[label], [label]))
    split = tuple(math.prod(term.size_of(label) for label in labels) for _, labels in runs)
    axes = tuple(k for kind in ("group", "left", "right") for k, run in enumerate(runs) if run[0] == kind)
    G, F, K = ([label for label in term.out if kinds[label] == kind] for kind in ("group", "left", "right"))
    T = [label for label in term.left_labels if label in term.right_labels and label not in kinds]
    count = tuple(math.prod(term.size_of(label) for label in labels) for labels in (G, F, K, T))
    box = None
    if term.box is not None:
        box = tuple((start, n, stride) for (start, stride, _), n in zip(term.box, term.sizes, strict=True))
    layout = Layout(shape, jnp.dtype(dtype), axes, (count[0], count[1], count[2]), split, box)
    if term.row is not None:
        values = _ordered(term.right, term.right_labels, [*T, *K]).reshape(count[3], count[2])
        return Rows(_ordered(term.left, term.left_labels, T).reshape(count[3]), values, layout)
    left = _ordered(term.left, term.left_labels, [*G, *T, *F]).reshape(count[0], count[3], count[1])
    right = _ordered(term.right, term.right_labels, [*G, *T, *K]).reshape(count[0], count[3], count[2])
    return Outer(left, right, layout)


def _kind(term: Term, label: int) -> str:
    if term.row is not None:
        return "left" if label == term.row[0] else "right"
    if label in term.left_labels:
        return "group" if label in term.right_labels else "left"
    return "right"


def _turned(term: Term) -> Term:
    return Term(
        term.right,
        term.left,
        term.right_labels,
        term.left_labels,
        term.dims,
        term.box,
        None,
        term.precision,
        term.reason,
    )


def _ordered(a: Array, labels: Sequence[int], order: Sequence[int]) -> Array:
    """Axes in this order; those that are not in it are summed."""
    gone = [k for k, label in enumerate(labels) if label not in order]
    a = a.sum(gone, dtype=a.dtype) if gone else a
    kept = [label for label in labels if label in order]
    return a.transpose([kept.index(label) for label in order])


def _merged(factors: Sequence[Factor]) -> tuple[Factor, ...]:
    """Many uses of one weight as one factor with their positions one after another, as an unrolled loop has them."""
    alike: dict[Any, list[Factor]] = {}
    for f in factors:
        alike.setdefault((type(f), f.layout), []).append(f)
    merged: list[Factor] = []
    for (kind, layout), same in alike.items():
        if len(same) <= MERGED:
            merged += same
        else:  # positions are the second axis of Outer's arrays, the first of Rows'
            held = [jax.tree.leaves(f) for f in same]
            joined = [_joined(parts, 1 if kind is Outer else 0) for parts in zip(*held, strict=True)]
            merged.append(kind(*joined, layout))
    return tuple(merged)


def _joined(arrays: Sequence[Array], axis: int) -> Array:
    dtype = (
        jnp.result_type(*arrays)
        if len({a.dtype for a in arrays}) == 1
        else jnp.promote_types(max((a.dtype for a in arrays), key=lambda d: d.itemsize), jnp.float32)
    )
    return jnp.concatenate([a.astype(dtype) for a in arrays], axis)
