"""Per-example gradients in JAX: held as factors for any loss, and derived by hand for one.

The transforms take the loss, or the model, of a single example:

    per_example_grad        factored per-example gradients; per_example_value_and_grad adds the values
    per_example_norms       the losses and the norms, in about the memory of a plain gradient
    per_example_jacobian    the gradients of all outputs of a model, with the activations held once
    clipped_grad            the sum of clipped gradients, with a bound on how far one example can move it
    explain                 what per_example_grad does with each parameter, and why
    check_gradient          compare any hand-written gradient with `jax.grad`: a report, leaf by leaf
    assert_agree            the same comparison as an assertion
    register_rule           teach per_example_grad your own primitive, such as a Pallas kernel

Most of them return a PerExampleGrads or a PerExampleJacobian; clipped_grad returns a ClipInfo with the sum.

The modules:

    attribution    which examples matter: influence, self_influence, ntk, noise_scale, tracin
    curvature      Fisher and Gauss-Newton matrices: natural_gradient, fisher_vector_product, kfac_factors, minsr
    streams        data sets that do not fit in memory: results on disk, Gram matrices and influence from batches
    clipping       weightings for clipped_grad
    agreement      reports of comparisons with `jax.grad`
    per_example    the kinds of factors that PerExampleGrads holds
    network        the exercise, log(1 + exp(-y wᵀσ(Wx + b))): its gradient by hand and by autodiff
"""

from jaxgrad import agreement, attribution, clipping, curvature, network, per_example, streams
from jaxgrad.agreement import assert_agree, check_gradient
from jaxgrad.clipping import ClipInfo, clipped_grad
from jaxgrad.per_example import (
    PerExampleGrads,
    PerExampleJacobian,
    explain,
    per_example_grad,
    per_example_jacobian,
    per_example_norms,
    per_example_value_and_grad,
    register_rule,
)

__version__ = "0.1.0"
__all__ = [
    "ClipInfo",
    "PerExampleGrads",
    "PerExampleJacobian",
    "agreement",
    "assert_agree",
    "attribution",
    "check_gradient",
    "clipped_grad",
    "clipping",
    "curvature",
    "explain",
    "network",
    "per_example",
    "per_example_grad",
    "per_example_jacobian",
    "per_example_norms",
    "per_example_value_and_grad",
    "register_rule",
    "streams",
]
