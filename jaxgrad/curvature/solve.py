"""Linear solves with a Gram matrix of any rank."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import jax.scipy as jsp
from jax import lax
from jaxtyping import Array, Float

from jaxgrad.curvature.damping import Relative, unit_and_ridge
from jaxgrad.curvature.rows import Matrix, widened_rows
from jaxgrad.sharding import gathered

EXACT = lax.Precision.HIGHEST  # by default, accelerators round the operands of float32 products
P = ParamSpec("P")
R = TypeVar("R")
MARGIN = 10.0  # pivots of a Cholesky decomposition must exceed their rounding error by this factor


def in_full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function so that JAX's matmul precision is "highest": solves need all digits of the Gram matrix."""

    @functools.wraps(function)
    def exact(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.default_matmul_precision("highest"):
            return function(*args, **kwargs)

    return exact


def damped_solve(K: Float[Array, "N N"], b: Float[Array, "N ..."], ridge: Float[Array, ""] | float | Relative) -> Array:
    """(K + ridge·I)⁻¹ b for a Gram matrix K = GGᵀ: symmetric, without negative eigenvalues, of any rank.

    Rows and columns are scaled to a unit diagonal, so that differences between the norms in G do not matter. A Cholesky
    decomposition is used if its pivots are well above n·eps. Otherwise K is numerically singular: eigenvectors with
    eigenvalues up to n·eps times the largest are left out, as in a pseudo-inverse, because the solve would magnify
    their rounding errors. Derivatives are those of the solution, and each takes one more solve of the same kind.

    On a CPU, JAX decomposes matrices with OpenBLAS, whose threads may stall beside those of XLA: a 256 × 256 matrix
    then takes 165 ms instead of 0.3 ms. To prevent that, set `OPENBLAS_NUM_THREADS=1` in the environment before NumPy
    is imported.

    Args:
        K: [n, n], float32 or float64.
        b: [n], or [n, m] for m right-hand sides, with K's dtype.
        ridge: a number ≥ 0; or `relative(ratio)`, for ratio · tr K.

    Returns:
        An array of b's shape; NaN where K or b is not finite.

    Raises:
        ValueError: the shapes of K and b do not match.

    Example:
        >>> damped_solve(jnp.array([[1.0, 1.0], [1.0, 1.0]]), jnp.ones(2), 0.0).round(4).tolist()
        [0.5, 0.5]
    """
    if K.ndim != 2 or K.shape[0] != K.shape[1] or b.shape[:1] != K.shape[:1]:
        raise ValueError(f"damped_solve: expected K [n, n] and b [n, …], got shapes {K.shape} and {b.shape}.")
    if not b.size:
        return b
    K, b = gathered(K), gathered(b)
    if isinstance(ridge, Relative):
        ridge = ridge.ratio * jnp.trace(K)
    ridge = jnp.asarray(ridge, K.dtype)
    K = _symmetrized(K)

    def matvec(x: Array) -> Array:
        return jnp.matmul(K, x, precision=EXACT) + ridge * x

    def solve(_: Any, b: Array) -> Array:
        return _solved(lax.stop_gradient(K), b, lax.stop_gradient(ridge))

    return lax.custom_linear_solve(matvec, b, solve, symmetric=True)


@jax.jit  # without jit, JAX would compile the loop again at every call
def _symmetrized(K: Array) -> Array:
    """(K + Kᵀ) / 2, in a loop whose second step changes nothing.

    Without a loop, XLA on CPUs adds up a Gram matrix of several parameters again in every operation that reads K.
    """
    symmetrized: Array = lax.fori_loop(0, 2, lambda _, K: (K + K.T) / 2, K)
    return symmetrized


@jax.jit  # without jit, JAX would compile the branches of the cond again at every call
def _solved(K: Array, b: Array, ridge: Array) -> Array:
    precision = jnp.asarray(K.shape[0], K.dtype) * jnp.finfo(K.dtype).eps  # relative to the largest eigenvalue
    eye = jnp.eye(K.shape[0], dtype=K.dtype)
    diagonal = jnp.diagonal(K) + ridge
    inverse_root = jax.lax.rsqrt(jnp.where(diagonal == 0, jnp.ones_like(diagonal), diagonal))
    factor = jnp.linalg.cholesky(inverse_root[:, None] * (K + ridge * eye) * inverse_root[None, :])
    D = inverse_root.reshape(-1, *[1] * (b.ndim - 1))

    def by_cholesky() -> Array:
        return D * jsp.linalg.cho_solve((factor, True), D * b)

    def by_eigenvectors() -> Array:
        values, vectors = jnp.linalg.eigh(K)
        left_out = values <= precision * jnp.abs(values).max()  # False for NaN
        kept = jnp.where(left_out, jnp.ones_like(values), values + ridge)
        inverse = jnp.where(left_out, jnp.zeros_like(values), 1 / kept)
        parts = jnp.matmul(vectors.T, b, precision=EXACT)
        return jnp.matmul(vectors, inverse.reshape(-1, *[1] * (b.ndim - 1)) * parts, precision=EXACT)

    return lax.cond((jnp.diagonal(factor) ** 2).min() > MARGIN * precision, by_cholesky, by_eigenvectors)


def scaled_system(g: Matrix, damping: Any) -> tuple[Matrix, Array, Array]:
    """(g / unit, μn / unit², unit): unit is a power of two near the largest norm or √(μn), whichever is larger."""
    unit, ridge = unit_and_ridge(g.norms(), damping)
    return widened_rows(g) * (1 / unit), ridge, unit
