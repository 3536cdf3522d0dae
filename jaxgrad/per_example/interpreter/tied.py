"""A weight that is used twice: in a product, and as a table whose rows are looked up, such as a tied embedding.

The product's gradient is complete long before that of the lookups, and the norm of their sum has cross terms. Of the
product, these need only the rows that are looked up. So it is measured where it is complete, and its rows are kept.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxgrad import _jax
from jaxgrad.per_example.interpreter.measuring import Measure, Target, measure_of, measurer, with_measure
from jaxgrad.per_example.interpreter.rules import made_product
from jaxgrad.per_example.interpreter.values import Unevaluated, Value, array_of, is_zero, zero


class Kept(NamedTuple):
    """What is kept of a product's gradient, in place of its measure, until the lookups' gradient is added.

    Attributes:
        measure: its measure.
        rows: [T, K], its rows at the ids that are looked up.
    """

    measure: Measure
    rows: Array


class Sum(NamedTuple):
    """A sum of a product's gradient and one of lookups: the variables of both, and the equation of the latter."""

    product: Any
    lookups: Any
    scatter: _jax.Equation


def sums(jaxpr: _jax.Jaxpr, targets: dict[Any, Target]) -> dict[Any, Sum]:
    """The sums among the variables that have a target, by variable."""
    current = measurer()
    if current is None or current.kept is None:
        return {}
    scatters = {eqn.outvars[0]: eqn for eqn in jaxpr.eqns if eqn.primitive is lax.scatter_add_p}
    found: dict[Any, Sum] = {}
    for eqn in jaxpr.eqns:
        if eqn.primitive is _jax.add_any_p and eqn.outvars[0] in targets:
            for product, lookups in (eqn.invars, eqn.invars[::-1]):
                if lookups in scatters and product not in scatters:
                    found[eqn.outvars[0]] = Sum(product, lookups, scatters[lookups])
    return found


def kept(value: Value, sum_: Sum, known: dict[Any, Value]) -> Value:
    """The product's gradient, with a `Kept` attached; unchanged if the ids are not known yet or it has another form."""
    current, (table, indices, updates) = measurer(), sum_.scatter.invars
    if current is None or current.kept is None or not isinstance(value, Unevaluated) or is_zero(value):
        return value
    if indices not in known or measure_of(value) is not None:
        return value
    nothing = zero(table.aval.shape, table.aval.dtype)
    empty = jnp.zeros(updates.aval.shape, updates.aval.dtype)
    lookups = made_product(sum_.scatter, [nothing, array_of(known[indices]), empty])
    if not isinstance(lookups, Unevaluated):
        return value
    rows = current.kept.rows(value, lookups)
    return value if rows is None else with_measure(value, Kept(current.one(value, value.shape, value.dtype, ()), rows))


def measured(result: Value, sum_: Sum, known: dict[Any, Value]) -> Value:
    """The sum, with its measure attached if that of the product is kept."""
    current, found, lookups = measurer(), measure_of(known[sum_.product]), known[sum_.lookups]
    if current is None or current.kept is None or not isinstance(found, Kept):
        return result
    if is_zero(lookups):
        return with_measure(result, found.measure)
    total = current.kept.total(found.measure, found.rows, lookups) if isinstance(lookups, Unevaluated) else None
    return dataclasses.replace(result, measure=total)
