"""A lower bound on a program's time: its operations and its bytes, divided by the rates measured on the device."""

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.timing import medians
from benchmarks.workload import Row


def product_operations(function: Any, *arguments: Any) -> float:
    """The number of multiplications and additions in a function's matrix products and convolutions.

    They are counted in the jaxpr, because the compiled program's own count takes the body of a loop once and omits
    products that a vendor's library computes. The body of a `while` counts once, and a `cond` as its costliest branch.
    """
    return count_operations(jax.make_jaxpr(function)(*arguments))


def count_operations(jaxpr: Any) -> float:
    return math.fsum(count_equation(eqn) for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns)


def count_equation(eqn: Any) -> float:
    name = eqn.primitive.name
    if name == "dot_general":
        ((contracted, _), _) = eqn.params["dimension_numbers"]
        left = eqn.invars[0].aval.shape
        return 2.0 * eqn.outvars[0].aval.size * math.prod(left[k] for k in contracted)
    if name == "conv_general_dilated":
        kernel = eqn.invars[1].aval
        outputs = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * eqn.outvars[0].aval.size * kernel.size / max(outputs, 1)
    inner = [count_operations(jaxpr) for jaxpr in inner_jaxprs(eqn.params)]
    if name == "cond":
        return max(inner)
    return math.fsum(inner) * (eqn.params["length"] if name == "scan" else 1)


def inner_jaxprs(params: Any) -> Iterator[Any]:
    """The jaxprs among an equation's parameters."""
    for p in params.values():
        for q in p if isinstance(p, tuple | list) else (p,):
            if hasattr(getattr(q, "jaxpr", q), "eqns"):
                yield q


@functools.cache
def product_rate(dtype: str, n: int) -> float:
    """Operations per second of one product of [n, n] matrices in JAX's default precision.

    The matrices are random. On constants a GPU needs less power and clocks higher than on real data.
    """
    a = jax.random.normal(jax.random.key(0), (n, n), dtype)
    return 2.0 * n**3 / median_seconds(lambda a: a @ a, a)


@functools.cache
def memory_rate(n: int) -> float:
    """Bytes per second of y ← 2x + y on n numbers: two arrays are read and one is written."""
    x = jnp.ones(n, jnp.float32)
    return 3.0 * 4 * n / median_seconds(lambda x, y: 2 * x + y, x, x + 1)


def median_seconds(function: Any, *arguments: Any) -> float:
    compiled = jax.jit(function)
    return medians({"function": lambda: compiled(*arguments)}, 0.5, wait=jax.block_until_ready)["function"]


def add_limit(row: Row, name: str, function: Any, arguments: Any, rates: tuple[float, float]) -> None:
    """Store the lower bound on a function's time: the longer of the times for its operations and for its bytes."""
    costs = row.costs[name]
    costs["operations"] = max(costs["operations"], product_operations(function, *arguments))
    nbytes = max(costs["bytes accessed"], costs["bytes in and out"])
    costs["limit"] = max(costs["operations"] / rates[0], nbytes / rates[1])
