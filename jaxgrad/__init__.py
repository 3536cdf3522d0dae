"""Per-example gradients in JAX, by hand and by `jax.grad`.

The names:

    network                 the exercise, log(1 + exp(-y wᵀσ(Wx + b))): its gradient by hand and through autodiff
    check_gradient          hold any hand-written gradient against `jax.grad`: a report, leaf by leaf
    assert_agree            the same as an assertion
    per_example_grad        per-example gradients of any loss, as factors; per_example_value_and_grad with the values
    per_example_jacobian    the gradients of all outputs of a model, the activations held once for them
    per_example_norms       the norms alone, with no more memory than a plain gradient
    explain                 what per_example_grad does with each parameter, and why
    clipped_grad            the sum of clipped gradients, with the bound of what one example can change
    curvature               Fisher and Gauss-Newton matrices as G: natural_gradient, fisher_vector_product, kfac_factors
    attribution             which examples matter: self_influence, influence, ntk, noise_scale, tracin
    streams                 results over more data than fits into memory, restartable
    blocks                  Gram matrices and influence for more examples than fit into memory
    PerExampleGrads         a batch of per-example gradients as factors: norms, clipping, Gram matrices, moments
"""

from jaxgrad import attribution, blocks, clipping, curvature, network, streams
from jaxgrad.agreement import assert_agree, check_gradient
from jaxgrad.attribution import influence, noise_scale, ntk, self_influence
from jaxgrad.clipping import ClipInfo, clipped_grad
from jaxgrad.curvature import fisher_vector_product, natural_gradient
from jaxgrad.per_example import (
    PerExampleGrads,
    PerExampleJacobian,
    explain,
    per_example_grad,
    per_example_jacobian,
    per_example_norms,
    per_example_value_and_grad,
)

__version__ = "0.1.0"
__all__ = [
    "ClipInfo",
    "PerExampleGrads",
    "PerExampleJacobian",
    "assert_agree",
    "attribution",
    "blocks",
    "check_gradient",
    "clipped_grad",
    "clipping",
    "curvature",
    "explain",
    "fisher_vector_product",
    "influence",
    "natural_gradient",
    "network",
    "noise_scale",
    "ntk",
    "per_example_grad",
    "per_example_jacobian",
    "per_example_norms",
    "per_example_value_and_grad",
    "self_influence",
    "streams",
]
