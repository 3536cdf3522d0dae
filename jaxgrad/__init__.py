"""Per-example gradients in JAX, by hand and by `jax.grad`.

The package's public names:

    network                 the exercise, log(1 + exp(-y wᵀσ(Wx + b))): its gradient by hand and by autodiff
    check_gradient          compare any hand-written gradient with `jax.grad`: a report, leaf by leaf
    assert_agree            the same comparison as an assertion
    per_example_grad        factored per-example gradients of any loss; per_example_value_and_grad adds the values
    per_example_jacobian    the gradients of all outputs of a model, with the activations held once
    per_example_norms       the norms alone, with no more memory than a plain gradient
    explain                 what per_example_grad does with each parameter, and why
    clipped_grad            the sum of clipped gradients, with a bound on how far one example can move it
    curvature               Fisher and Gauss-Newton matrices: natural_gradient, fisher_vector_product, kfac_factors
    attribution             which examples matter: self_influence, influence, ntk, noise_scale, tracin
    streams                 results over data sets that do not fit in memory, restartable
    blocks                  Gram matrices and influence for data sets whose gradients do not fit in memory
    PerExampleGrads         a batch of factored per-example gradients: norms, clipping, Gram matrices, moments
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
