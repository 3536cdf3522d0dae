"""One record for each primitive that the interpreter knows, by family, as JAX's own `lax` is divided.

    record        what a record says
    shape         transpose, reshape, slice, pad, concatenate, …
    arithmetic    add, mul, select, convert, …, and identities
    contraction   dot_general, solves
    indexing      scatter-add, dynamic slices, gather
    convolution   conv_general_dilated
    devices       sums over mesh axes inside shard_map

To add a primitive, write its record in its family. `tests/test_through.py` finds out whether it is right: what a rule
returns, written out, is what the equation gives for the product written out.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from jaxgrad import _jax
from jaxgrad.per_example.interpreter.measuring import stays_factored
from jaxgrad.per_example.interpreter.rules import arithmetic, contraction, convolution, devices, indexing, shape
from jaxgrad.per_example.interpreter.rules.record import Record
from jaxgrad.per_example.interpreter.values import FORMED, Plain, Undone, Value, array_of, nonempty

_FAMILIES = (shape, arithmetic, contraction, indexing, convolution, devices)
RECORDS: dict[Any, Record] = {p: record for family in _FAMILIES for p, record in family.RECORDS.items()}
UNKNOWN = Record(operands=lambda eqn: (), keeps_zero=False)


def record_of(eqn: _jax.Equation) -> Record:
    """What is known of the equation's primitive."""
    return RECORDS.get(_jax.kind(eqn), UNKNOWN)


def undone_product(eqn: _jax.Equation, values: Sequence[Value]) -> Undone | Plain | None:
    """The equation's result as a product, or formed if that is the smaller thing; None if it is neither."""
    make, out = record_of(eqn).makes, eqn.outvars[0].aval
    if make is None or out.size == 0 or not jnp.issubdtype(out.dtype, jnp.inexact):
        return None
    term = make(eqn, values)
    if term is None:
        return None
    if term.windows or term.held < out.size or stays_factored():
        return Undone(nonempty([term]), tuple(out.shape), out.dtype)
    return Plain(_jax.bind(eqn, [array_of(value) for value in values])[0], FORMED)
