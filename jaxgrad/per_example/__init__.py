"""Per-example gradients held as factors.

These modules hold the public functions and classes:

    transform     per_example_grad, per_example_value_and_grad
    jacobian      per_example_jacobian: the gradients of all outputs
    measure       per_example_norms: norms in about the memory of a plain gradient
    explain       how each parameter's gradient is held, and why
    gradients     PerExampleGrads: the algebra over a tree of parameters
    custom_primitives
                  register_rule: teach the interpreter your own primitive
    rule_check    check_rule: test a registered rule

These modules support them:

    factor_tree   the base class of PerExampleGrads: its factors as a pytree, without the algebra
    masks_and_bounds
                  checks of what its methods take: masks, indices, numbers, bounds
    arguments     which arguments are parameters, which are batched, which are shared
    microbatches  a loop over microbatches
    second_pass   the sum of weighted gradients as an ordinary gradient, for clipped_grad
    frameworks    advice in errors for models of Flax and Equinox
    serialized    serialization by jax.export

The implementation has two halves, and a module that joins them:

    algebra/      the kinds of factors and the operations on them
    interpreter/  evaluates the jaxpr of the gradient, but leaves its last products unevaluated
    lower         converts unevaluated products to factors
"""

from jaxgrad.per_example.algebra.constructors import Dense, Outer, Rows
from jaxgrad.per_example.algebra.factors import Factor
from jaxgrad.per_example.algebra.layout import Layout
from jaxgrad.per_example.algebra.mapped import Common, Mapped, Same
from jaxgrad.per_example.algebra.product import Product
from jaxgrad.per_example.custom_primitives import RegisteredRule, register_rule
from jaxgrad.per_example.explain import Explanation, ExplanationRow, explain
from jaxgrad.per_example.gradients import PerExampleGrads
from jaxgrad.per_example.jacobian import PerExampleJacobian, per_example_jacobian
from jaxgrad.per_example.measure import per_example_norms
from jaxgrad.per_example.rule_check import RuleReport, RuleRow, check_rule
from jaxgrad.per_example.transform import per_example_grad, per_example_value_and_grad

__all__ = [
    "Common",
    "Dense",
    "Explanation",
    "ExplanationRow",
    "Factor",
    "Layout",
    "Mapped",
    "Outer",
    "PerExampleGrads",
    "PerExampleJacobian",
    "Product",
    "RegisteredRule",
    "Rows",
    "RuleReport",
    "RuleRow",
    "Same",
    "check_rule",
    "explain",
    "per_example_grad",
    "per_example_jacobian",
    "per_example_norms",
    "per_example_value_and_grad",
    "register_rule",
]
