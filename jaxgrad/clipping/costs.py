"""What a function costs before it runs: memory of the compiled program, operations of its matrix products."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax import lax

from jaxgrad import _jax


@dataclass(frozen=True)
class Cost:
    """The cost of one way to compute something.

    Attributes:
        nbytes: bytes of temporary arrays and results on each device, as the compiler reports them.
        operations: multiplications and additions in matrix products and convolutions, on all devices together. The
            body of a `while` loop counts once, and a `cond` as its costliest branch.

    Example:
        >>> gradient = jg.clipped_grad(lambda W, x: jnp.tanh(W @ x).sum(), 1.0)
        >>> cost = gradient.costs(jnp.ones((30, 20)), jnp.ones((4, 20)))["plain gradient"]
        >>> cost.operations == 2 * (2 * 4 * 30 * 20), cost.nbytes >= 4 * 30 * 20
        (True, True)
    """

    nbytes: int
    operations: float


@dataclass(frozen=True)
class Costs:
    """Costs by name; it prints as a table.

    Attributes:
        rows: the cost of each way.

    Example:
        >>> loss, W = lambda W, x: jnp.tanh(W @ x).sum(), jnp.ones((30, 20))
        >>> costs = jg.clipped_grad(loss, 1.0).costs(W, jnp.ones((4, 20)))
        >>> sorted(costs.rows)
        ['one pass', 'plain gradient', 'two passes']
        >>> costs["two passes"].operations > costs["one pass"].operations
        True
    """

    rows: Mapping[str, Cost]

    def __getitem__(self, name: str) -> Cost:
        """The cost of one way."""
        return self.rows[name]

    def __str__(self) -> str:
        lines = [("", "memory, MiB", "operations, 10⁹")]
        lines += [(k, f"{cost.nbytes / 2**20:.2f}", f"{cost.operations / 1e9:.3f}") for k, cost in self.rows.items()]
        widths = [max(len(line[k]) for line in lines) for k in range(3)]
        return "\n".join(
            f"{name.ljust(widths[0])}  {memory.rjust(widths[1])}  {count.rjust(widths[2])}"
            for name, memory, count in lines
        )


def compiled_cost(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cost:
    """Trace and compile a function for these arguments, arrays or `jax.ShapeDtypeStruct`s, without running it."""
    treedef: Any
    leaves, treedef = jax.tree.flatten((args, kwargs))
    arrays = {k: a for k, a in enumerate(leaves) if hasattr(a, "shape") and hasattr(a, "dtype")}

    def call(arrays: dict[int, Any]) -> Any:
        args, kwargs = treedef.unflatten([arrays.get(k, leaf) for k, leaf in enumerate(leaves)])
        return function(*args, **kwargs)

    traced = jax.jit(call).trace(arrays)
    sizes: Any = traced.lower().compile().memory_analysis()
    nbytes = sizes.temp_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    jaxpr = _jax.program_of(traced.jaxpr).jaxpr
    return Cost(int(nbytes), _operations(jaxpr, [True] * len(jaxpr.outvars)))


def _operations(jaxpr: _jax.Jaxpr, used: Sequence[bool]) -> float:
    """The operations of the products that lead to the results in `used`."""
    needed = {v for v, use in zip(jaxpr.outvars, used, strict=True) if use and not isinstance(v, _jax.Literal)}
    total = 0.0
    for eqn in reversed(jaxpr.eqns):
        results = [v in needed for v in eqn.outvars]
        if any(results) or eqn.effects:
            needed |= {v for v in eqn.invars if not isinstance(v, _jax.Literal)}
            total += _of_equation(eqn, results)
    return total


def _of_equation(eqn: _jax.Equation, used: list[bool]) -> float:
    if eqn.primitive is lax.dot_general_p:
        ((contracted, _), _) = eqn.params["dimension_numbers"]
        return 2.0 * eqn.outvars[0].aval.size * math.prod(eqn.invars[0].aval.shape[k] for k in contracted)
    if eqn.primitive is lax.conv_general_dilated_p:
        kernel = eqn.invars[1].aval
        outputs = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * eqn.outvars[0].aval.size * kernel.size / max(outputs, 1)
    if eqn.primitive in (_jax.jit_p, _jax.remat_p):
        return _operations(_jax.body(eqn).jaxpr, used)
    if eqn.primitive is _jax.scan_p:
        parts = _jax.scan_parts(eqn)
        used = [use or k < parts.carry for k, use in enumerate(used)]  # the next step uses every carry
        return parts.length * _operations(_jax.body(eqn).jaxpr, used)
    if eqn.primitive is _jax.cond_p:
        return max(_operations(branch.jaxpr, used) for branch in _jax.branches(eqn))
    return math.fsum(_operations(inner, [True] * len(inner.outvars)) for inner in _jax.programs_in(eqn))
