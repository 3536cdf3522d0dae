"""Primitives that rearrange entries: transpose, reshape, slice, pad, concatenate and the like."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxgrad import _jax
from jaxgrad.per_example.algebra.product import Product
from jaxgrad.per_example.interpreter import moves, products
from jaxgrad.per_example.interpreter.reasons import FORMED
from jaxgrad.per_example.interpreter.rules.record import Record, axes_of, each, every, on_first
from jaxgrad.per_example.interpreter.values import Plain, Unevaluated, Value, added, array_of, is_zero, mapped, zero


def _reshape(eqn: _jax.Equation, term: Product) -> Product | None:
    # A reshape's `dimensions` is the order in which the axes are read; a squeeze's lists axes of size 1.
    if eqn.primitive is lax.reshape_p and eqn.params["dimensions"] is not None:
        term = moves.transpose(term, axes_of(eqn, "dimensions"))
    return moves.reshape(term, eqn.outvars[0].aval.shape)


def _broadcast(eqn: _jax.Equation, term: Product) -> Product | None:
    """Broadcast a product; None unless only axes of size 1 are added."""
    out = eqn.outvars[0].aval
    return moves.reshape(term, out.shape) if out.size == math.prod(term.shape) else None


def _keeps_pad(eqn: _jax.Equation, values: Sequence[Value]) -> Sequence[Value] | None:
    value, padding = values
    if not isinstance(value, Unevaluated) or not is_zero(padding):
        return None
    result = each(eqn, value, partial(moves.pad, config=_jax.padding(eqn)))
    return None if result is None else [result]


def _makes_pad(eqn: _jax.Equation, values: Sequence[Value]) -> Product | None:
    """A padded array as a term that holds the array without the zeros."""
    value, padding = values
    if not is_zero(padding):
        return None
    array, reason = jnp.asarray(array_of(value)), value.reason if isinstance(value, Plain) else FORMED
    return moves.pad(products.times_one(array, reason), _jax.padding(eqn)) or None


def _slice(eqn: _jax.Equation, term: Product) -> moves.Moved:
    p = eqn.params
    strides = p["strides"] or [1] * len(term.place)
    return moves.cut_out(term, *([int(k) for k in part] for part in (p["start_indices"], p["limit_indices"], strides)))


def _cut(starts: Sequence[int], limits: Sequence[int]) -> Callable[[Product], Any]:
    return partial(moves.cut_out, starts=starts, limits=limits, strides=[1] * len(starts))


def _split(eqn: _jax.Equation, values: Sequence[Value]) -> Sequence[Value] | None:
    value, axis = values[0], int(eqn.params["axis"])
    results: list[Value] = []
    start = 0
    for k, n in enumerate(eqn.params["sizes"]):
        starts, limits = [0] * len(value.shape), list(value.shape)
        starts[axis], limits[axis] = start, start + int(n)
        start += int(n)
        part = each(eqn, value, _cut(starts, limits), k)
        if part is None:
            return None
        results.append(part)
    return results


def _unstack(eqn: _jax.Equation, values: Sequence[Value]) -> Sequence[Value] | None:
    value, axis = values[0], int(eqn.params["axis"])
    results: list[Value] = []
    for k, v in enumerate(eqn.outvars):
        starts, limits = [0] * len(value.shape), list(value.shape)
        starts[axis], limits[axis] = k, k + 1
        cut = each(eqn, value, _cut(starts, limits), k)
        part = None if cut is None else each(eqn, cut, partial(moves.reshape, shape=v.aval.shape), k)
        if part is None:
            return None
        results.append(part)
    return results


def _stack(eqn: _jax.Equation, values: Sequence[Value]) -> Sequence[Value] | None:
    """Put each operand at its index along a new axis of zeros."""
    axis, out = int(eqn.params["axis"]), eqn.outvars[0].aval
    total: Value = zero(out.shape, out.dtype)
    for k, value in enumerate(values):
        if is_zero(value):
            continue
        if not isinstance(value, Unevaluated):
            return None
        shape = [1 if d == axis else n for d, n in enumerate(out.shape)]
        edges = [(k, len(values) - 1 - k, 0) if d == axis else (0, 0, 0) for d in range(len(shape))]
        placed = mapped(value, tuple(shape), out.dtype, partial(moves.reshape, shape=shape))
        placed = None if placed is None else each(eqn, placed, partial(moves.pad, config=edges))
        if placed is None:
            return None
        total = added(total, placed)
    return [total]


def _concatenate(eqn: _jax.Equation, values: Sequence[Value]) -> Sequence[Value] | None:
    axis, out = int(eqn.params["dimension"]), eqn.outvars[0].aval
    total: Value = zero(out.shape, out.dtype)
    start = 0
    for v, value in zip(eqn.invars, values, strict=True):
        n = v.aval.shape[axis]
        edges = [(start, out.shape[axis] - start - n, 0) if k == axis else (0, 0, 0) for k in range(len(out.shape))]
        start += n
        if is_zero(value):
            continue
        placed = each(eqn, value, partial(moves.pad, config=edges)) if isinstance(value, Unevaluated) else None
        if placed is None:
            return None
        total = added(total, placed)
    return [total]


RECORDS = {
    lax.transpose_p: Record(on_first(lambda eqn, term: moves.transpose(term, axes_of(eqn, "permutation")), True)),
    lax.reshape_p: Record(on_first(_reshape)),
    lax.squeeze_p: Record(on_first(_reshape)),
    lax.broadcast_in_dim_p: Record(on_first(_broadcast)),
    lax.rev_p: Record(on_first(lambda eqn, term: moves.reverse(term, axes_of(eqn, "dimensions")))),
    lax.slice_p: Record(on_first(_slice)),
    lax.pad_p: Record(_keeps_pad, makes=_makes_pad, linear=lambda eqn: range(2)),
    lax.split_p: Record(_split),
    lax.concatenate_p: Record(_concatenate, operands=every),
}
if _jax.unstack_p is not None:
    RECORDS |= {_jax.unstack_p: Record(_unstack), _jax.stack_p: Record(_stack, operands=every)}
