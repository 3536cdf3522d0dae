"""Products and solves with GᵀG/n, without approximation for any number of parameters; a solve takes a Gram matrix."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxgrad.curvature.damping import Relative, absolute_damping, checked_damping
from jaxgrad.curvature.gauss_newton import GaussNewton, rows_and_residuals
from jaxgrad.curvature.primal import is_tall, second_moments, tree_of, vector_of
from jaxgrad.curvature.rows import widened_rows
from jaxgrad.curvature.solve import damped_solve, in_full_precision, scaled_system
from jaxgrad.errors import naming
from jaxgrad.per_example.gradients import PerExampleGrads
from jaxgrad.per_example.serialized import named_tuple


@naming("fisher_vector_product")
def fisher_vector_product(g: PerExampleGrads | GaussNewton, v: PyTree) -> PyTree:
    """GᵀG v / n: the empirical Fisher matrix times a direction.

    Cost: two matrix products per factor.

    Args:
        g: n gradients; or the result of `gauss_newton`, for the Gauss-Newton matrix.
        v: a direction with the parameters' structure and shapes.

    Returns:
        A tree with the parameters' shapes and dtypes.

    Raises:
        ValueError: the direction does not have the tree and the shapes of the parameters.

    Example:
        >>> g = jg.per_example_grad(lambda w, x: w @ x)(jnp.zeros(3), jnp.eye(3))
        >>> fisher_vector_product(g, jnp.array([3.0, 6.0, 9.0])).tolist()
        [1.0, 2.0, 3.0]
    """
    rows, _ = rows_and_residuals(g)
    return widened_rows(rows).weighted_sum(rows.dot(v) / max(rows.batch_size, 1))


@naming("natural_gradient")
@in_full_precision
def natural_gradient(g: PerExampleGrads | GaussNewton, damping: Any) -> PyTree:
    """(GᵀG/n + μI)⁻¹ ḡ without approximation, for any number of parameters; ḡ is the mean gradient.

    Formula: Gᵀ(GGᵀ + μn I)⁻¹ r, a weighted sum of the gradients, where ḡ = Gᵀr/n; r = 1 for `PerExampleGrads`. Cost:
    the Gram matrix, an n × n solve and the sum. With more gradients than parameters, GᵀG is computed instead, from a
    few materialized gradients at a time.

    Accuracy: the relative error is of the order of n·eps·κ, where κ is the condition number of GGᵀ + μn I with its rows
    and columns scaled to a unit diagonal. κ may be too large for the dtype, for example if gradients are linearly
    dependent and μ is near 0. The eigenvectors of GGᵀ with eigenvalues below n·eps times the largest are then left out;
    if μ = 0, the result is the shortest least-squares solution of Gd = r at that numerical rank. Gradients are first
    scaled by a power of two, so that no square of a norm overflows or underflows.

    Edge cases: a gradient of zero counts in n and has no other effect. The result is zero if all gradients are zero,
    and NaN if n = 0 or a gradient is not finite.

    Args:
        g: n gradients, for the empirical Fisher matrix; or the result of `gauss_newton`, for the Gauss-Newton matrix.
        damping: μ ≥ 0, or `relative(ratio)`.

    Returns:
        A tree with the parameters' shapes and dtypes. Subtract it from the parameters to take a step.

    Raises:
        ValueError: the damping is not a number ≥ 0.

    Example:
        >>> g = jg.per_example_grad(lambda w, x: w @ x)(jnp.zeros(3), jnp.eye(3))
        >>> natural_gradient(g, 1 / 3).round(4).tolist()            # (I/3 + I/3)⁻¹ (1/3, 1/3, 1/3)
        [0.5, 0.5, 0.5]

    Source: Amari 1998; the form with the Gram matrix is from Ren and Goldfarb 2019.
    """
    checked_damping(damping)
    rows, residuals = rows_and_residuals(g)
    if not rows.batch_size:
        return rows.mean()
    scaled, ridge, unit = scaled_system(rows, damping)
    shapes = jax.eval_shape(rows.sum)
    if is_tall(rows):
        gradient = scaled.weighted_sum(residuals.ravel(), ridge.dtype)
        step = damped_solve(second_moments(scaled), vector_of(gradient, ridge.dtype), ridge)
        total = tree_of(step, shapes)
    else:
        weights = damped_solve(scaled.gram(), residuals.ravel(), ridge)
        total = scaled.weighted_sum(weights, ridge.dtype)
    return jax.tree.map(lambda a, p: (a / unit.astype(a.dtype)).astype(p.dtype), total, shapes)


@naming("fisher_solve")
@in_full_precision
def fisher_solve(g: PerExampleGrads | GaussNewton, v: PyTree, damping: Any) -> PyTree:
    """(GᵀG/n + μI)⁻¹ v without approximation, for any direction v and μ > 0.

    Formula: (v - Gᵀ(GGᵀ + μn I)⁻¹Gv)/μ (Woodbury), and one step of iterative refinement, because the two terms of the
    difference cancel if μ is far below λ, the largest eigenvalue of GᵀG/n. The relative error is of the order of
    eps·λ/μ. If there are more gradients than parameters, a solve with GᵀG replaces this. For v = ḡ use
    `natural_gradient`, in which nothing cancels.

    Args:
        g: n gradients, or the result of `gauss_newton`.
        v: a direction with the parameters' structure and shapes.
        damping: μ > 0, or `relative(ratio)`.

    Returns:
        A tree with the parameters' shapes and dtypes.

    Raises:
        ValueError: the damping is not a number > 0, or the direction does not have the tree and the shapes of the
            parameters.

    Example:
        >>> g = jg.per_example_grad(lambda w, x: w @ x)(jnp.zeros(3), jnp.eye(3)[:1])
        >>> fisher_solve(g, jnp.ones(3), 1.0).tolist()
        [0.5, 1.0, 1.0]
    """
    checked_damping(damping, positive=True)
    matrix, _ = rows_and_residuals(g)
    n, shapes = matrix.batch_size, jax.eval_shape(matrix.sum)
    if not n:
        mu = absolute_damping(damping, jnp.nan)
        return jax.tree.map(lambda a, p: (a / mu).astype(p.dtype), v, shapes)
    scaled, ridge, unit = scaled_system(matrix, damping)
    if is_tall(matrix):
        found = damped_solve(second_moments(scaled), n * vector_of(v, ridge.dtype), ridge) / unit / unit
        return jax.tree.map(lambda a, p: a.astype(p.dtype), tree_of(found, shapes), shapes)
    K, mu = scaled.gram(), ridge / n

    def combine_rows(c: Array) -> PyTree:
        return scaled.weighted_sum(c, ridge.dtype)

    def solve(v: PyTree) -> PyTree:
        correction = combine_rows(damped_solve(K, scaled.dot(v), ridge))
        return jax.tree.map(lambda a, b: (a - b) / mu.astype(b.dtype), v, correction)

    wide_shapes = jax.eval_shape(combine_rows, jnp.zeros(n, ridge.dtype))
    v = jax.tree.map(lambda a, b: jnp.asarray(a).astype(b.dtype), v, wide_shapes)
    solution = solve(v)
    product = combine_rows(scaled.dot(solution) / n)
    residual = jax.tree.map(lambda a, b, x: a - (b + mu.astype(x.dtype) * x), v, product, solution)

    def finish(a: Array, b: Array, p: Any) -> Array:
        return ((a + b) / unit.astype(a.dtype) / unit.astype(a.dtype)).astype(p.dtype)

    return jax.tree.map(finish, solution, solve(residual), shapes)


@named_tuple
class NaturalGradientState(NamedTuple):
    """The state of `scale_by_natural_gradient`.

    Attributes:
        count: number of updates so far, the argument of a damping schedule.

    Example:
        >>> scale_by_natural_gradient(0.1).init(jnp.zeros(3)).count.item()
        0
    """

    count: Array  # type: ignore[assignment]  # the name that optax uses; tuple.count is not used


def scale_by_natural_gradient(damping: float | Relative | Callable[[Array], Any]) -> Any:
    """`natural_gradient` as an optax transformation, whose updates are `PerExampleGrads` or `GaussNewton`.

    Put this transformation first in a chain: its `update(g, state, params)` takes the per-example gradients, where
    other transformations take the mean gradient, and returns a tree like the parameters.

    Args:
        damping: μ ≥ 0, or `relative(ratio)`, or a schedule: update count → either.

    Returns:
        An `optax.GradientTransformation`.

    Raises:
        ImportError: optax is not installed.
        TypeError: `update` is called with anything other than PerExampleGrads or GaussNewton.

    Example:
        >>> import optax
        >>> optimizer = optax.chain(scale_by_natural_gradient(0.5), optax.scale(-1.0))
        >>> w = jnp.zeros(3)
        >>> state = optimizer.init(w)
        >>> g = jg.per_example_grad(lambda w, x: (w @ x - 1) ** 2)(w, jnp.eye(3))
        >>> updates, state = optimizer.update(g, state, w)
        >>> optax.apply_updates(w, updates).round(3).tolist()
        [0.364, 0.364, 0.364]
    """
    import optax

    def init(params: PyTree) -> NaturalGradientState:
        del params
        return NaturalGradientState(jnp.zeros((), jnp.int32))

    def update(g: Any, state: NaturalGradientState, params: PyTree = None) -> tuple[PyTree, NaturalGradientState]:
        del params
        if not isinstance(g, PerExampleGrads | GaussNewton):
            raise TypeError(
                f"scale_by_natural_gradient: expected PerExampleGrads or GaussNewton as updates, got "
                f"{type(g).__name__}. Put it first in the chain, and update with "
                f"jg.per_example_grad(loss)(params, *batch)."
            )
        mu = damping(state.count) if callable(damping) else damping
        return natural_gradient(g, mu), NaturalGradientState(state.count + 1)

    return optax.GradientTransformation(init, update)
