"""Curvature from per-example gradients: products and solves with matrices GᵀG/n that are never materialized.

If G [n, parameters] is a `PerExampleGrads`, GᵀG/n is the empirical Fisher matrix; if its rows are those of
`gauss_newton`, GᵀG/n is the Gauss-Newton matrix. A solve takes the n × n Gram matrix GGᵀ instead. The diagonal of GᵀG/n
is `G.second_moment()`.

The modules:

    damping           relative: a damping as a multiple of the mean squared norm of the gradients
    fisher            products and solves with GᵀG/n; natural_gradient, and scale_by_natural_gradient for optax
    gauss_newton      the rows G for a model and a loss of its outputs; products without G, for many outputs
    hessian           products with the Hessian of a mean loss
    kronecker         the Kronecker factors of the Fisher matrix, for weight matrices whose gradient is a product
    joint             which bias is in one block with which weight, and their matrix
    kfac              the same from a loss, for products over many positions too
    ekfac             their eigenvectors with corrected eigenvalues: products and damped solves
    primal            the same solves with GᵀG, chosen where G has more rows than columns
    log_derivatives   O, the derivatives of log ψ for the samples of variational Monte Carlo
    reconfiguration   stochastic reconfiguration from O: minsr, spring, and scale_by_spring for optax
    rows              the rows of a Jacobian as one matrix
    solve             the solve with a Gram matrix
"""

from jaxgrad.curvature.damping import Relative, relative
from jaxgrad.curvature.ekfac import EKFAC, Eigenbasis, ekfac
from jaxgrad.curvature.fisher import (
    NaturalGradientState,
    fisher_solve,
    fisher_vector_product,
    natural_gradient,
    scale_by_natural_gradient,
)
from jaxgrad.curvature.gauss_newton import (
    GaussNewton,
    OutputLoss,
    gauss_newton,
    gauss_newton_vector_product,
    logistic,
    softmax,
    squared,
)
from jaxgrad.curvature.hessian import hessian_vector_product
from jaxgrad.curvature.joint import Bias
from jaxgrad.curvature.kfac import kfac
from jaxgrad.curvature.kronecker import KroneckerFactors, kfac_factors
from jaxgrad.curvature.log_derivatives import LogDerivatives, log_derivatives
from jaxgrad.curvature.reconfiguration import SpringState, centered_gram, minsr, scale_by_spring, spring
from jaxgrad.curvature.solve import damped_solve

__all__ = [
    "EKFAC",
    "Bias",
    "Eigenbasis",
    "GaussNewton",
    "KroneckerFactors",
    "LogDerivatives",
    "NaturalGradientState",
    "OutputLoss",
    "Relative",
    "SpringState",
    "centered_gram",
    "damped_solve",
    "ekfac",
    "fisher_solve",
    "fisher_vector_product",
    "gauss_newton",
    "gauss_newton_vector_product",
    "hessian_vector_product",
    "kfac",
    "kfac_factors",
    "log_derivatives",
    "logistic",
    "minsr",
    "natural_gradient",
    "relative",
    "scale_by_natural_gradient",
    "scale_by_spring",
    "softmax",
    "spring",
    "squared",
]
