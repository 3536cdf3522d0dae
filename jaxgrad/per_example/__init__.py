"""Per-example gradients kept as factors.

factors      what one parameter's gradients are made of: Outer, Rows, Dense
pairs        inner products of two factors, for every pair of kinds
chunks       loops that write out no more at once than a stated number of bytes
norms        of one parameter's gradients, and of several together
moments      second moment and variance, element by element
gradients    PerExampleGrads: the algebra over a tree of factors
"""

from jaxgrad.per_example.explain import Explanation, explain
from jaxgrad.per_example.factors import Dense, Factor, Layout, Outer, Rows
from jaxgrad.per_example.gradients import PerExampleGrads
from jaxgrad.per_example.transform import per_example_grad, per_example_value_and_grad

__all__ = [
    "Dense",
    "Explanation",
    "Factor",
    "Layout",
    "Outer",
    "PerExampleGrads",
    "Rows",
    "explain",
    "per_example_grad",
    "per_example_value_and_grad",
]
