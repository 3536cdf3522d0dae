"""One rule per primitive: what it does to an undone product. A rule that cannot say so returns None.

Rules are keyed by the primitive object. A primitive that is not here is evaluated, never guessed.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jaxgrad import _jax
from jaxgrad.per_example.interpreter import linear, moves, through, undone
from jaxgrad.per_example.interpreter.undone import Term
from jaxgrad.per_example.interpreter.values import (
    Broadcast,
    Undone,
    Value,
    added,
    array_of,
    as_broadcast,
    is_shared,
    is_zero,
    mapped,
    zero,
)
from jaxgrad.precision import working_dtype

Rule = Callable[[_jax.Equation, Sequence[Value]], Sequence[Value] | None]


def _each(
    eqn: _jax.Equation, value: Undone, function: Callable[[Term], Any], out: int = 0, on_windows: bool = False
) -> Undone | None:
    aval = eqn.outvars[out].aval
    return mapped(value, aval.shape, aval.dtype, function, on_windows)


def _on_first(function: Callable[[_jax.Equation, Term], Any], on_windows: bool = False) -> Rule:
    """A rule for a primitive with one result, that moves about its first operand."""

    def rule(eqn: _jax.Equation, values: Sequence[Value]) -> Sequence[Value] | None:
        if not isinstance(values[0], Undone):
            return None
        result = _each(eqn, values[0], lambda term: function(eqn, term), on_windows=on_windows)
        return None if result is None else [result]

    return rule


def _axes(eqn: _jax.Equation, name: str) -> list[int]:
    """Axes in the params; NumPy's integers are allowed there."""
    return [int(k) for k in eqn.params[name]]


def _reshape(eqn: _jax.Equation, term: Term) -> Term | None:
    # The order in which the axes are read; a squeeze's are those of size 1.
    if eqn.primitive is lax.reshape_p and eqn.params["dimensions"] is not None:
        term = moves.transpose(term, _axes(eqn, "dimensions"))
    return moves.reshape(term, eqn.outvars[0].aval.shape)


def _broadcast(eqn: _jax.Equation, term: Term) -> Term | None:
    """Only where axes of size 1 are added."""
    out = eqn.outvars[0].aval
    return moves.reshape(term, out.shape) if out.size == np.prod(term.shape) else None


def _cast(eqn: _jax.Equation, term: Term) -> Term | None:
    """Nothing is rounded: the operands keep their digits."""
    before, after = (jnp.issubdtype(v.aval.dtype, jnp.complexfloating) for v in (eqn.invars[0], eqn.outvars[0]))
    return term if before == after and jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.inexact) else None


def _pad(eqn: _jax.Equation, values: Sequence[Value]) -> Sequence[Value] | None:
    value, padding = values
    if not isinstance(value, Undone) or not is_zero(padding):
        return None
    result = _each(eqn, value, partial(moves.pad, config=_jax.padding(eqn)))
    return None if result is None else [result]


def _slice(eqn: _jax.Equation, term: Term) -> tuple[Term, ...] | None:
    p = eqn.params
    strides = p["strides"] or [1] * len(term.dims)
    return moves.cut_out(term, *([int(k) for k in part] for part in (p["start_indices"], p["limit_indices"], strides)))


def _cut(starts: Sequence[int], limits: Sequence[int]) -> Callable[[Term], Any]:
    return partial(moves.cut_out, starts=starts, limits=limits, strides=[1] * len(starts))


def _split(eqn: _jax.Equation, values: Sequence[Value]) -> Sequence[Value] | None:
    value, axis = values[0], int(eqn.params["axis"])
    results: list[Value] = []
    start = 0
    for k, n in enumerate(eqn.params["sizes"]):
        starts, limits = [0] * len(value.shape), list(value.shape)
        starts[axis], limits[axis] = start, start + int(n)
        start += int(n)
        part = _each(eqn, value, _cut(starts, limits), k)
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
        cut = _each(eqn, value, _cut(starts, limits), k)
        part = None if cut is None else _each(eqn, cut, partial(moves.reshape, shape=v.aval.shape), k)
        if part is None:
            return None
        results.append(part)
    return results


def _stack(eqn: _jax.Equation, values: Sequence[Value]) -> Sequence[Value] | None:
    """Each is put at its place along a new axis of zeros."""
    axis, out = int(eqn.params["axis"]), eqn.outvars[0].aval
    total: Value = zero(out.shape, out.dtype)
    for k, value in enumerate(values):
        if is_zero(value):
            continue
        if not isinstance(value, Undone):
            return None
        shape = [1 if d == axis else n for d, n in enumerate(out.shape)]
        edges = [(k, len(values) - 1 - k, 0) if d == axis else (0, 0, 0) for d in range(len(shape))]
        placed = mapped(value, tuple(shape), out.dtype, partial(moves.reshape, shape=shape))
        placed = None if placed is None else _each(eqn, placed, partial(moves.pad, config=edges))
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
        placed = _each(eqn, value, partial(moves.pad, config=edges)) if isinstance(value, Undone) else None
        if placed is None:
            return None
        total = added(total, placed)
    return [total]


def _add(eqn: _jax.Equation, values: Sequence[Value]) -> Sequence[Value] | None:
    if any(v.aval.shape != eqn.outvars[0].aval.shape for v in eqn.invars):
        return None
    return [added(*values)]


def _sub(eqn: _jax.Equation, values: Sequence[Value]) -> Sequence[Value] | None:
    first, second = values
    if not isinstance(second, Undone) or any(v.aval.shape != eqn.outvars[0].aval.shape for v in eqn.invars):
        return None
    negative = _each(eqn, second, lambda term: linear.on_smaller(term, lax.neg), on_windows=True)
    return None if negative is None else [added(first, negative)]


def _scaled(term: Term, other: Broadcast, operation: Callable[[Any, Any], Any]) -> Term | None:
    """operation(term, other), entry by entry, where other varies along axes of one operand only."""

    def apply(a: Any, b: Any) -> Any:
        if a.dtype != b.dtype:
            dtype = working_dtype(a.dtype, b.dtype)
            a, b = a.astype(dtype), b.astype(dtype)
        return operation(a, jnp.broadcast_to(b, a.shape))

    value = jnp.asarray(other.compact)
    if not other.varies:
        return linear.on_smaller(term, lambda a: apply(a, value))
    side = linear.aligned(term, value, other.varies)
    if side is None:
        return None
    name, value = side
    return undone.replace(term, **{name: apply(getattr(term, name), value)})


def _mul(eqn: _jax.Equation, values: Sequence[Value]) -> Sequence[Value] | None:
    value, other = values if isinstance(values[0], Undone) else values[::-1]
    scale = as_broadcast(other)
    result = (
        None
        if scale is None or value.shape != eqn.outvars[0].aval.shape
        else _each(eqn, value, lambda term: _scaled(term, scale, lax.mul), on_windows=not scale.varies)
    )
    return None if result is None else [result]


def _div(eqn: _jax.Equation, values: Sequence[Value]) -> Sequence[Value] | None:
    value, scale = values[0], as_broadcast(values[1])
    if not isinstance(value, Undone) or scale is None or value.shape != eqn.outvars[0].aval.shape:
        return None
    result = _each(eqn, value, lambda term: _scaled(term, scale, lax.div), on_windows=not scale.varies)
    return None if result is None else [result]


def _select(eqn: _jax.Equation, values: Sequence[Value]) -> Sequence[Value] | None:
    predicate, cases = as_broadcast(values[0]), values[1:]
    out = eqn.outvars[0].aval
    if predicate is None:
        return None
    total: Value = zero(out.shape, out.dtype)
    for k, case in enumerate(cases):
        if is_zero(case):
            continue
        if not isinstance(case, Undone):
            return None
        which = jnp.asarray(predicate.compact)
        keep = which == k if which.dtype != bool else which if k else jnp.logical_not(which)
        mask = partial(_masked, keep=keep, varies=predicate.varies)
        kept = _each(eqn, case, mask, on_windows=not predicate.varies)
        if kept is None:
            return None
        total = added(total, kept)
    return [total]


def _masked(term: Term, keep: Any, varies: tuple[int, ...]) -> Term | None:
    if not varies:  # both operands, so that nothing of what is dropped is left, NaN or not
        left = term.left if term.row else jnp.where(keep, term.left, jnp.zeros_like(term.left))
        return undone.replace(term, left=left, right=jnp.where(keep, term.right, jnp.zeros_like(term.right)))
    side = linear.aligned(term, keep, varies)
    if side is None:
        return None
    name, mask = side
    operand = getattr(term, name)
    return undone.replace(term, **{name: jnp.where(mask, operand, jnp.zeros_like(operand))})


def _dot_general(eqn: _jax.Equation, values: Sequence[Value]) -> Sequence[Value] | None:
    """A product with a matrix: it moves onto one operand."""
    (lhs_c, rhs_c), (lhs_b, rhs_b) = eqn.params["dimension_numbers"]
    first = isinstance(values[0], Undone)
    value, other = values if first else values[::-1]
    if isinstance(other, Undone) or any(term.carried for term in value.terms):
        return None  # an array times a matrix is a product of its own
    contracted = list(zip(lhs_c, rhs_c, strict=True) if first else zip(rhs_c, lhs_c, strict=True))
    batch = list(zip(lhs_b, rhs_b, strict=True) if first else zip(rhs_b, lhs_b, strict=True))
    C, precision = jnp.asarray(array_of(other)), eqn.params["precision"]
    result = _each(eqn, value, lambda term: linear.contract(term, C, contracted, batch, first, precision))
    return None if result is None else [result]


def _dynamic_update_slice(eqn: _jax.Equation, values: Sequence[Value]) -> Sequence[Value] | None:
    operand, update, *starts = values
    if not is_zero(operand) or not isinstance(update, Undone):
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


def _scatter_add(eqn: _jax.Equation, values: Sequence[Value]) -> Sequence[Value] | None:
    """One block put at one index: the transpose of taking a part at an index that depends on the example."""
    operand, indices, update = values
    index, window = jnp.asarray(array_of(indices)), _jax.scatter_window(eqn)
    if not is_zero(operand) or not isinstance(update, Undone) or window is None:
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
    eqn: _jax.Equation, index: Array, update: Undone, window: Sequence[int | None]
) -> Sequence[Value] | None:
    """A product at every position, each put at an index of its own, as an expert for every token is: with one-hot
    vectors beside the smaller operand. Only where that is less than the products carried out."""
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

    def placed(term: Term) -> Term | None:
        term_ = linear.contract(term, hot, [(p, i) for i, p in enumerate(positions)], [], True, None)
        return None if term_ is None else moves.transpose(term_, order)

    result = mapped(update, tuple(shape), update.dtype, placed)
    smaller = isinstance(result, Undone) and result.held < min(math.prod(shape), math.prod(update.shape))
    return [result] if smaller else None


RULES: dict[_jax.Primitive, Rule] = {
    lax.transpose_p: _on_first(lambda eqn, term: moves.transpose(term, _axes(eqn, "permutation")), on_windows=True),
    lax.reshape_p: _on_first(_reshape),
    lax.squeeze_p: _on_first(_reshape),
    lax.broadcast_in_dim_p: _on_first(_broadcast),
    lax.convert_element_type_p: _on_first(_cast, on_windows=True),
    **dict.fromkeys(_jax.IDENTITIES, lambda eqn, values: list(values)),
    lax.real_p: _on_first(lambda eqn, term: linear.real(term), on_windows=True),
    lax.imag_p: _on_first(lambda eqn, term: linear.imag(term), on_windows=True),
    lax.conj_p: _on_first(lambda eqn, term: linear.conjugate(term), on_windows=True),
    lax.neg_p: _on_first(lambda eqn, term: linear.on_smaller(term, lax.neg), on_windows=True),
    lax.reduce_sum_p: _on_first(lambda eqn, term: linear.sums(term, _axes(eqn, "axes"))),
    lax.rev_p: _on_first(lambda eqn, term: moves.reverse(term, _axes(eqn, "dimensions"))),
    lax.slice_p: _on_first(_slice),
    lax.pad_p: _pad,
    lax.split_p: _split,
    **({} if _jax.unstack_p is None else {_jax.unstack_p: _unstack, _jax.stack_p: _stack}),
    lax.concatenate_p: _concatenate,
    _jax.add_any_p: _add,
    lax.add_p: _add,
    lax.sub_p: _sub,
    lax.mul_p: _mul,
    lax.div_p: _div,
    lax.select_n_p: _select,
    lax.dot_general_p: _dot_general,
    lax.dynamic_update_slice_p: _dynamic_update_slice,
    lax.scatter_add_p: _scatter_add,
}

# Which operands may be undone products, for the search from the gradients backwards; the first one elsewhere.
_OPERANDS: dict[_jax.Primitive, Callable[[int], range]] = {
    lax.concatenate_p: range,
    **({} if _jax.stack_p is None else {_jax.stack_p: range}),
    _jax.add_any_p: range,
    lax.add_p: range,
    lax.sub_p: range,
    **dict.fromkeys(_jax.IDENTITIES, range),
    lax.mul_p: range,
    lax.dot_general_p: range,
    lax.select_n_p: lambda n: range(1, n),
    lax.dynamic_update_slice_p: lambda n: range(1, 2),
    lax.scatter_add_p: lambda n: range(2, 3),
}

# Where zeros go in, zeros come out.
KEEPS_ZERO = frozenset(RULES) - {lax.mul_p, lax.div_p, lax.dot_general_p, lax.dynamic_update_slice_p, lax.scatter_add_p}


def operands(eqn: _jax.Equation) -> Sequence[int]:
    """The operands of an equation that may stand for undone products."""
    if _jax.kind(eqn) not in RULES:
        return through.operands(eqn)
    return _OPERANDS.get(_jax.kind(eqn), lambda n: range(1))(len(eqn.invars))


def behind(eqn: _jax.Equation, values: Sequence[Value]) -> Sequence[Value] | None:
    """The equation done to the undone products among its operands: by rule, or as a map that all examples share.

    It is linear in them, so that products and maps in a sum are treated one after the other.
    """
    rule = RULES.get(_jax.kind(eqn))
    if not any(isinstance(value, Undone) and value.maps for value in values):
        results = None if rule is None else rule(eqn, values)
        return through.through(eqn, values) if results is None else results
    if eqn.primitive in (lax.add_p, _jax.add_any_p):
        return [added(*values)]
    # What is added to the products and is the same for all examples goes with the maps, and counts once.
    slots = through.operands(eqn) if eqn.primitive not in through.BILINEAR else ()
    products = [
        dataclasses.replace(v, maps=(), as_written=None)
        if isinstance(v, Undone)
        else zero(eqn.invars[k].aval.shape, eqn.invars[k].aval.dtype)
        if k in slots and is_shared(v)
        else v
        for k, v in enumerate(values)
    ]
    maps = [dataclasses.replace(v, terms=(), as_written=None) if isinstance(v, Undone) else v for v in values]
    results = through.through(eqn, maps)
    if results is None or all(is_zero(value) for value in products if isinstance(value, Undone)):
        return results
    others = behind(eqn, products)
    return None if others is None else [added(a, b) for a, b in zip(others, results, strict=True)]
