"""Products with matrices, and linear solves."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax

from jaxgrad import _jax
from jaxgrad.per_example.algebra.product import Product
from jaxgrad.per_example.interpreter import linear, products
from jaxgrad.per_example.interpreter.rules.record import Record, each, every
from jaxgrad.per_example.interpreter.values import Unevaluated, Value, array_of


def _keeps_dot_general(eqn: _jax.Equation, values: Sequence[Value]) -> Sequence[Value] | None:
    """Multiply an unevaluated product by a matrix, which is applied to one operand."""
    (lhs_c, rhs_c), (lhs_b, rhs_b) = eqn.params["dimension_numbers"]
    first = isinstance(values[0], Unevaluated)
    value, other = values if first else values[::-1]
    if isinstance(other, Unevaluated) or any(term.is_scaled_array for term in value.terms):
        return None  # an array times a matrix is a product of its own
    contracted = list(zip(lhs_c, rhs_c, strict=True) if first else zip(rhs_c, lhs_c, strict=True))
    batch = list(zip(lhs_b, rhs_b, strict=True) if first else zip(rhs_b, lhs_b, strict=True))
    C, precision = jnp.asarray(array_of(other)), eqn.params["precision"]
    result = each(eqn, value, lambda term: linear.contract(term, C, contracted, batch, first, precision))
    return None if result is None else [result]


def _makes_dot_general(eqn: _jax.Equation, values: Sequence[Value]) -> Product | None:
    p = eqn.params
    (lhs_c, rhs_c), (lhs_b, rhs_b) = p["dimension_numbers"]
    contracted, batch = list(zip(lhs_c, rhs_c, strict=True)), list(zip(lhs_b, rhs_b, strict=True))
    left, right = (jnp.asarray(array_of(value)) for value in values)
    return products.product(left, right, contracted, batch, p["precision"])


def _right_sides(eqn: _jax.Equation) -> range:
    """The right-hand sides of a linear solve; they are the last operands."""
    return range(len(eqn.invars) - len(eqn.outvars), len(eqn.invars))


RECORDS = {
    lax.dot_general_p: Record(
        _keeps_dot_general, makes=_makes_dot_general, operands=every, keeps_zero=False, bilinear=True
    ),
    lax.linear_solve_p: Record(operands=_right_sides),
    lax.linalg.triangular_solve_p: Record(operands=lambda eqn: (1,)),
}
