"""Per-example gradients kept as factors.

The algebra:

    factors      what one parameter's gradients are made of: Outer, Rows, Windows, Dense
    layout       where the entries of a factor lie in the parameter
    windows      a convolution as a product: an image, and the windows of it that the kernel meets
    pairs        inner products of two factors, for every pair of kinds
    rows         equal ids of an embedding's gradient brought together
    sums         sums over very many examples, in blocks
    boxes        one factor in place of many that lie side by side
    chunks       loops that write out no more at once than a stated number of bytes
    mapped       what is behind a map that all examples share, and penalties: Mapped, Common
    scaled       norms of what a map scales entry by entry
    norms        of one parameter's gradients, and of several together
    moments      second moment and variance, element by element
    leaf         the gradients of one parameter: a sum of factors times one number an example
    serialized   how jax.export writes them down
    gradients    PerExampleGrads: the algebra over a tree of parameters

The transformation:

    transform    per_example_grad, per_example_value_and_grad
    jacobian     per_example_jacobian: the gradients of all outputs
    arguments    which arguments are parameters, which carry examples, which are shared
    walk         evaluate a gradient's program, leaving its last products undone
    control      loops and branches
    products     the primitives that end a matrix's gradient
    rules        one rule per primitive: what it does to an undone product
    undone       an undone product: two operands and which of their axes lie where
    moves        one transposed, reshaped, sliced, put into something larger
    linear       one scaled, masked, summed, multiplied by a matrix
    through      what no rule can do to operands, as a map that all examples share
    maps         such maps: recorded, applied, transposed
    values       what else a variable may stand for during the walk
    finish       from undone products to factors, and the cost model
    explain      what is done with each parameter, and why
"""

from jaxgrad.per_example.explain import Explanation, Row, explain
from jaxgrad.per_example.factors import Dense, Factor, Outer, Rows, Windows
from jaxgrad.per_example.gradients import PerExampleGrads
from jaxgrad.per_example.jacobian import PerExampleJacobian, per_example_jacobian
from jaxgrad.per_example.layout import Layout
from jaxgrad.per_example.mapped import Common, Mapped, Same
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
    "per_example_value_and_grad",
]
