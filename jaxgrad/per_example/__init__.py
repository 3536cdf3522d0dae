"""Per-example gradients kept as factors.

What users meet:

    transform     per_example_grad, per_example_value_and_grad
    jacobian      per_example_jacobian: the gradients of all outputs
    measure       per_example_norms: norms with a plain gradient's memory
    second_pass   the sum of weighted gradients as an ordinary gradient
    explain       what is done with each parameter, and why
    gradients     PerExampleGrads: the algebra over a tree of parameters
    checks        what comes into its methods: masks, indices, numbers, bounds
    arguments     which arguments are parameters, which carry examples, which are shared
    frameworks    what to do with a Flax, Equinox or Keras model that is given whole
    serialized    how jax.export writes gradients down

Two wings, and the module where they meet:

    algebra/      what a per-example gradient is, and what can be asked of it
    interpreter/  how it is found in the program that jax.grad has written
    lower         from what the interpreter found to factors, and the cost model: what is kept and what is written out
"""

from jaxgrad.per_example.algebra.factors import Dense, Factor, Outer, Rows, Windows
from jaxgrad.per_example.algebra.layout import Layout
from jaxgrad.per_example.algebra.mapped import Common, Mapped, Same
from jaxgrad.per_example.explain import Explanation, Row, explain
from jaxgrad.per_example.gradients import PerExampleGrads
from jaxgrad.per_example.jacobian import PerExampleJacobian, per_example_jacobian
from jaxgrad.per_example.measure import per_example_norms
from jaxgrad.per_example.transform import per_example_grad, per_example_value_and_grad

__all__ = [
    "Common",
    "Dense",
    "Explanation",
    "Factor",
    "Layout",
    "Mapped",
    "Outer",
    "PerExampleGrads",
    "PerExampleJacobian",
    "Row",
    "Rows",
    "Same",
    "Windows",
    "explain",
    "per_example_grad",
    "per_example_jacobian",
    "per_example_norms",
    "per_example_value_and_grad",
]
