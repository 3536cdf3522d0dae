"""Biases that are one Kronecker block with their weights: which they are, and the matrix of the two."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxgrad.errors import caller
from jaxgrad.per_example.algebra.layout import Layout
from jaxgrad.per_example.algebra.place import Labels, Place, labels_of, whole
from jaxgrad.per_example.algebra.product import Product
from jaxgrad.per_example.interpreter import views
from jaxgrad.per_example.interpreter.measuring import Item, sums_over_positions
from jaxgrad.per_example.interpreter.values import Unevaluated, Value, array_of, own_array


@dataclass(frozen=True)
class Bias:
    """A bias that is one block with its weight: the last column of [G, F, K + 1].

    Attributes:
        path: where it is in the parameters, as `jax.tree_util.keystr` writes it.
        layout: where the entries of [G, F, 1] are in it.

    Example:
        >>> loss = lambda p, x: jnp.tanh(p["W"] @ x + p["b"]).sum()
        >>> params = {"W": jnp.ones((16, 9)), "b": jnp.ones(16)}
        >>> bias = jg.curvature.kfac(loss)(params, jnp.ones((4, 9)))["W"].bias
        >>> bias.path, bias.layout.matrix
        ("['b']", (1, 16, 1))
    """

    path: str
    layout: Layout


# --- The matrix of a weight and its bias ---------------------------------------------------------------------------


def to_matrix(layout: Layout, bias: Bias | None, parts: Sequence[Array]) -> Array:
    """(W [*batch, *shape], b [*batch, *shape] if there is a bias) → [*batch, G, F, K or K + 1]."""
    if bias is None:
        return layout.to_matrix(parts[0])
    weight, column = layout.to_matrix(parts[0]), bias.layout.to_matrix(parts[1])
    return jnp.concatenate([weight, column.astype(weight.dtype)], -1)


def from_matrix(layout: Layout, bias: Bias | None, matrix: Array) -> list[Array]:
    """The reverse; what is outside of the layouts is zero."""
    if bias is None:
        return [layout.from_matrix(matrix)]
    return [layout.from_matrix(matrix[..., :-1]), bias.layout.from_matrix(matrix[..., -1:])]


def with_outside(
    layout: Layout, bias: Bias | None, found: Array, inside: Array, outside: Array, parts: Sequence[Array]
) -> list[Array]:
    """`found` in the layouts, and outside of them `outside` times the parts, whose entries in the layouts `inside` are.

    No operation is added where the layouts are all of the parameters, as they usually are.
    """
    if inside.size == sum(part.size for part in parts):
        return from_matrix(layout, bias, found)
    inner = from_matrix(layout, bias, found - outside * inside)
    return [a + outside * part for a, part in zip(inner, parts, strict=True)]


def checked_parts(layout: Layout, bias: Bias | None, V: Any) -> list[Array]:
    """[V], or the two arrays of a pair V if there is a bias; raise ValueError for anything else."""
    shapes = [layout.shape] + ([] if bias is None else [bias.layout.shape])
    parts = [V] if bias is None else list(V) if isinstance(V, tuple | list) else [V]
    got = [np.shape(part) if not isinstance(part, tuple | list) else "a pair" for part in parts]
    if got != shapes:
        expected = f"an array of shape {shapes[0]}"
        if bias is not None:
            expected = f"a pair for the weight and its bias {bias.path}, of the shapes {shapes[0]} and {shapes[1]}"
        raise ValueError(f"{caller()}: expected {expected}, got {', '.join(map(str, got))}.")
    return [jnp.asarray(part) for part in parts]


# --- Finding biases ------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """The bias of a weight.

    Attributes:
        gradient: which of the gradients is the bias's.
        left: whether the cotangents are the left sides of the weight's products, as they are held.
        layout: where the entries of [G, F, 1] are in the bias, if F are the cotangents' axes.
    """

    gradient: int
    left: bool
    layout: Layout


def biases(items: Sequence[Item], paths: Sequence[str]) -> dict[int, Found]:
    """For each gradient that is a weight's, that of its bias: the sum of the weight's cotangents over all positions.

    A bias that fits several weights goes to the one whose path has the longest beginning in common with the bias's.

    Args:
        items: gradients that are complete at the same place; inside `views.recording`.
        paths: the path of each parameter.
    """
    values = [value for value, *_ in items]
    sums = {k: of_value for k, value in enumerate(values) if (of_value := _sums(value))}
    with_array: dict[int, list[int]] = {}
    for b, of_value in sums.items():
        for s in of_value:
            with_array.setdefault(id(views.origin(s.array)[0]), []).append(b)
    pairs = [
        (w, b)
        for w, value in enumerate(values)
        if isinstance(value, Unevaluated) and value.terms and not value.maps and w not in sums
        for side in (value.terms[0].left, value.terms[0].right)
        for b in (with_array.get(id(views.origin(side)[0]), ()) if side is not None else ())
    ]
    found: dict[int, Found] = {}
    for w, b in sorted(pairs, key=lambda pair: -_in_common(paths[pair[0]], paths[pair[1]])):
        if w in found or any(b == other.gradient for other in found.values()):
            continue
        match = _matched(values[w].terms, sums[b], items[b][2])
        if match is not None:
            found[w] = Found(b, *match)
    return found


def _in_common(path: str, path_: str) -> int:
    """How many characters two paths have in common at their beginning."""
    return next((k for k, (a, b) in enumerate(zip(path, path_, strict=False)) if a != b), len(path))


@dataclass(frozen=True, eq=False)
class _Sum:
    """An array that is summed over some axes, and where the others are in a bias."""

    array: Array
    labels: Labels  # of its axes
    place: Place
    sizes: tuple[int, ...]


def _sums(value: Value) -> list[_Sum] | None:
    """The gradient as sums of arrays over positions; None if it is not."""
    if isinstance(value, Unevaluated) and sums_over_positions(value) and not value.maps:
        return [_Sum(p.left, p.left_labels, p.place, p.sizes) for p in value.terms]
    if isinstance(value, Unevaluated) and sum(n != 1 for n in value.shape) < 2:
        value = array_of(value)  # part of a cotangent may be a product, such as that of a lookup
    array = own_array(value)
    if array is None or np.ndim(array) == 0:
        return None
    place, sizes = whole(array.shape)
    labels = iter(range(len(sizes)))
    return [_Sum(array, tuple(next(labels) if n != 1 else -1 for n in array.shape), place, sizes)]


def _matched(products: Sequence[Product], sums: Sequence[_Sum], dtype: Any) -> tuple[bool, Layout] | None:
    """(whether left, layout), as in `Found`, if the sums are those of the products' sides, one for each product."""
    if len(products) != len(sums):
        return None
    rest, found = list(sums), []
    for p in products:
        match = next(((s, side) for s in rest if (side := _same_side(p, s, dtype)) is not None), None)
        if match is None:
            return None
        rest = [s for s in rest if s is not match[0]]
        found.append(match[1])
    left, layout = found[0]
    same = all(left == left_ and layout.same_place(layout_) for left_, layout_ in found)
    return found[0] if same and all(p.layout.same_place(products[0].layout) for p in products) else None


def _same_side(p: Product, s: _Sum, dtype: Any) -> tuple[bool, Layout] | None:
    """(whether left, layout), as in `Found`, if the array of s is a side of p that is summed over the same axes."""
    array, axes = views.origin(s.array)
    labels = {axis: x for axis, x in zip(axes, s.labels, strict=True) if axis is not None}
    kept = labels_of(s.place)
    G, _, F, K = p.roles
    sides = [(p.left, p.left_labels, F)] if p.row is None else []
    sides += [(p.right, p.right_labels, K)] if p.right is not None and not p.windows else []
    for side, side_labels, free in sides:
        origin, axes_ = views.origin(side)
        if origin is not array or len(axes_) != len(side_labels):
            continue
        own = {axis: x for axis, x in zip(axes_, side_labels, strict=True) if axis is not None}
        if own.keys() != labels.keys() or any((own[k] in p.out) != (labels[k] in kept) for k in own):
            continue
        renamed = {own[k]: labels[k] for k in own}
        # The order that labels have in an `arranged` product, whose left side has the first of those that are free.
        order = [part if p.windows else sorted(part, key=p.out.index) for part in (G, free)]
        left = bool(p.windows) or next(x for x in p.out if x not in G) in free
        group, delta = (tuple(renamed[x] for x in part) for part in order)
        return left, Layout(s.place, s.sizes, (group, delta, ()), jnp.dtype(dtype))
    return None
