"""The primitives that end a matrix's gradient: their result is a product, and stays one."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxgrad import _jax
from jaxgrad.per_example.algebra.windows import Window
from jaxgrad.per_example.interpreter import moves, undone
from jaxgrad.per_example.interpreter.undone import Term, Unfolded
from jaxgrad.per_example.interpreter.values import (
    FORMED,
    Broadcast,
    Plain,
    Undone,
    Value,
    array_of,
    as_broadcast,
    is_zero,
    nonempty,
)


def _dot_general(eqn: _jax.Equation, values: Sequence[Value]) -> Term | None:
    p = eqn.params
    (lhs_c, rhs_c), (lhs_b, rhs_b) = p["dimension_numbers"]
    contracted, batch = list(zip(lhs_c, rhs_c, strict=True)), list(zip(lhs_b, rhs_b, strict=True))
    left, right = (jnp.asarray(array_of(value)) for value in values)
    return undone.product(left, right, contracted, batch, p["precision"])


def _outer(eqn: _jax.Equation, values: Sequence[Value]) -> Term | None:
    """mul of a column and a row, both broadcast: an elementwise outer product."""
    a, b = (as_broadcast(value) for value in values)
    shape = tuple(eqn.outvars[0].aval.shape)
    if a is None or b is None or not len(a.shape) == len(b.shape) == len(shape):
        return None
    if not set(a.varies) - set(b.varies) or not set(b.varies) - set(a.varies):
        return None
    if any(n != 1 and k not in a.varies and k not in b.varies for k, n in enumerate(shape)):
        return None
    both = [(a.varies.index(k), b.varies.index(k)) for k in a.varies if k in b.varies]
    term = undone.product(jnp.asarray(a.compact), jnp.asarray(b.compact), [], both)
    order = [k for k in a.varies if k in b.varies]
    order += [k for k in a.varies if k not in b.varies] + [k for k in b.varies if k not in a.varies]
    dims = dict(zip(order, term.dims, strict=True))
    return undone.replace(term, dims=tuple(dims.get(k, ()) for k in range(len(shape))))


def _scatter_add(eqn: _jax.Equation, values: Sequence[Value]) -> Term | None:
    """Rows added to a table of zeros at one index each, along any one axis."""
    operand, indices, updates = values
    shape, window, axes = eqn.outvars[0].aval.shape, _jax.scatter_window(eqn), _jax.scatter_axes(eqn)
    if not is_zero(operand) or window is None:
        return None
    added = _once_for_all_positions(updates, [k for k in window if k is not None])
    sizes = [1 if k is None else added.shape[k] for k in window]
    axis = next((k for k, (n, m) in enumerate(zip(shape, sizes, strict=True)) if n != m), axes[0])
    clipped = _jax.scatter_clips(eqn)
    if axis not in axes or sizes[axis] != 1:
        return None
    if any(n != m for k, (n, m) in enumerate(zip(shape, sizes, strict=True)) if k != axis):
        return None
    index = jnp.asarray(array_of(indices))
    ids = index[..., axes.index(axis)]
    if clipped:
        ids = jnp.clip(ids, 0, shape[axis] - 1)
    elif len(axes) > 1:  # an axis that is there as a whole has room for index 0 alone
        others = jnp.stack([index[..., k] == 0 for k in range(len(axes)) if axes[k] != axis]).all(0)
        ids = jnp.where(others, ids, jnp.full_like(ids, shape[axis]))
    positions = [k for k in range(added.ndim) if k not in window]
    dims = [None if k == axis else window[k] for k in range(len(shape))]
    spare = window[axis]
    if spare is not None:  # an axis of size 1 for the row that is added
        added = added.reshape([n for k, n in enumerate(added.shape) if k != spare])
        shift = lambda k: k if k is None or k < spare else k - 1  # noqa: E731
        positions, dims = [shift(k) for k in positions], [shift(k) for k in dims]
    if any(k is None for j, k in enumerate(dims) if j != axis):  # an axis of size 1 that the updates do not have
        return None
    return undone.lookup(ids, added, positions, dims, shape[axis])


def _once_for_all_positions(updates: Value, window: Sequence[int]) -> Array:
    """The updates, with size 1 along the positions if they are the same at all of them (a mean of embeddings)."""
    if not isinstance(updates, Broadcast) or not set(updates.varies) <= set(window):
        return jnp.asarray(array_of(updates))
    sizes = [n if k in window else 1 for k, n in enumerate(updates.shape)]
    return lax.broadcast_in_dim(jnp.asarray(updates.source), sizes, updates.dims)


def _dynamic_update_slice(eqn: _jax.Equation, values: Sequence[Value]) -> Term | None:
    """One row put into a table of zeros, along any one axis."""
    operand, update, *starts = values
    shape, part = eqn.outvars[0].aval.shape, eqn.invars[1].aval.shape
    axes = [k for k, (n, m) in enumerate(zip(shape, part, strict=True)) if n != m]
    if not is_zero(operand) or len(axes) != 1 or part[axes[0]] != 1:
        return None
    axis = axes[0]
    ids = jnp.clip(jnp.asarray(array_of(starts[axis])), 0, shape[axis] - 1)[None]
    dims = [None if k == axis else k for k in range(len(shape))]
    return undone.lookup(ids, jnp.asarray(array_of(update)), [axis], dims, shape[axis])


def _pad(eqn: _jax.Equation, values: Sequence[Value]) -> Term | None:
    """What is put into zeros is held without them."""
    value, padding = values
    if not is_zero(padding):
        return None
    array, reason = jnp.asarray(array_of(value)), value.reason if isinstance(value, Plain) else FORMED
    return moves.pad(undone.carried_out(array, reason), _jax.padding(eqn))


def _convolution(eqn: _jax.Equation, values: Sequence[Value]) -> Term | None:
    """The gradient of a kernel: the cotangents slide over the image, and each place of the kernel is a product.

    Under vmap a convolution of two batched operands would become one with a group for each example.
    """
    p, out = eqn.params, eqn.outvars[0].aval
    image, cotangent = (jnp.asarray(array_of(value)) for value in values)
    numbers, groups, batch_groups = p["dimension_numbers"], p["feature_group_count"], p["batch_group_count"]
    (n, c, *spatial), (o, i, *window) = numbers.lhs_spec, numbers.rhs_spec
    places = [out.shape[k] for k in numbers.out_spec[2:]]
    positions, N = [cotangent.shape[k] for k in window], image.shape[n] // batch_groups
    if 0 in (image.size, cotangent.size) or not places or (groups > 1 and batch_groups > 1):
        return None
    if N == 1 and cotangent.shape[i] > 1 and math.prod(places) > math.prod(positions):
        return None  # the gradient of an image
    G, C, free, F = range(4)
    S = range(len(places))
    at, place, axis = (range(4 + k * len(S), 4 + (k + 1) * len(S)) for k in range(3))  # labels
    left, left_labels = _divided(
        cotangent, {o: (groups * batch_groups, G, F), i: (1, G, C)} | {k: (1, G, at[d]) for d, k in enumerate(window)}
    )
    right, right_labels = _divided(
        image,
        {n: (batch_groups, G, free), c: (groups, G, C)} | {k: (1, G, axis[d]) for d, k in enumerate(spatial)},
    )
    if G not in right_labels:
        right, right_labels = right[None], (G, *right_labels)
    if G not in left_labels:
        left, left_labels = left[None], (G, *left_labels)
    result: dict[int, tuple[int, ...]] = dict(
        zip(numbers.out_spec, [(free,), (G, F), *((k,) for k in place)], strict=True)
    )
    edges = [(lo, hi, d - 1) for (lo, hi), d in zip(p["padding"], p["lhs_dilation"], strict=True)]
    shapes = zip(places, positions, p["window_strides"], p["rhs_dilation"], edges, strict=True)
    windows = tuple(Unfolded(axis[d], place[d], at[d], Window(*shape)) for d, shape in enumerate(shapes))
    dims = tuple(result[k] for k in range(out.ndim))
    return Term(left, right, left_labels, right_labels, dims, windows=windows, precision=p["precision"])


def _divided(a: Array, parts: dict[int, tuple[int, int, int]]) -> tuple[Array, tuple[int, ...]]:
    """Axes by (number of groups, label of the group, label of the rest), in their order; an axis for more than one."""
    shape: list[int] = []
    labels: list[int] = []
    for k, n in enumerate(a.shape):
        groups, group, rest = parts[k]
        if groups > 1:
            shape, labels = [*shape, groups], [*labels, group]
        shape, labels = [*shape, n // groups], [*labels, rest]
    return a.reshape(shape), tuple(labels)


PRODUCTS: dict[Any, Callable[[_jax.Equation, Sequence[Value]], Term | None]] = {
    lax.dot_general_p: _dot_general,
    lax.mul_p: _outer,
    lax.scatter_add_p: _scatter_add,
    lax.dynamic_update_slice_p: _dynamic_update_slice,
    lax.conv_general_dilated_p: _convolution,
    lax.pad_p: _pad,
}


def undone_product(eqn: _jax.Equation, values: Sequence[Value]) -> Undone | Plain | None:
    """The equation's result as a product, or formed if that is the smaller thing; None if it is neither."""
    make, out = PRODUCTS.get(eqn.primitive), eqn.outvars[0].aval
    if make is None or out.size == 0 or not jnp.issubdtype(out.dtype, jnp.inexact):
        return None
    term = make(eqn, values)
    if term is None:
        return None
    if term.windows or term.held < out.size:
        return Undone(nonempty([term]), tuple(out.shape), out.dtype)
    return Plain(_jax.bind(eqn, [array_of(value) for value in values])[0], FORMED)
