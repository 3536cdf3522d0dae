"""Checks that scaling a cotangent scales the results of a backward pass.

JAX's own backward passes are linear; one written by hand may not be. In float16 and float8, which have few exponents, a
scaled cotangent loses its digits.
"""

from collections.abc import Sequence
from enum import Enum
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxgrad import _jax
from jaxgrad.per_example.interpreter.rules import UNKNOWN, record_of


class State(Enum):
    """How a variable depends on the cotangent."""

    ZERO = 0
    CONSTANT = 1
    LINEAR = 2


ZERO, CONSTANT, LINEAR = State


class NotLinearError(Exception):
    """An operation is not linear in the cotangent; the message names it."""


_NOT_LINEAR = {
    *(lax.abs_p, lax.sign_p, lax.max_p, lax.min_p, lax.clamp_p, lax.exp_p, lax.log_p, lax.tanh_p, lax.logistic_p),
    *(lax.sqrt_p, lax.rsqrt_p, lax.pow_p, lax.integer_pow_p, lax.square_p, lax.sin_p, lax.cos_p, lax.floor_p),
    *(lax.ceil_p, lax.round_p, lax.is_finite_p, lax.erf_p, lax.exp2_p, lax.expm1_p, lax.log1p_p, lax.cbrt_p),
    *(lax.eq_p, lax.ne_p, lax.lt_p, lax.le_p, lax.gt_p, lax.ge_p, lax.reduce_max_p, lax.reduce_min_p, lax.sort_p),
    *(lax.argmax_p, lax.argmin_p, lax.reduce_prod_p, lax.cumprod_p, lax.cummax_p, lax.cummin_p, lax.rem_p),
}

_OTHER_OPERANDS = {lax.div_p: "a division by the cotangent", lax.select_n_p: "a choice made by the cotangent"}
_NOT_IN_OPERANDS = "the cotangent as an operand in which the operation is not linear"


def narrow_range(dtype: Any) -> bool:
    """Whether a floating dtype has fewer exponents than float32, as float16 and float8 do and bfloat16 does not."""
    return jnp.issubdtype(dtype, jnp.inexact) and jnp.finfo(dtype).minexp > jnp.finfo(jnp.float32).minexp


def not_linear(program: _jax.Program, operand: int) -> str | None:
    """Name the first operation that is not linear in one operand of a program; None if no such operation is known.

    A result of narrow range counts as not linear. Unknown primitives, such as Pallas kernels, are assumed to be linear.
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
        for v, state in zip(eqn.outvars, results, strict=True):
            if state is LINEAR and narrow_range(v.aval.dtype):
                raise NotLinearError(f"{_at(eqn)}: a cotangent in {v.aval.dtype}, whose range is too small to scale it")
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
    record = record_of(eqn)
    if record.identity:
        return states
    if record.bilinear:
        if states.count(LINEAR) > 1:
            raise NotLinearError(f"{_at(eqn)}: a product of the cotangent with itself")
        return [ZERO if ZERO in states else LINEAR if LINEAR in states else CONSTANT] * count
    if record is not UNKNOWN:
        linear = record.linear_in(eqn)
        if any(state is LINEAR for k, state in enumerate(states) if k not in linear):
            raise NotLinearError(f"{_at(eqn)}: {_OTHER_OPERANDS.get(eqn.primitive, _NOT_IN_OPERANDS)}")
        if all(states[k] is ZERO for k in linear) and record.keeps_zero:
            return [ZERO] * count
        return [_sum(eqn, [states[k] for k in linear], v) for v in eqn.outvars]
    if LINEAR not in states:
        return [CONSTANT] * count
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
