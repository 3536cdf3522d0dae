"""Curvature from per-example gradients: matrices of [parameters, parameters] as G, and steps by one B × B solve.

G [n, parameters] is a `PerExampleGrads`, and GᵀG/n, which is never formed, the empirical Fisher matrix; with the rows
of `gauss_newton` it is the Gauss-Newton matrix. Its diagonal is `G.second_moment()`.

The files:

    fisher         products and solves with it; natural_gradient, and scale_by_natural_gradient for optax
    gauss_newton   rows G for a model and a loss of its outputs; products for large outputs
    kronecker      the Kronecker factors of every matrix
    solve          the B × B solve by itself
"""

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
from jaxgrad.curvature.kronecker import KroneckerFactors, kfac_factors
from jaxgrad.curvature.solve import damped_solve

__all__ = [
    "GaussNewton",
    "KroneckerFactors",
    "NaturalGradientState",
    "OutputLoss",
    "damped_solve",
    "fisher_solve",
    "fisher_vector_product",
    "gauss_newton",
    "gauss_newton_vector_product",
    "kfac_factors",
    "logistic",
    "natural_gradient",
    "scale_by_natural_gradient",
    "softmax",
    "squared",
]
