"""Influence: how much training on one example changes the loss on another, by the inverse of a curvature matrix."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxgrad.curvature.damping import checked_damping
from jaxgrad.curvature.gauss_newton import GaussNewton, rows_and_residuals
from jaxgrad.curvature.primal import (
    gradients_in_norm,
    gradients_times,
    inverse_of,
    is_tall,
    matrix_of,
    second_moments,
)
from jaxgrad.curvature.solve import damped_solve, in_full_precision, scaled_system
from jaxgrad.errors import naming
from jaxgrad.per_example.gradients import PerExampleGrads, checked_gradients


@naming("self_influence")
@in_full_precision
def self_influence(g: PerExampleGrads | GaussNewton, damping: Any = None) -> Float[Array, " B"]:
    """How much training on each example lowers the loss on this example; high for examples that are unlike all others.

    Formula: without a damping, ‖g_b‖², as in TracIn at one checkpoint; with a damping μ, g_bᵀ(GᵀG/B + μI)⁻¹g_b, which
    is computed from the Gram matrix. The latter is B times the leverage of the example, and lies between 0 and B for
    `PerExampleGrads`. Examples with wrong labels tend to have high scores of both kinds. Accuracy: as in
    `natural_gradient`.

    Args:
        g: gradients of B examples; or the result of `gauss_newton`, to take the Gauss-Newton matrix in place of GᵀG/B.
        damping: μ ≥ 0, or `jg.curvature.relative(ratio)`; None for ‖g_b‖² (`PerExampleGrads` only).

    Returns:
        [B], in float32 or wider.

    Raises:
        ValueError: the damping is not a number ≥ 0, or it is None for a Gauss-Newton matrix.

    Example:
        >>> g = jg.per_example_grad(lambda w, x: w @ x)(jnp.zeros(2), jnp.array([[1.0, 0], [1.0, 0], [0, 3.0]]))
        >>> self_influence(g).tolist(), self_influence(g, 0.0).round(3).tolist()
        ([1.0, 1.0, 9.0], [1.5, 1.5, 3.0])

    Source: Pruthi et al. 2020 (TracIn); Koh and Liang 2017.
    """
    rows, residuals = rows_and_residuals(g)
    if damping is None and not isinstance(g, GaussNewton):
        return g.squared_norms()
    checked_damping(damping)
    B, R = residuals.shape
    if not B:
        return residuals.sum(1)
    scaled, ridge, _ = scaled_system(rows, damping)
    if is_tall(rows):
        return B / R * gradients_in_norm(scaled, residuals, inverse_of(scaled, ridge))
    right = scaled.gram(scaled.scale(residuals.ravel()))
    inner = damped_solve(scaled.gram(), right, ridge)  # indexed by (row, column); the column is weighted by r
    own_blocks = jnp.diagonal(inner.reshape(B, R, B, R), axis1=0, axis2=2)  # [R, R, B]
    return B / R * jnp.einsum("klb,bk->b", own_blocks, residuals)


@naming("influence")
@in_full_precision
def influence(train: PerExampleGrads | GaussNewton, test: PerExampleGrads, damping: Any) -> Float[Array, "C B"]:
    """How much each test loss rises, to first order, if a training example is left out: > 0 helpful, < 0 harmful.

    Formula: test_cᵀ (GᵀG/n + μI)⁻¹ g_b / B, where g_b is the gradient of training example b, and GᵀG/n is the empirical
    Fisher matrix of the training gradients (n = B), or the Gauss-Newton matrix (n is then the number of rows of G, see
    `gauss_newton`). It is evaluated without further approximation: as (test Gᵀ)(GGᵀ + μn I)⁻¹, a form in which nothing
    cancels, or, if G has more rows than there are parameters, by a solve with GᵀG. For the Gauss-Newton matrix, a sum
    over the rows of each example follows, weighted by the residuals that `gauss_newton` defines. Accuracy: the error of
    each score is of the order of n·eps·κ·‖test_c‖/√(‖g_b‖² + μn), where κ is the condition number that
    `natural_gradient` defines. The error comes from rounding the inner products; it is relatively large if g_b is far
    shorter than the test gradient.

    Args:
        train: gradients of B training examples, or the result of `gauss_newton` for them.
        test: gradients of C test examples with respect to the same parameters.
        damping: μ ≥ 0, or `jg.curvature.relative(ratio)`.

    Returns:
        [C, B], in float32 or wider.

    Raises:
        ValueError: the damping is not a number ≥ 0, or the test gradients are with respect to different parameters.

    Example:
        >>> loss = lambda w, x, y: (w @ x - y) ** 2
        >>> gradients = lambda x, y: jg.per_example_grad(loss)(jnp.ones(2), jnp.array(x), jnp.array(y))
        >>> train, test = gradients([[1.0, 0], [1.0, 0], [0, 1.0]], [2.0, 0.0, 3.0]), gradients([[1.0, 0]], [3.0])
        >>> influence(train, test, 0.0).round(3).tolist()        # like the test example, against it, unrelated to it
        [[1.0, -1.0, 0.0]]

    Source: Koh and Liang 2017.
    """
    checked_damping(damping)
    rows, residuals = rows_and_residuals(train)
    checked_gradients(test)
    if not rows.batch_size:
        return rows.gram(test).T
    scaled, ridge, unit = scaled_system(rows, damping)
    if is_tall(rows):
        solved = damped_solve(second_moments(scaled), matrix_of(test).T.astype(ridge.dtype), ridge)
        return gradients_times(scaled, residuals, solved).T / unit
    weights = damped_solve(scaled.gram(), scaled.gram(test), ridge).T / unit
    return jnp.einsum("cbr,br->cb", weights.reshape(-1, *residuals.shape), residuals)
