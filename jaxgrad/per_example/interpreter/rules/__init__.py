"""One record for each primitive that the interpreter knows, in families like those of JAX's own `lax`.

    record        the contents of a record
    shape         transpose, reshape, slice, pad, concatenate, …
    arithmetic    add, mul, select, convert, …, and identities
    contraction   dot_general, solves
    indexing      scatter-add, dynamic slices, gather
    convolution   conv_general_dilated
    devices       sums over mesh axes inside shard_map
    ragged        products of groups of rows, each with a matrix of its own

To add a primitive, write its record in its family. `tests/test_through.py` and, on random programs, `test_squares.py`
check that it is right: the rule's result, materialized, must equal the equation's result for the materialized product.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from jaxgrad import _jax
from jaxgrad.per_example.interpreter.cost_model import worth_holding
from jaxgrad.per_example.interpreter.measuring import stays_factored
from jaxgrad.per_example.interpreter.reasons import FORMED
from jaxgrad.per_example.interpreter.rules import arithmetic, contraction, convolution, devices, indexing, ragged, shape
from jaxgrad.per_example.interpreter.rules.record import Record
from jaxgrad.per_example.interpreter.values import Plain, Unevaluated, Value, array_of, is_shared, nonempty

_FAMILIES = (shape, arithmetic, contraction, indexing, convolution, devices)
RECORDS: dict[Any, Record] = {p: record for family in _FAMILIES for p, record in family.RECORDS.items()}
UNKNOWN = Record(operands=lambda eqn: (), keeps_zero=False)


def record_of(eqn: _jax.Equation) -> Record:
    """The record of the equation's primitive; `UNKNOWN` if it has none."""
    return RECORDS.get(_jax.kind(eqn), UNKNOWN)


def made_product(eqn: _jax.Equation, values: Sequence[Value]) -> Unevaluated | Plain | None:
    """The equation's result as a product, materialized if that is smaller; None if the equation makes no product."""
    make, out = record_of(eqn).makes, eqn.outvars[0].aval
    if make is None or out.size == 0 or not jnp.issubdtype(out.dtype, jnp.inexact):
        return None
    term = make(eqn, values)
    if term is None:
        return None
    of_examples = not any(is_shared(value) for value in values)
    if term.windows or worth_holding(term.held, out.size) or (of_examples and stays_factored()):
        return Unevaluated(nonempty([term]), tuple(out.shape), out.dtype)
    return Plain(_jax.bind(eqn, [array_of(value) for value in values])[0], FORMED)


def bind(eqn: _jax.Equation, values: Sequence[Any]) -> list[Any]:
    """Evaluate the equation, also where JAX has no rule for a batch."""
    return ragged.bind(eqn, values) if eqn.primitive.name in ragged.EQUALS else _jax.bind(eqn, values)
