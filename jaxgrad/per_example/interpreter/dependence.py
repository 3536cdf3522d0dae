"""Which results of a program depend on which of its operands."""

import functools
from collections.abc import Sequence
from typing import Any

from jax import lax

from jaxgrad import _jax


def depending(program: Any, operands: Sequence[int] | None = None) -> list[bool]:
    """Whether each result of a program may depend on these operands (None: on any); True may be wrong, False is not."""
    jaxpr = _jax.program_of(program).jaxpr
    return list(_depending(jaxpr, tuple(range(len(jaxpr.invars)) if operands is None else operands)))


@functools.lru_cache(512)
def _depending(jaxpr: _jax.Jaxpr, operands: tuple[int, ...]) -> tuple[bool, ...]:
    dependent = {jaxpr.invars[k] for k in operands}
    for eqn in jaxpr.eqns:
        varied = [k for k, v in enumerate(eqn.invars) if not isinstance(v, _jax.Literal) and v in dependent]
        dependent.update(v for v, depends in zip(eqn.outvars, results_depending(eqn, varied), strict=True) if depends)
    return tuple(not isinstance(v, _jax.Literal) and v in dependent for v in jaxpr.outvars)


def results_depending(eqn: _jax.Equation, operands: Sequence[int]) -> list[bool]:
    """As `depending`, for the results of an equation; `jax.vmap` decides in the same way which results are batched."""
    if not operands:
        return [False] * len(eqn.outvars)
    if eqn.primitive is lax.optimization_barrier_p:  # each result depends on its own operand only
        return [k in operands for k in range(len(eqn.outvars))]
    if eqn.primitive in (_jax.jit_p, _jax.remat_p):
        return list(_depending(_jax.body(eqn).jaxpr, tuple(operands)))
    if eqn.primitive is _jax.cond_p and 0 not in operands:
        inner = [_depending(branch.jaxpr, tuple(k - 1 for k in operands)) for branch in _jax.branches(eqn)]
        return [any(results) for results in zip(*inner, strict=True)]
    if eqn.primitive is _jax.scan_p:
        parts, dependent, previous = _jax.scan_parts(eqn), set(operands), None
        while dependent != previous:  # a carry is an operand of the next step
            previous = set(dependent)
            results = list(_depending(_jax.body(eqn).jaxpr, tuple(sorted(dependent))))
            dependent |= {parts.consts + k for k in range(parts.carry) if results[k]}
        carried = [parts.consts + k in dependent for k in range(parts.carry)]
        return carried + results[parts.carry :]
    return [True] * len(eqn.outvars)


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
