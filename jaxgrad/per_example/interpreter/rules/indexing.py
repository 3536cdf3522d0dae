"""Slices, gathers and scatters at indices that are known only at run time."""

import math
from collections.abc import Sequence
from functools import partial

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxgrad import _jax
from jaxgrad.per_example.algebra.product import Product
from jaxgrad.per_example.interpreter import linear, moves, products
from jaxgrad.per_example.interpreter.cost_model import worth_holding
from jaxgrad.per_example.interpreter.rules.record import Record, first
from jaxgrad.per_example.interpreter.values import Broadcast, Unevaluated, Value, array_of, is_zero, mapped


def _keeps_update(eqn: _jax.Equation, values: Sequence[Value]) -> Sequence[Value] | None:
    operand, update, *starts = values
    if not is_zero(operand) or not isinstance(update, Unevaluated):
        return None
    shape = eqn.outvars[0].aval.shape
    for k, (full, n, start) in enumerate(zip(shape, update.shape, starts, strict=True)):
        if n == full:
            continue
        at = jnp.asarray(array_of(start))
        placed = mapped(
            update,
            tuple(full if i == k else m for i, m in enumerate(update.shape)),
            update.dtype,
            partial(linear.embedded, dim=k, start=at, full=full, mode="clip"),
        )
        if placed is None:
            return None
        update = placed
    return [update]


def _makes_update(eqn: _jax.Equation, values: Sequence[Value]) -> Product | None:
    """Put one row into a table of zeros, along any one axis."""
    operand, update, *starts = values
    shape, part = eqn.outvars[0].aval.shape, eqn.invars[1].aval.shape
    axes = [k for k, (n, m) in enumerate(zip(shape, part, strict=True)) if n != m]
    if not is_zero(operand) or len(axes) != 1 or part[axes[0]] != 1:
        return None
    axis = axes[0]
    ids = jnp.clip(jnp.asarray(array_of(starts[axis])), 0, shape[axis] - 1)[None]
    dims = [None if k == axis else k for k in range(len(shape))]
    return products.lookup(ids, jnp.asarray(array_of(update)), [axis], dims, shape[axis])


def _keeps_scatter_add(eqn: _jax.Equation, values: Sequence[Value]) -> Sequence[Value] | None:
    """Put one block at one index: the transpose of a slice at an index that depends on the example."""
    operand, indices, update = values
    index, window = jnp.asarray(array_of(indices)), _jax.scatter_window(eqn)
    if not is_zero(operand) or not isinstance(update, Unevaluated) or window is None:
        return None
    if index.ndim > 1:
        return _put_at_each_position(eqn, index, update, window)
    shape, mode = eqn.outvars[0].aval.shape, "clip" if _jax.scatter_clips(eqn) else "drop"
    sizes = tuple(1 if k is None else update.shape[k] for k in window)
    update = mapped(update, sizes, update.dtype, lambda term: moves.reshape(term, sizes))
    for i, axis in enumerate(_jax.scatter_axes(eqn)):
        if update is None:
            return None
        if update.shape[axis] == shape[axis] and mode == "clip":
            continue
        if update.shape[axis] != 1:
            return None
        sizes = tuple(shape[axis] if k == axis else n for k, n in enumerate(update.shape))
        update = mapped(
            update,
            sizes,
            update.dtype,
            partial(linear.embedded, dim=axis, start=index[i], full=shape[axis], mode=mode),
        )
    return None if update is None or update.shape != tuple(shape) else [update]


def _put_at_each_position(
    eqn: _jax.Equation, index: Array, update: Unevaluated, window: Sequence[int | None]
) -> Sequence[Value] | None:
    """Put a product of every position at an index of its own, as when every token selects an expert: the smaller
    operand is multiplied by one-hot vectors. None unless that is smaller than the materialized products."""
    axes, shape = _jax.scatter_axes(eqn), eqn.outvars[0].aval.shape
    if len(axes) != 1 or window[axes[0]] is not None:
        return None
    ids, rows = index[..., 0], shape[axes[0]]
    ids = jnp.clip(ids, 0, rows - 1) if _jax.scatter_clips(eqn) else ids
    numbers = jnp.arange(rows, dtype=ids.dtype).reshape(*[1] * ids.ndim, rows)
    hot = (ids[..., None] == numbers).astype(update.dtype)
    positions = [k for k in range(len(update.shape)) if k not in window]
    others = [k for k in range(len(update.shape)) if k in window]
    order = [len(others) if k is None else others.index(k) for k in window]  # the rows come last

    def placed(term: Product) -> Product | None:
        term_ = linear.contract(term, hot, [(p, i) for i, p in enumerate(positions)], [], True, None)
        return None if term_ is None else moves.transpose(term_, order)

    result = mapped(update, tuple(shape), update.dtype, placed)
    smaller = result is not None and worth_holding(result.held, min(math.prod(shape), update.size))
    return [result] if smaller else None


def _makes_scatter_add(eqn: _jax.Equation, values: Sequence[Value]) -> Product | None:
    """Add rows to a table of zeros, at one index each, along any one axis."""
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
    elif len(axes) > 1:  # along an axis that the update covers, only index 0 is in range
        others = jnp.stack([index[..., k] == 0 for k in range(len(axes)) if axes[k] != axis]).all(0)
        ids = jnp.where(others, ids, jnp.full_like(ids, shape[axis]))
    positions = [k for k in range(added.ndim) if k not in window]
    dims = [None if k == axis else window[k] for k in range(len(shape))]
    spare = window[axis]
    if spare is not None:  # the updates have an axis of size 1 for the row
        added = added.reshape([n for k, n in enumerate(added.shape) if k != spare])
        shift = lambda k: k if k is None or k < spare else k - 1  # noqa: E731
        positions, dims = [shift(k) for k in positions], [shift(k) for k in dims]
    if any(k is None for j, k in enumerate(dims) if j != axis):  # the updates lack an axis of size 1
        return None
    return products.lookup(ids, added, positions, dims, shape[axis])


def _once_for_all_positions(updates: Value, window: Sequence[int]) -> Array:
    """The updates, with size 1 along the positions if they do not vary over them (as in a mean of embeddings)."""
    if not isinstance(updates, Broadcast) or not set(updates.varies) <= set(window):
        return jnp.asarray(array_of(updates))
    sizes = [n if k in window else 1 for k, n in enumerate(updates.shape)]
    return lax.broadcast_in_dim(jnp.asarray(updates.source), sizes, updates.dims)


RECORDS = {
    lax.dynamic_update_slice_p: Record(
        _keeps_update, _makes_update, lambda eqn: (1,), keeps_zero=False, linear=lambda eqn: range(2)
    ),
    lax.scatter_add_p: Record(
        _keeps_scatter_add, _makes_scatter_add, lambda eqn: (2,), keeps_zero=False, linear=lambda eqn: (0, 2)
    ),
    lax.gather_p: Record(operands=first),
    lax.dynamic_slice_p: Record(operands=first),
}
