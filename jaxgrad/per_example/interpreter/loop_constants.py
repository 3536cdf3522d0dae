"""Arrays that every step of a loop uses and that only repeat a smaller array, such as an attention mask.

JAX moves what does not change from step to step out of a loop, broadcasts included. `jax.vmap` then repeats such an
array for every example, and a compiler writes all copies to memory in every step. Repeated inside the loop, the smaller
array joins the operation that reads it.
"""

from collections.abc import Sequence
from typing import Any

from jax import lax

from jaxgrad import _jax
from jaxgrad.per_example.interpreter.values import Broadcast, Value, array_of
from jaxgrad.sharding import is_explicit


def only_broadcasts(eqn: _jax.Equation) -> bool:
    """Whether an equation is a jit that only repeats and casts its operands."""
    if eqn.primitive is not _jax.jit_p:
        return False
    return {e.primitive for e in _jax.body(eqn).jaxpr.eqns} <= {lax.broadcast_in_dim_p, lax.convert_element_type_p}


def scan(eqn: _jax.Equation, values: Sequence[Value]) -> list[Any] | None:
    """The results of a scan that repeats these constants in every step; None if there are none to repeat.

    None also on an explicit mesh and inside shard_map, where the program states how every operand is sharded.
    """
    parts = _jax.scan_parts(eqn)
    consts, rest = values[: parts.consts], [array_of(v) for v in values[parts.consts :]]
    if not any(isinstance(v, Broadcast) for v in consts) or any(is_explicit(a) or _jax.varying(a) for a in rest):
        return None
    function, carry = _jax.function_of(eqn.params["jaxpr"]), parts.carry

    def step(before: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
        results = function(*map(array_of, consts), *before, *xs)
        return results[:carry], results[carry:]

    options: dict[str, Any] = {"reverse": parts.reverse, "unroll": parts.unroll}
    after, ys = lax.scan(step, rest[:carry], rest[carry:], parts.length, **options)
    return [*after, *ys]
