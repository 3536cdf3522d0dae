"""A weight that is used twice: in a product, and as a table whose rows are looked up, such as a tied embedding.

The product's gradient is complete long before that of the lookups, and the norm of their sum has cross terms. Of the
product, these need only the rows that are looked up. So it is measured where it is complete, and its rows are kept.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxgrad import _jax
from jaxgrad.per_example.interpreter.measuring import Measure, Target, measure_of, measurer, with_measure
from jaxgrad.per_example.interpreter.rules import made_product
from jaxgrad.per_example.interpreter.values import Plain, Unevaluated, Value, array_of, is_zero, zero


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
    """The sums that have a target, each by its variable and by that of the product."""
    current = measurer()
    scatters = {eqn.outvars[0]: eqn for eqn in jaxpr.eqns if eqn.primitive is lax.scatter_add_p}
    if current is None or current.kept is None or not scatters:
        return {}
    used = [*(v for eqn in jaxpr.eqns for v in eqn.invars), *jaxpr.outvars]
    uses = Counter(v for v in used if not isinstance(v, _jax.Literal))
    found: dict[Any, Sum] = {}
    for eqn in jaxpr.eqns:
        terms = [v for v in eqn.invars if not isinstance(v, _jax.Literal) and uses[v] == 1]
        if eqn.primitive is _jax.add_any_p and len(terms) == 2 and eqn.outvars[0] in targets:
            for product, lookups in (terms, terms[::-1]):
                if lookups in scatters and product not in scatters:
                    found |= dict.fromkeys((product, eqn.outvars[0]), Sum(product, lookups, scatters[lookups]))
    return found


def measured(
    eqn: _jax.Equation, results: Sequence[Value], sums: dict[Any, Sum], known: dict[Any, Value]
) -> Sequence[Value]:
    """The results of an equation: a product of a sum has a `Kept` attached, and a sum its measure."""
    sum_ = sums.get(eqn.outvars[0]) if eqn.outvars else None
    if sum_ is None:
        return results
    of_product = eqn.outvars[0] is sum_.product
    return [_kept(results[0], sum_, known) if of_product else _measured(results[0], sum_, known)]


def _kept(value: Value, sum_: Sum, known: dict[Any, Value]) -> Value:
    """Unchanged if the ids are not known yet, or if the product has another form."""
    current, (table, indices, updates) = measurer(), sum_.scatter.invars
    if current is None or current.kept is None or not isinstance(value, Unevaluated) or is_zero(value):
        return value
    if isinstance(indices, _jax.Literal) or indices not in known or measure_of(value) is not None:
        return value
    nothing = zero(table.aval.shape, table.aval.dtype)
    empty = jnp.zeros(updates.aval.shape, updates.aval.dtype)
    lookups = made_product(sum_.scatter, [nothing, array_of(known[indices]), empty])
    if not isinstance(lookups, Unevaluated):
        return value
    rows = current.kept.rows(value, lookups)
    return value if rows is None else with_measure(value, Kept(current.one(value, value.shape, value.dtype, ()), rows))


def _measured(result: Value, sum_: Sum, known: dict[Any, Value]) -> Value:
    """Without a measure if that of the product is not kept."""
    current, found, lookups = measurer(), measure_of(known[sum_.product]), known[sum_.lookups]
    if current is None or current.kept is None or not isinstance(found, Kept):
        return result
    if is_zero(lookups):
        return with_measure(result, found.measure)
    total = current.kept.total(found.measure, found.rows, lookups) if isinstance(lookups, Unevaluated) else None
    return dataclasses.replace(result, measure=total) if isinstance(result, Unevaluated | Plain) else result
