"""Elementwise primitives: sums, scaling, masks, and identities."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxgrad import _jax
from jaxgrad.per_example.algebra.place import Axis
from jaxgrad.per_example.algebra.product import Product
from jaxgrad.per_example.interpreter import linear, products
from jaxgrad.per_example.interpreter.rules.record import Record, axes_of, each, every, first, on_first
from jaxgrad.per_example.interpreter.values import Broadcast, Unevaluated, Value, added, as_broadcast, is_zero, zero
from jaxgrad.precision import working_dtype


def _cast(eqn: _jax.Equation, term: Product) -> Product | None:
    """Convert the dtype without rounding: the operands keep their own dtypes."""
    before, after = (jnp.issubdtype(v.aval.dtype, jnp.complexfloating) for v in (eqn.invars[0], eqn.outvars[0]))
    return term if before == after and jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.inexact) else None


def _add(eqn: _jax.Equation, values: Sequence[Value]) -> Sequence[Value] | None:
    if any(v.aval.shape != eqn.outvars[0].aval.shape for v in eqn.invars):
        return None
    return [added(*values)]


def _sub(eqn: _jax.Equation, values: Sequence[Value]) -> Sequence[Value] | None:
    first, second = values
    if not isinstance(second, Unevaluated) or any(v.aval.shape != eqn.outvars[0].aval.shape for v in eqn.invars):
        return None
    negative = each(eqn, second, lambda term: linear.on_smaller(term, lax.neg), on_windows=True)
    return None if negative is None else [added(first, negative)]


def _scaled(term: Product, other: Broadcast, operation: Callable[[Any, Any], Any]) -> Product | None:
    """operation(term, other), elementwise; None if other varies along axes of both operands."""

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
    return dataclasses.replace(term, **{name: apply(getattr(term, name), value)})


def _mul(eqn: _jax.Equation, values: Sequence[Value]) -> Sequence[Value] | None:
    value, other = values if isinstance(values[0], Unevaluated) else values[::-1]
    scale = as_broadcast(other)
    result = (
        None
        if scale is None or value.shape != eqn.outvars[0].aval.shape
        else each(eqn, value, lambda term: _scaled(term, scale, lax.mul), on_windows=not scale.varies)
    )
    return None if result is None else [result]


def _outer(eqn: _jax.Equation, values: Sequence[Value]) -> Product | None:
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
    term = products.product(jnp.asarray(a.compact), jnp.asarray(b.compact), [], both)
    order = [k for k in a.varies if k in b.varies]
    order += [k for k in a.varies if k not in b.varies] + [k for k in b.varies if k not in a.varies]
    axes = dict(zip(order, term.place, strict=True))
    return dataclasses.replace(term, place=tuple(axes.get(k, Axis(1)) for k in range(len(shape))))


def _div(eqn: _jax.Equation, values: Sequence[Value]) -> Sequence[Value] | None:
    value, scale = values[0], as_broadcast(values[1])
    if not isinstance(value, Unevaluated) or scale is None or value.shape != eqn.outvars[0].aval.shape:
        return None
    result = each(eqn, value, lambda term: _scaled(term, scale, lax.div), on_windows=not scale.varies)
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
        if not isinstance(case, Unevaluated):
            return None
        which = jnp.asarray(predicate.compact)
        keep = which == k if which.dtype != bool else which if k else jnp.logical_not(which)
        mask = partial(_masked, keep=keep, varies=predicate.varies)
        kept = each(eqn, case, mask, on_windows=not predicate.varies)
        if kept is None:
            return None
        total = added(total, kept)
    return [total]


def _masked(term: Product, keep: Any, varies: tuple[int, ...]) -> Product | None:
    if not varies:  # mask both operands, so that a dropped product is zero even if an operand holds NaN
        left = term.left if term.row is not None else jnp.where(keep, term.left, jnp.zeros_like(term.left))
        return dataclasses.replace(term, left=left, right=jnp.where(keep, term.right, jnp.zeros_like(term.right)))
    side = linear.aligned(term, keep, varies)
    if side is None:
        return None
    name, mask = side
    operand = getattr(term, name)
    changes: dict[str, Any] = {name: jnp.where(mask, operand, jnp.zeros_like(operand))}
    return dataclasses.replace(term, **changes)


RECORDS = {
    **dict.fromkeys(_jax.IDENTITIES, Record(lambda eqn, values: list(values), operands=every, identity=True)),
    lax.convert_element_type_p: Record(on_first(_cast, True)),
    lax.real_p: Record(on_first(lambda eqn, term: linear.real(term), True)),
    lax.imag_p: Record(on_first(lambda eqn, term: linear.imag(term), True)),
    lax.conj_p: Record(on_first(lambda eqn, term: linear.conjugate(term), True)),
    lax.neg_p: Record(on_first(lambda eqn, term: linear.on_smaller(term, lax.neg), True)),
    lax.reduce_sum_p: Record(on_first(lambda eqn, term: linear.sums(term, axes_of(eqn, "axes")))),
    _jax.add_any_p: Record(_add, operands=every),
    lax.add_p: Record(_add, operands=every),
    lax.sub_p: Record(_sub, operands=every),
    lax.mul_p: Record(_mul, makes=_outer, operands=every, keeps_zero=False, bilinear=True),
    lax.div_p: Record(_div, keeps_zero=False),
    lax.select_n_p: Record(_select, operands=lambda eqn: range(1, len(eqn.invars))),
    lax.complex_p: Record(operands=every),
    **dict.fromkeys([lax.cumsum_p, lax.fft_p, lax.reduce_window_sum_p], Record(operands=first)),
}
