"""Treat a loop or branch as one linear map shared by all examples, if it is linear in the products among its operands.

All examples take the same branch, or do the same in every step. Such loops and branches occur in the backward pass of
a matrix exponential, of repeated squaring, or of an iterative normalization of a weight.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxgrad import _jax
from jaxgrad.per_example.interpreter import through
from jaxgrad.per_example.interpreter.values import (
    Shared,
    Unevaluated,
    Value,
    array_of,
    is_shared,
    is_zero,
    times_shared,
    zero,
)

Evaluate = Callable[..., list[Value]]  # `walk.evaluate`


def scan(evaluate: Evaluate, eqn: _jax.Equation, values: Sequence[Value], used: Sequence[bool]) -> list[Value] | None:
    """The results of the loop as one linear map; None if it is not a linear map shared by all examples."""
    products = _products(values)
    if products is None:
        return None
    parts, program = _jax.scan_parts(eqn), _jax.body(eqn)
    inputs, end = program.jaxpr.invars, parts.consts + parts.carry
    used = [use or k < parts.carry for k, use in enumerate(used)]  # the next step uses every carry
    zeros = [is_zero(v) for v in values]
    kinds: list[str] = []
    before: Any = None
    while (products, zeros) != before:  # a carry is an operand of the next step
        before = products, zeros

        def look(*step: Any, products: Sequence[bool] = products, zeros: Sequence[bool] = zeros) -> list[Value]:
            inside = [*values[: parts.consts], *map(Shared, step)]
            known = [
                zero(v.aval.shape, v.aval.dtype) if z else a for v, z, a in zip(inputs, zeros, inside, strict=True)
            ]
            return _looked(evaluate, program, known, products, used)

        kinds = _kinds_of(look, [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in inputs[parts.consts :]])
        among = range(parts.consts, end)
        products = [p or (k in among and kinds[k - parts.consts] == "map") for k, p in enumerate(products)]
        zeros = [z and (k not in among or kinds[k - parts.consts] == "zero") for k, z in enumerate(zeros)]
    # A carry that starts as a product also ends as one if the loop runs no step.
    carried = [
        _of_both("map", kind) if products[parts.consts + k] else kind for k, kind in enumerate(kinds[: parts.carry])
    ]
    kinds = [*carried, *kinds[parts.carry :]]
    return None if "other" in kinds else _results(eqn, values, products, kinds)


def cond(evaluate: Evaluate, eqn: _jax.Equation, values: Sequence[Value], used: Sequence[bool]) -> list[Value] | None:
    """The results of a branch that all examples take, as one linear map; None if they share no such map."""
    products = _products(values)
    if products is None or products[0]:
        return None
    kinds = ["zero"] * len(eqn.outvars)
    for program in _jax.branches(eqn):

        def look(program: _jax.Program = program) -> list[Value]:
            return _looked(evaluate, program, values[1:], products[1:], used)

        kinds = list(map(_of_both, kinds, _kinds_of(look)))
    return None if "other" in kinds else _results(eqn, values, products, kinds)


def _of_both(kind: str, other: str) -> str:
    """The kind of a result that may be of either kind: "other" for a shared array in one case and a map in the other,
    because the shared array would be taken for the result of a map."""
    if "zero" in (kind, other) or kind == other:
        return other if kind == "zero" else kind
    return "other"


def _products(values: Sequence[Value]) -> list[bool] | None:
    """Which operands are products; None if none is, or if an operand that is not a product differs between examples."""
    products = [isinstance(v, Unevaluated) and not is_zero(v) for v in values]
    others = [v for v, product in zip(values, products, strict=True) if not product]
    floating = all(jnp.issubdtype(v.dtype, jnp.inexact) for v in values if isinstance(v, Unevaluated))
    return products if any(products) and floating and all(is_shared(v) or is_zero(v) for v in others) else None


def _looked(
    evaluate: Evaluate,
    program: _jax.Program,
    values: Sequence[Value],
    products: Sequence[bool],
    used: Sequence[bool],
) -> list[Value]:
    """The program's results when empty maps are passed in place of the products."""
    inside = list(values)
    for k, (v, product) in enumerate(zip(program.jaxpr.invars, products, strict=True)):
        if product:
            empty = Unevaluated((), tuple(v.aval.shape), v.aval.dtype)
            inside[k] = dataclasses.replace(empty, maps=(through.input_of(empty),))
    return evaluate(program, inside, list(used), used)


def _kinds_of(look: Callable[..., list[Value]], operands: Sequence[jax.ShapeDtypeStruct] = ()) -> list[str]:
    """The kind of each result: a map of products, shared by all examples, zero or unused, or something else."""
    kinds: list[str] = []

    def kind(value: Value) -> str:
        if value is None or is_zero(value):
            return "zero"
        if isinstance(value, Unevaluated):
            empty = all(isinstance(x, Unevaluated) and not x.terms for x in value.inputs)
            return "map" if not value.terms and empty else "other"
        return "shared" if is_shared(value) else "other"

    def run(*operands: Any) -> None:
        kinds.extend(map(kind, look(*operands)))

    jax.eval_shape(run, *operands)
    return kinds


def _results(
    eqn: _jax.Equation, values: Sequence[Value], products: Sequence[bool], kinds: Sequence[str]
) -> list[Value]:
    sides: list[Any] = []
    for v, product in zip(values, products, strict=True):
        if isinstance(v, Unevaluated) and not is_zero(v):
            sides.append(through.node_of(v))
        elif product and not is_zero(v):  # this carry becomes a product in a later step
            array = jnp.asarray(array_of(v))
            sides.append(through.node_of(times_shared(jnp.ones((), array.dtype), array)))
        else:
            sides.append(jnp.asarray(array_of(v)))
    results: list[Value] = list(through.results_of(eqn, sides))
    fixed: list[Any] = [None] * len(results)
    if "shared" in kinds:  # these results depend on no product, so zeros are passed in place of the products
        operands = zip(eqn.invars, values, products, strict=True)
        fixed = _jax.bind(eqn, [jnp.zeros(v.aval.shape, v.aval.dtype) if p else array_of(x) for v, x, p in operands])
    for k, (kind, v) in enumerate(zip(kinds, eqn.outvars, strict=True)):
        if kind == "shared":
            results[k] = Shared(fixed[k])
        elif kind == "zero":
            results[k] = zero(v.aval.shape, v.aval.dtype) if jnp.issubdtype(v.aval.dtype, jnp.number) else None
    return results
