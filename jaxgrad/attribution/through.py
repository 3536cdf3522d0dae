"""Influence through any curvature matrix: from solves with it, or from its products by conjugate gradients."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from jaxgrad.curvature.damping import absolute_damping, checked_damping
from jaxgrad.errors import naming
from jaxgrad.per_example.algebra.scales import power_of_two
from jaxgrad.per_example.gradients import PerExampleGrads, checked_gradients
from jaxgrad.per_example.serialized import named_tuple

AT_ONCE = 8
"""How many test examples are solved for at once."""


@named_tuple
class InfluenceByCG(NamedTuple):
    """What `influence_by_cg` returns.

    Attributes:
        scores: [C, B], as those of `influence`.
        residuals: [C], ‖test_c - (H + μI)x_c‖ / ‖test_c‖; above the tolerance where the steps did not suffice or the
            damped matrix is not positive definite, and the scores are then not to be trusted.

    Example:
        >>> g = jg.per_example_grad(lambda w, x: w @ x)(jnp.zeros(2), jnp.eye(2))
        >>> influence_by_cg(lambda v: v, g, g, 1.0).residuals.tolist()
        [0.0, 0.0]
    """

    scores: Array
    residuals: Array


@naming("influence_by_cg")
def influence_by_cg(
    product: Callable[[PyTree], PyTree],
    train: PerExampleGrads,
    test: PerExampleGrads,
    damping: Any,
    *,
    tolerance: float = 1e-4,
    max_steps: int = 100,
) -> InfluenceByCG:
    """`influence` through any curvature matrix H of which only products H v are known, by conjugate gradients.

    Formula: test_cᵀ (H + μI)⁻¹ g_b / B. Cost: for each test example, at most `max_steps` products, and one more for
    the residual; a few test examples are solved for at once. Neither H nor the gradients are materialized, but for the
    test gradients that are being solved for.

    Args:
        product: v → H v, linear, symmetric, for trees like the parameters. The matrix of the published method is the
            Hessian of the mean training loss, `jg.curvature.hessian_vector_product`; the Gauss-Newton matrix,
            `jg.curvature.gauss_newton_vector_product`, has no negative eigenvalues.
        train: gradients of B training examples.
        test: gradients of C test examples with respect to the same parameters.
        damping: μ ≥ 0, larger than minus the smallest eigenvalue of H; or `jg.curvature.relative(ratio)`, for a
            multiple of the mean squared norm of the training gradients.
        tolerance: the relative residual at which a solve ends.
        max_steps: the largest number of steps of a solve.

    Returns:
        `InfluenceByCG`: the scores [C, B], in float32 or wider, and how well each system is solved.

    Raises:
        ValueError: the damping is not a number ≥ 0, or the test gradients are with respect to different parameters.

    Example:
        >>> model, params = (lambda w, x: w @ x), jnp.ones((1, 2))
        >>> loss = lambda w, x, y: jg.curvature.squared.value(model(w, x), y)
        >>> x, y = jnp.array([[1.0, 0], [1.0, 0], [0, 1.0]]), jnp.array([[2.0], [0.0], [3.0]])
        >>> g = jg.per_example_grad(loss)(params, x, y)
        >>> hessian = jg.curvature.hessian_vector_product(loss)
        >>> found = influence_by_cg(lambda v: hessian(params, v, x, y), g, g[:1], 1e-3)
        >>> found.scores.round(2).tolist()
        [[0.5, -0.5, 0.0]]

    Source: Koh and Liang 2017; Martens 2010.
    """
    checked_damping(damping)
    checked_gradients(train)
    norms = train.norms()
    wide = norms.dtype
    mu = jnp.asarray(absolute_damping(damping, (norms**2).mean()), wide)
    shapes = jax.eval_shape(test.sum)

    def damped(v: PyTree) -> PyTree:
        narrow = jax.tree.map(lambda a, p: a.astype(p.dtype), v, shapes)
        return jax.tree.map(lambda a, h: h.astype(a.dtype) + mu.astype(a.dtype) * a, v, product(narrow))

    def solve(right: PyTree) -> tuple[PyTree, Array]:
        x, _ = jax.scipy.sparse.linalg.cg(damped, right, tol=tolerance, maxiter=max_steps)
        rest, length = _length(jax.tree.map(jnp.subtract, right, damped(x))), _length(right)
        return x, rest / jnp.where(length == 0, jnp.ones_like(length), length)

    return InfluenceByCG(*_through(solve, train, test))


@naming("influence_through")
def influence_through(
    solve: Callable[[PyTree], PyTree], train: PerExampleGrads, test: PerExampleGrads
) -> Float[Array, "C B"]:
    """`influence` through the inverse of any curvature matrix, such as that of `jg.curvature.ekfac`.

    Formula: solve(test_c)ᵀ g_b / B. Cost: one solve for each test example, a few at once; the training gradients are
    not materialized.

    Args:
        solve: v → (H + μI)⁻¹ v, for trees like the parameters.
        train: gradients of B training examples.
        test: gradients of C test examples with respect to the same parameters.

    Returns:
        [C, B], in float32 or wider.

    Raises:
        ValueError: the test gradients are with respect to different parameters than the training gradients.

    Example:
        >>> loss = lambda W, x, y: ((W @ x - y) ** 2).sum()
        >>> g = jg.per_example_grad(loss)(jnp.ones((3, 2)), jnp.eye(2), jnp.zeros((2, 3)))
        >>> F = jg.curvature.ekfac(jg.curvature.kfac(loss)(jnp.ones((3, 2)), jnp.eye(2), jnp.zeros((2, 3))), g)
        >>> influence_through(lambda v: F.solve(v, damping=2.0), g, g[:1]).round(3).tolist()
        [[0.75, 0.0]]

    Source: Grosse et al. 2023.
    """
    checked_gradients(train)
    return _through(lambda v: (solve(v), jnp.zeros(())), train, test)[0]


def _through(
    solve: Callable[[PyTree], tuple[PyTree, Array]], train: PerExampleGrads, test: PerExampleGrads
) -> tuple[Array, Array]:
    """(solve(test_c)ᵀ g_b / B [C, B], what else `solve` returns [C])."""
    checked_gradients(test)
    train._same_parameters(test)
    norms = test.norms()
    B, C, wide = train.batch_size, test.batch_size, norms.dtype
    if not (B and C):
        return jnp.zeros((C, B), wide), jnp.zeros(C, wide)

    def one(c: Array) -> tuple[Array, Array]:
        chosen = (jnp.arange(C) == c).astype(wide)
        unit = power_of_two((norms * chosen).max())  # no square in the solve overflows or underflows
        x, more = solve(test.weighted_sum(chosen / unit, wide))
        return unit * train.dot(x) / B, more

    return lax.map(one, jnp.arange(C), batch_size=AT_ONCE)


def _length(tree: PyTree) -> Float[Array, ""]:
    return jnp.sqrt(sum((jnp.abs(a) ** 2).sum() for a in jax.tree.leaves(tree)))  # type: ignore[arg-type]
