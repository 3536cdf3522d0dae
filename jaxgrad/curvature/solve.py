"""Solving with a Gram matrix, of any rank."""

from typing import Any

import jax
import jax.numpy as jnp
import jax.scipy as jsp
from jax import lax
from jaxtyping import Array, Float

from jaxgrad.per_example.factors import power_of_two
from jaxgrad.per_example.gradients import PerExampleGrads
from jaxgrad.sharding import gathered

EXACT = lax.Precision.HIGHEST  # of a Gram matrix that is solved with: accelerators round more unless told
MARGIN = 10.0  # how far above what rounding leaves of K its damping is for a Cholesky decomposition


def damped_solve(K: Float[Array, "N N"], b: Float[Array, "N ..."], ridge: Float[Array, ""] | float) -> Array:
    """(K + ridge·I)⁻¹ b for a Gram matrix K = GGᵀ: symmetric, without negative eigenvalues, of any rank.

    K is known to about n·eps·λ, λ its largest eigenvalue. A ridge well above that makes it a Cholesky decomposition;
    otherwise eigenvectors with eigenvalues up to n·eps·λ are left out, as a pseudo-inverse does: what rounding left in
    them would come back magnified. Derivatives are those of the solution, by the same solve.

    Args:
        K: [n, n], float32 or float64.
        b: [n], or [n, m] for several at once, of K's dtype.
        ridge: a number ≥ 0.

    Returns:
        Of b's shape; NaN where K or b is not finite.

    Raises:
        ValueError: shapes that do not fit.

    Example:
        >>> damped_solve(jnp.array([[1.0, 1.0], [1.0, 1.0]]), jnp.ones(2), 0.0).round(4).tolist()
        [0.5, 0.5]
    """
    if K.ndim != 2 or K.shape[0] != K.shape[1] or b.shape[:1] != K.shape[:1]:
        raise ValueError(f"damped_solve: expected K [n, n] and b [n, …], got shapes {K.shape} and {b.shape}.")
    if not b.size:
        return b
    K, b = gathered(K), gathered(b)
    K, ridge = (K + K.T) / 2, jnp.asarray(ridge, K.dtype)

    def matvec(x: Array) -> Array:
        return jnp.matmul(K, x, precision=EXACT) + ridge * x

    def solve(_: Any, b: Array) -> Array:
        return _solved(lax.stop_gradient(K), b, lax.stop_gradient(ridge))

    return lax.custom_linear_solve(matvec, b, solve, symmetric=True)


def _solved(K: Array, b: Array, ridge: Array) -> Array:
    unknown = K.shape[0] * jnp.finfo(K.dtype).eps  # times the largest eigenvalue

    def by_cholesky() -> Array:
        return jsp.linalg.cho_solve(jsp.linalg.cho_factor(K + ridge * jnp.eye(len(K), dtype=K.dtype)), b)

    def by_eigenvectors() -> Array:
        values, vectors = jnp.linalg.eigh(K)
        least = unknown * jnp.abs(values).max()
        left_out = values <= least  # NaN is not left out
        kept = jnp.where(left_out, jnp.ones_like(values), values + ridge)
        inverse = jnp.where(left_out, jnp.zeros_like(values), 1 / kept)
        parts = jnp.matmul(vectors.T, b, precision=EXACT)
        return jnp.matmul(vectors, inverse.reshape(-1, *[1] * (b.ndim - 1)) * parts, precision=EXACT)

    largest = jnp.abs(K).sum(1).max()  # no less than the largest eigenvalue
    return lax.cond(ridge > MARGIN * unknown * largest, by_cholesky, by_eigenvectors)


def scaled_system(call: str, g: PerExampleGrads, damping: Any) -> tuple[PerExampleGrads, Array, Array]:
    """(g / unit, μn / unit², unit): unit is a power of two near the largest norm or √(μn), whichever is larger."""
    if jnp.ndim(damping) or known(lambda: not damping >= 0):
        raise ValueError(f"{call}: expected a damping ≥ 0, got {damping}.")
    norms = g.norms(precision=EXACT)
    root = jnp.sqrt(jnp.asarray(damping, norms.dtype)) * g.batch_size**0.5
    unit = power_of_two(jnp.maximum(norms.max(), root))
    return g.scale(jnp.full_like(norms, 1) / unit), (root / unit) ** 2, unit


def known(condition: Any) -> bool:
    """Whether it holds; False of what is known only when it runs."""
    try:
        return bool(condition())
    except jax.errors.TracerBoolConversionError:
        return False
