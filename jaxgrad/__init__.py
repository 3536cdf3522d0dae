"""Per-example gradients in JAX, by hand and by `jax.grad`.

The names:

    network                 the exercise, log(1 + exp(-y wᵀσ(Wx + b))): its gradient by hand and through autodiff
    check_gradient          hold any hand-written gradient against `jax.grad`: a report, leaf by leaf
    assert_agree            the same as an assertion
    per_example_grad        per-example gradients of any loss, as factors; per_example_value_and_grad with the values
    explain                 what per_example_grad does with each parameter, and why
    clipped_grad            the sum of clipped gradients, with the bound of what one example can change
    streams                 results over more data than fits into memory, restartable
    PerExampleGrads         a batch of per-example gradients as factors: norms, clipping, Gram matrices, moments
"""

from jaxgrad import clipping, network, streams
from jaxgrad.agreement import assert_agree, check_gradient
from jaxgrad.clipping import ClipInfo, clipped_grad
from jaxgrad.per_example import PerExampleGrads, explain, per_example_grad, per_example_value_and_grad

__version__ = "0.1.0"
__all__ = [
    "ClipInfo",
    "PerExampleGrads",
    "assert_agree",
    "check_gradient",
    "clipped_grad",
    "clipping",
    "explain",
    "network",
    "per_example_grad",
    "per_example_value_and_grad",
    "streams",
]
