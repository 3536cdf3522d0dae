"""Checks that a backward pass is linear in its cotangent. JAX's own are; one written by hand may not be."""

from collections.abc import Sequence
from enum import Enum
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxgrad import _jax


class State(Enum):
    """How a variable depends on the cotangent."""

    ZERO = 0
    CONSTANT = 1
    LINEAR = 2


ZERO, CONSTANT, LINEAR = State


class NotLinearError(Exception):
    """An operation is not linear in the cotangent; the message names it."""


_SUMS = {lax.add_p, lax.sub_p, _jax.add_any_p, lax.concatenate_p, lax.pad_p, lax.dynamic_update_slice_p}
_SUMS |= {lax.scatter_add_p, lax.select_n_p}
_PRODUCTS = {lax.mul_p, lax.dot_general_p, lax.conv_general_dilated_p}
_NOT_LINEAR = {
    *(lax.abs_p, lax.sign_p, lax.max_p, lax.min_p, lax.clamp_p, lax.exp_p, lax.log_p, lax.tanh_p, lax.logistic_p),
    *(lax.sqrt_p, lax.rsqrt_p, lax.pow_p, lax.integer_pow_p, lax.square_p, lax.sin_p, lax.cos_p, lax.floor_p),
    *(lax.ceil_p, lax.round_p, lax.is_finite_p, lax.erf_p, lax.exp2_p, lax.expm1_p, lax.log1p_p, lax.cbrt_p),
    *(lax.eq_p, lax.ne_p, lax.lt_p, lax.le_p, lax.gt_p, lax.ge_p, lax.reduce_max_p, lax.reduce_min_p, lax.sort_p),
    *(lax.argmax_p, lax.argmin_p, lax.reduce_prod_p, lax.cumprod_p, lax.cummax_p, lax.cummin_p, lax.rem_p),
}
_ZERO_TO_ZERO = {
    *(lax.broadcast_in_dim_p, lax.convert_element_type_p, lax.reshape_p, lax.transpose_p, lax.neg_p, lax.squeeze_p),
    *(lax.reduce_sum_p, lax.slice_p, lax.rev_p, lax.real_p, lax.imag_p, lax.cumsum_p, *_jax.IDENTITIES),
}


def not_linear(program: _jax.Program, operand: int) -> str | None:
    """Name the first operation that is not linear in one operand of a program; None if no such operation is known.

    Unknown primitives, such as Pallas kernels, are assumed to be linear.
    """
    states = [LINEAR if k == operand else CONSTANT for k in range(len(program.jaxpr.invars))]
    try:
        results = _through(program.jaxpr, states)
    except NotLinearError as found:
        return str(found)
    floating = [jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in program.jaxpr.outvars]
    constant = any(state is CONSTANT and f for state, f in zip(results, floating, strict=True))
    return "a result that does not depend on the cotangent" if constant else None


def _through(jaxpr: _jax.Jaxpr, states: Sequence[State]) -> list[State]:
    known: dict[Any, State] = dict.fromkeys(jaxpr.constvars, CONSTANT) | dict(zip(jaxpr.invars, states, strict=True))

    def read(v: Any) -> State:
        if isinstance(v, _jax.Literal):
            return ZERO if not np.any(v.val) else CONSTANT
        return known[v]

    for eqn in jaxpr.eqns:
        results = _results(eqn, [read(v) for v in eqn.invars])
        known |= dict(zip(eqn.outvars, results, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _results(eqn: _jax.Equation, states: list[State]) -> list[State]:
    count = len(eqn.outvars)
    if eqn.primitive in (_jax.jit_p, _jax.remat_p):
        return _through(_jax.body(eqn).jaxpr, states)
    if eqn.primitive is _jax.cond_p:
        if states[0] is LINEAR:
            raise NotLinearError(f"{_at(eqn)}: a branch chosen by the cotangent")
        each = [_through(branch.jaxpr, states[1:]) for branch in _jax.branches(eqn)]
        return [_sum(eqn, results, v) for *results, v in zip(*each, eqn.outvars, strict=True)]
    if eqn.primitive is _jax.scan_p:
        return _of_scan(eqn, states)
    if eqn.primitive is lax.while_p:
        return _of_while(eqn, states)
    if eqn.primitive.name.startswith("custom_") or _jax.kind(eqn) == "shard_map":
        inner = [jaxpr for jaxpr in _jax.programs_in(eqn) if len(jaxpr.invars) == len(states)]
        if inner:
            return _through(inner[0], states)
    if eqn.primitive in _SUMS:
        operands = states[1:] if eqn.primitive is lax.select_n_p else states
        if eqn.primitive is lax.scatter_add_p:
            operands = [states[0], states[2]]
        if eqn.primitive is lax.dynamic_update_slice_p:
            operands = states[:2]
        if eqn.primitive is lax.select_n_p and states[0] is LINEAR:
            raise NotLinearError(f"{_at(eqn)}: a choice made by the cotangent")
        return [_sum(eqn, operands, eqn.outvars[0])]
    if eqn.primitive in _PRODUCTS:
        if states.count(LINEAR) > 1:
            raise NotLinearError(f"{_at(eqn)}: a product of the cotangent with itself")
        return [ZERO if ZERO in states else LINEAR if LINEAR in states else CONSTANT] * count
    if eqn.primitive is lax.div_p and states[1] is LINEAR:
        raise NotLinearError(f"{_at(eqn)}: a division by the cotangent")
    if LINEAR not in states:
        zero = eqn.primitive in _ZERO_TO_ZERO and all(state is ZERO for state in states)
        return [ZERO if zero else CONSTANT] * count
    if eqn.primitive in _NOT_LINEAR and jnp.issubdtype(eqn.invars[0].aval.dtype, jnp.inexact):
        if eqn.primitive is lax.integer_pow_p and eqn.params["y"] == 1:
            return [LINEAR] * count
        raise NotLinearError(f"{_at(eqn)}: a function of the cotangent that is not linear")
    return [LINEAR] * count


def _of_scan(eqn: _jax.Equation, states: list[State]) -> list[State]:
    parts, jaxpr = _jax.scan_parts(eqn), _jax.body(eqn).jaxpr
    end = parts.consts + parts.carry
    carry, before = states[parts.consts : end], None
    results: list[State] = []
    while carry != before:  # a step's results are operands of the next step
        before = carry
        results = _through(jaxpr, [*states[: parts.consts], *carry, *states[end:]])
        carry = [_sum(eqn, pair, v) for *pair, v in zip(carry, results, eqn.outvars, strict=False)]
    return carry + results[parts.carry :]


def _of_while(eqn: _jax.Equation, states: list[State]) -> list[State]:
    parts = _jax.while_parts(eqn)
    end = parts.cond_consts + parts.body_consts
    carry, before = states[end:], None
    while carry != before:
        before = carry
        if LINEAR in _through(parts.cond, [*states[: parts.cond_consts], *carry]):
            raise NotLinearError(f"{_at(eqn)}: a loop whose number of steps depends on the cotangent")
        results = _through(parts.body, [*states[parts.cond_consts : end], *carry])
        carry = [_sum(eqn, pair, v) for *pair, v in zip(carry, results, eqn.outvars, strict=True)]
    return carry


def _sum(eqn: _jax.Equation, states: Sequence[State], result: Any) -> State:
    if LINEAR in states and CONSTANT in states and jnp.issubdtype(result.aval.dtype, jnp.inexact):
        raise NotLinearError(f"{_at(eqn)}: the cotangent and something that does not depend on it, added or joined")
    return LINEAR if LINEAR in states else CONSTANT if CONSTANT in states else ZERO


def _at(eqn: _jax.Equation) -> str:
    return " at ".join(filter(None, (eqn.primitive.name, _jax.source_line(eqn))))


def accumulates(jaxpr: _jax.Jaxpr, into: Any, out: Any) -> bool:
    """Whether a carry is only added to: `into` leads to `out` through a chain of add_any and has no other use."""
    v = into
    while v is not out:
        uses = [eqn for eqn in jaxpr.eqns if any(w is v for w in eqn.invars)]
        if len(uses) != 1 or uses[0].primitive is not _jax.add_any_p or any(w is v for w in jaxpr.outvars):
            return False
        if uses[0].invars[0] is uses[0].invars[1]:
            return False
        v = uses[0].outvars[0]
    used_again = any(any(w is v for w in eqn.invars) for eqn in jaxpr.eqns)
    return not used_again and sum(w is v for w in jaxpr.outvars) == 1
