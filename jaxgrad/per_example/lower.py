"""Convert unevaluated products to factors, and materialize those that are smaller as arrays.

The cost model uses shapes alone: a parameter's gradient is held as factors if they hold fewer numbers than it does,
Σ T·(F + K) < F·K for one example, and is materialized otherwise. So no factors are larger than the gradient they hold.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxgrad.per_example.algebra.boxes import grouped
from jaxgrad.per_example.algebra.factors import Dense, Factor, Outer, Rows, Windows, written_out
from jaxgrad.per_example.algebra.layout import Layout
from jaxgrad.per_example.algebra.mapped import Common, Mapped, Same
from jaxgrad.per_example.algebra.maps import Map, Node, inputs_of
from jaxgrad.per_example.algebra.windows import Unfolding
from jaxgrad.per_example.interpreter.undone import Box, Reason, Term
from jaxgrad.per_example.interpreter.values import (
    FORMED,
    Broadcast,
    Plain,
    Shared,
    Undone,
    Value,
    array_of,
    is_zero,
    spread,
    times_shared,
)
from jaxgrad.precision import added, joined
from jaxgrad.sharding import automatic, merged, spread_over

MERGED = 3  # more products of one layout than this are merged into one, with their positions concatenated


class Lowered(NamedTuple):
    """One parameter's gradient, for one example.

    Attributes:
        factors: the factors, without the example axis.
        how: "factored", "formed" (a product, materialized because the array is smaller), "vector" (at most one axis),
            "unused" or "direct" (computed as vmap(jax.grad) would).
        reason: why the route is direct, or why part of the product was materialized.
    """

    factors: tuple[Factor, ...]
    how: str
    reason: Reason | None


def lower(value: Value, shape: tuple[int, ...], dtype: Any) -> Lowered:
    """The factors of a gradient, and the reason for that choice."""
    size, matrix = math.prod(shape), sum(n != 1 for n in shape) > 1
    if is_zero(value):
        return Lowered((_nothing(shape, dtype),), "unused", None)
    if isinstance(value, Broadcast):
        value = spread(value, dtype) or value
    if isinstance(value, Shared) and matrix:
        value = times_shared(jnp.ones((), value.array.dtype), value.array)
    if isinstance(value, Undone) and value.held < size and (matrix or not value.maps):
        factors = _factors(value.terms, shape, dtype) + _behind_maps(value.maps, shape, dtype)
        direct = matrix and value.reason not in (None, FORMED)
        return Lowered(factors, "direct" if direct else "factored", value.reason if direct else None)
    if isinstance(value, Undone) and value.has_windows:  # `settled` materializes it, several examples at a time
        others = [term for term in value.terms if not term.windows]
        factors = tuple(_factor(term, shape, dtype) for term in value.terms if term.windows)
        factors += _behind_maps(value.maps, shape, dtype)
        factors += (_dense(array_of(Undone(tuple(others), shape, dtype)), shape, dtype),) if others else ()
        return Lowered(factors, "formed" if value.reason in (None, FORMED) else "direct", value.reason)
    reason = value.reason if isinstance(value, Plain | Undone) else None
    how = "vector" if not matrix else "formed" if reason in (None, FORMED) else "direct"
    return Lowered((_dense(array_of(value), shape, dtype),), how, reason if how == "direct" else None)


def factors_of(value: Value, shape: tuple[int, ...], dtype: Any) -> tuple[Factor, ...]:
    """The factors that a gradient is, be they larger than it: for what is asked of them once and not held."""
    matrix = sum(n != 1 for n in shape) > 1
    if isinstance(value, Undone) and not is_zero(value) and (matrix or not value.maps):
        return _factors(value.terms, shape, dtype) + _behind_maps(value.maps, shape, dtype)
    return lower(value, shape, dtype).factors


def settled(factors: tuple[Factor, ...], lowered: Lowered) -> tuple[Factor, ...]:
    """The factors of a batch; convolutions that are smaller as arrays are materialized, a few examples at a time."""
    if is_settled(factors, lowered):
        return factors
    return (Dense.of(_total(factors), factors[0].layout.dtype),)


@automatic(by_example=True)
def _total(factors: tuple[Factor, ...]) -> Array:
    return added([written_out(f) for f in factors])


def is_settled(factors: tuple[Factor, ...], lowered: Lowered) -> bool:
    """Whether there is nothing left to materialize."""
    return lowered.how == "factored" or not any(_has_windows(f) for f in factors)


def _has_windows(f: Factor) -> bool:
    if isinstance(f, Mapped):
        return any(_has_windows(part) for factors in f.inputs for part in factors)
    return isinstance(f, Windows)


def _factors(terms: Sequence[Term], shape: tuple[int, ...], dtype: Any) -> tuple[Factor, ...]:
    return _merged([_factor(term, shape, dtype) for term in terms])


def _behind_maps(nodes: Sequence[Node], shape: tuple[int, ...], dtype: Any) -> tuple[Factor, ...]:
    """One `Common` factor for each scalar input of the maps, and one `Mapped` factor for all their larger inputs."""
    numbers: dict[int, list[Node]] = {}
    larger: list[Node] = []
    for node in nodes:
        inputs = inputs_of([node])
        if len(inputs) == 1 and not isinstance(inputs[0].value, Undone) and inputs[0].value.size == 1:
            numbers.setdefault(id(inputs[0].value), []).append(node)
        else:
            larger.append(node)
    layout = _layout(shape, dtype)
    factors: list[Factor] = []
    for same in numbers.values():
        function, (number,), shared = Map.of(same)
        for part, one in _real_parts(number.value):
            factors.append(Common(part.reshape(()), Same(function([one], shared)), layout))
    if larger:
        function, inputs, shared = Map.of(larger)
        shapes = tuple((tuple(x.value.shape), jnp.dtype(x.value.dtype)) for x in inputs)
        parts = tuple(
            _factors(x.value.terms, *like) if isinstance(x.value, Undone) else (_dense(x.value, *like),)
            for x, like in zip(inputs, shapes, strict=True)
        )
        factors.append(Mapped(parts, Same(tuple(jnp.asarray(a) for a in shared)), function, shapes, layout))
    return tuple(factors)


def _real_parts(number: Any) -> list[tuple[Any, Any]]:
    """[(a, one)] with number = Σ a · one: a map from complex to real numbers is linear only over the real numbers."""
    one = jnp.ones_like(number)
    return [(number.real, one), (number.imag, 1j * one)] if jnp.iscomplexobj(number) else [(number, one)]


def _dense(array: Any, shape: tuple[int, ...], dtype: Any) -> Dense:
    """The gradient of one example as a `Dense` factor."""
    return Dense(jnp.asarray(array), _layout(shape, dtype))


def _layout(shape: tuple[int, ...], dtype: Any) -> Layout:
    return Layout(shape, jnp.dtype(dtype), tuple(range(len(shape))), (1, 1, math.prod(shape)))


def _nothing(shape: tuple[int, ...], dtype: Any) -> Factor:
    """An empty product (T = 0): a parameter that the loss does not use holds nothing."""
    F, K = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
    layout = Layout(shape, jnp.dtype(dtype), (0, 1), (1, F, K), (F, K))
    return Outer(jnp.zeros((1, 0, F), dtype), jnp.zeros((1, 0, K), dtype), layout)


def _factor(term: Term, shape: tuple[int, ...], dtype: Any) -> Factor:
    if term.windows:
        return _windows(term, shape, dtype)
    kinds = {label: _kind(term, label) for label in term.out}
    if next((kind for kind in kinds.values() if kind != "group"), "left") == "right" and term.row is None:
        term = _turned(term)  # left gets the parameter's first free axis, so that like terms have one layout
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
    divided = {*_divided(term.left, term.left_labels), *_divided(term.right, term.right_labels)}
    T.sort(key=lambda label: label not in divided)  # sharded labels come first, so merging them moves no data
    count = tuple(math.prod(term.size_of(label) for label in labels) for labels in (G, F, K, T))
    layout = Layout(shape, jnp.dtype(dtype), axes, (count[0], count[1], count[2]), split, _box(term))
    if term.row is not None:
        ids, values = _ordered(term.left, term.left_labels, T), _ordered(term.right, term.right_labels, [*T, *K])
        if any(n != 1 for n in values.shape[: len(T)]):
            values = jnp.broadcast_to(values, (*ids.shape, *values.shape[len(T) :]))
        return Rows(merged(ids, len(T)), merged(values, len(T), len(K)), layout)
    left = merged(_ordered(term.left, term.left_labels, [*G, *T, *F]), len(G), len(T), len(F))
    right = merged(_ordered(term.right, term.right_labels, [*G, *T, *K]), len(G), len(T), len(K))
    return Outer(left, right, layout, term.stepped)


def _windows(term: Term, shape: tuple[int, ...], dtype: Any) -> Windows:
    """A convolution term as a factor; K runs over the kernel's entries, then over the image's other free axes."""
    places = [w.place for w in term.windows]
    shared = [label for label in term.left_labels if label in term.right_labels]
    G, C = [label for label in shared if label in term.out], [label for label in shared if label not in term.out]
    F = [label for label in term.left_labels if label in term.out and label not in G]
    N = [label for label in term.right_labels if label in term.out and label not in G]
    order = [*G, *F, *places, *N]
    positions, spatial = [w.position for w in term.windows], [w.axis for w in term.windows]
    count = tuple(math.prod(term.size_of(label) for label in labels) for labels in (G, F, [*places, *N]))
    split = tuple(term.size_of(label) for label in term.out)
    axes = tuple(term.out.index(label) for label in order)
    layout = Layout(shape, jnp.dtype(dtype), axes, (count[0], count[1], count[2]), split, _box(term))

    def runs(labels: Sequence[int], *parts: list[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return tuple(labels.index(label) for part in parts for label in part), tuple(len(part) for part in parts)

    unfolding = Unfolding(
        runs(term.left_labels, G, C, positions, F),
        runs(term.right_labels, G, C, spatial, N),
        tuple(w.window for w in term.windows),
    )
    return Windows(term.left, term.right, unfolding, layout)


def _box(term: Term) -> Box | None:
    """(start, size, stride) along each axis of the parameter; None if the term covers the whole parameter."""
    if term.box is None:
        return None
    return tuple((start, n, stride) for (start, stride, _), n in zip(term.box, term.sizes, strict=True))


def _kind(term: Term, label: int) -> str:
    if term.row is not None:
        return "left" if label == term.row[0] else "right"
    if label in term.left_labels:
        return "group" if label in term.right_labels else "left"
    return "right"


def _turned(term: Term) -> Term:
    return dataclasses.replace(
        term,
        left=term.right,
        right=term.left,
        left_labels=term.right_labels,
        right_labels=term.left_labels,
    )


def _divided(a: Array, labels: Sequence[int]) -> list[int]:
    return [label for label, on in zip(labels, spread_over(a), strict=True) if on]


def _ordered(a: Array, labels: Sequence[int], order: Sequence[int]) -> Array:
    """The array with its axes in this order; axes whose labels are not in `order` are summed."""
    gone = [k for k, label in enumerate(labels) if label not in order]
    a = a.sum(gone, dtype=a.dtype) if gone else a
    kept = [label for label in labels if label in order]
    return a.transpose([kept.index(label) for label in order])


def _merged(factors: Sequence[Factor]) -> tuple[Factor, ...]:
    """Merge many uses of one weight, as in an unrolled loop, into one factor with their positions concatenated."""
    alike: dict[Any, list[Factor]] = {}
    found: list[Factor] = []
    for f in factors:
        if isinstance(f, Windows) or (isinstance(f, Rows) and f.values.shape[0] != f.ids.shape[0]):
            found.append(f)  # merged, it would hold more
        else:
            alike.setdefault((type(f), f.layout), []).append(f)
    for (kind, layout), same in alike.items():
        if len(same) <= MERGED:
            found += same
        else:  # positions are the second axis of Outer's arrays, the first of Rows'
            held = [jax.tree.leaves(f) for f in same]
            sides = [joined(parts, 1 if kind is Outer else 0) for parts in zip(*held, strict=True)]
            found.append(kind(*sides, layout))
    return grouped(found)
