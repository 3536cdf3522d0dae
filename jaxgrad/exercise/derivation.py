"""The exercise's two derivations as written on the page: every intermediate is a function, and nothing is stabilized.

Read this file beside the page, or use it to find out where the page's formulas hold: they are exact on paper, but in
float32 they overflow from β ≈ 88.7 on, and the form with S - S² loses its digits in saturation. `closed_form` has the
same mathematics for practical use.

Names: an uppercase Latin letter is a matrix, a lowercase Latin letter a vector, a lowercase Greek letter a scalar. One
example is x [D] and the scalar y.

The first answer (a) applies the chain rule entry by entry. Its last line reads ∂(Wx + b)/∂W_ij = x_j, but the
derivative of a vector is a vector, x_j e_i. If the line is taken literally, the product with w sums over all hidden
units, which is wrong for H > 1.

The second answer works with differentials. It ends in a matrix (b), in components (c), and, for the logistic, in a
matrix with S′ = S - S² (d).

Example:
    >>> params, x, y = Params(jnp.ones((2, 3)), jnp.zeros(2), jnp.arange(1.0, 3.0)), jnp.ones(3), jnp.ones(())
    >>> bool(jnp.allclose(matrix_form(params, x, y), logistic_form(params, x, y)))
    True
    >>> bool(jnp.allclose(matrix_form(params, x, y), first_answer_literal(params, x, y)))
    False
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxgrad.exercise.activations import Activation, logistic
from jaxgrad.exercise.params import Params

Vector = Float[Array, " H"]
Matrix = Float[Array, "H D"]
Scalar = Float[Array, ""]

# --- The second answer's variables, in the order of the page -----------------------------------------------------


def gamma(y: Scalar) -> Scalar:
    """γ = y."""
    return y


def z(params: Params, x: Float[Array, " D"]) -> Vector:
    """z = Wx + b."""
    return params.W @ x + params.b


def s(params: Params, x: Float[Array, " D"], sigma: Activation = logistic) -> Vector:
    """s = σ(z), elementwise."""
    return sigma.value(z(params, x))


def s_prime(params: Params, x: Float[Array, " D"], sigma: Activation = logistic) -> Vector:
    """s′ = σ′(z), elementwise."""
    return sigma.slope(z(params, x))


def S_prime(params: Params, x: Float[Array, " D"], sigma: Activation = logistic) -> Float[Array, "H H"]:
    """S′ = Diag(s′), the matrix that replaces the elementwise product."""
    return jnp.diag(s_prime(params, x, sigma))


def beta(params: Params, x: Float[Array, " D"], y: Scalar, sigma: Activation = logistic) -> Scalar:
    """β = -γ wᵀs."""
    return -gamma(y) * (params.w @ s(params, x, sigma))


def alpha(params: Params, x: Float[Array, " D"], y: Scalar, sigma: Activation = logistic) -> Scalar:
    """α = e^β. It overflows: in float32 from β ≈ 88.7 on."""
    return jnp.exp(beta(params, x, y, sigma))


def lambda_(params: Params, x: Float[Array, " D"], y: Scalar, sigma: Activation = logistic) -> Scalar:
    """λ = log(1 + α). It is infinite where α is, and 0 where 1 + α rounds to 1."""
    return jnp.log(1 + alpha(params, x, y, sigma))


# --- Their differentials, in a direction dW ------------------------------------------------------------------------


def dz(params: Params, x: Float[Array, " D"], dW: Matrix) -> Vector:
    """dz = dW x."""
    return dW @ x


def ds(params: Params, x: Float[Array, " D"], dW: Matrix, sigma: Activation = logistic) -> Vector:
    """ds = s′ ⊙ dz = S′ dz."""
    return S_prime(params, x, sigma) @ dz(params, x, dW)


def dbeta(params: Params, x: Float[Array, " D"], y: Scalar, dW: Matrix, sigma: Activation = logistic) -> Scalar:
    """dβ = -γ wᵀds."""
    return -gamma(y) * (params.w @ ds(params, x, dW, sigma))


def dalpha(params: Params, x: Float[Array, " D"], y: Scalar, dW: Matrix, sigma: Activation = logistic) -> Scalar:
    """dα = α dβ."""
    return alpha(params, x, y, sigma) * dbeta(params, x, y, dW, sigma)


class Dlambda(NamedTuple):
    """dλ as the page rewrites it, one field per line: eight expressions for one number."""

    in_dalpha: Scalar
    in_dbeta: Scalar
    in_ds: Scalar
    in_dz: Scalar
    in_dW: Scalar
    trace: Scalar
    trace_cycled: Scalar
    with_gradient: Scalar


def dlambda(params: Params, x: Float[Array, " D"], y: Scalar, dW: Matrix, sigma: Activation = logistic) -> Dlambda:
    """Compute dλ in direction dW by each line of the second answer.

    Returns:
        Dlambda: e^{-λ}dα, e^{-λ}α dβ, -e^{-λ}αγ wᵀds, … wᵀS′dz, … wᵀS′dW x, … Trace(wᵀS′dW x), … Trace(x wᵀS′dW),
        and ⟨∂λ/∂W, dW⟩ with the gradient read off the last trace.
    """
    w, dS = params.w, S_prime(params, x, sigma)
    c = _factor(params, x, y, sigma)
    e = jnp.exp(-lambda_(params, x, y, sigma))
    return Dlambda(
        in_dalpha=e * dalpha(params, x, y, dW, sigma),
        in_dbeta=e * alpha(params, x, y, sigma) * dbeta(params, x, y, dW, sigma),
        in_ds=c * (w @ ds(params, x, dW, sigma)),
        in_dz=c * (w @ dS @ dz(params, x, dW)),
        in_dW=c * (w @ dS @ dW @ x),
        trace=c * jnp.trace((w @ dS @ dW @ x)[None, None]),
        trace_cycled=c * jnp.trace(jnp.outer(x, w) @ dS @ dW),
        with_gradient=jnp.sum(matrix_form(params, x, y, sigma) * dW),
    )


def _factor(params: Params, x: Array, y: Array, sigma: Activation) -> Array:
    """-e^{-λ}αγ, the scalar that every form of the gradient starts with.

    In float32 it is NaN (0·inf) from β ≈ 88.7 on, where α overflows. If subnormal numbers are flushed, it is 0 from
    β ≈ 87.3 on, where e^{-λ} is 0. Under `jit` the compiler may rearrange the exponentials and move both limits.
    """
    return -jnp.exp(-lambda_(params, x, y, sigma)) * alpha(params, x, y, sigma) * gamma(y)


# --- (b) the matrix form, (c) its components, (d) the logistic ----------------------------------------------------


def matrix_form_transposed(params: Params, x: Float[Array, " D"], y: Scalar, sigma: Activation = logistic) -> Matrix:
    """(b), first line: ∂λ/∂W = -e^{-λ}αγ (x wᵀS′)ᵀ."""
    return _factor(params, x, y, sigma) * (jnp.outer(x, params.w) @ S_prime(params, x, sigma)).T


def matrix_form(params: Params, x: Float[Array, " D"], y: Scalar, sigma: Activation = logistic) -> Matrix:
    """(b), second line: ∂λ/∂W = -e^{-λ}αγ S′w xᵀ, for any σ."""
    return _factor(params, x, y, sigma) * jnp.outer(S_prime(params, x, sigma) @ params.w, x)


def component_form_summed(params: Params, x: Float[Array, " D"], y: Scalar, sigma: Activation = logistic) -> Matrix:
    """(c), first line: ∂λ/∂W_ij = -e^{-λ}αγ Σ_k S′_ik w_k x_j, with the sum as written (the page lets k run to d)."""
    return _factor(params, x, y, sigma) * jnp.einsum("ik,k,j->ij", S_prime(params, x, sigma), params.w, x)


def component_form(params: Params, x: Float[Array, " D"], y: Scalar, sigma: Activation = logistic) -> Matrix:
    """(c), second line: ∂λ/∂W_ij = -e^{-λ}αγ σ′(z_i) w_i x_j."""
    i_j = s_prime(params, x, sigma)[:, None] * params.w[:, None] * x[None, :]
    return _factor(params, x, y, sigma) * i_j


def component_form_expanded(params: Params, x: Float[Array, " D"], y: Scalar, sigma: Activation = logistic) -> Matrix:
    """(c), third line: ∂λ/∂W_ij = -e^{-λ}αγ σ′(Σ_k W_ik x_k + b_i) w_i x_j."""
    z_i = jnp.einsum("ik,k->i", params.W, x) + params.b
    return _factor(params, x, y, sigma) * (sigma.slope(z_i) * params.w)[:, None] * x[None, :]


def logistic_form(params: Params, x: Float[Array, " D"], y: Scalar) -> Matrix:
    """(d): ∂λ/∂W = -e^{-λ}αγ (S - S²) w xᵀ with S = Diag(s). S - S² cancels in saturation."""
    S = jnp.diag(s(params, x))
    return _factor(params, x, y, logistic) * jnp.outer((S - S @ S) @ params.w, x)


# --- (a) the first answer: the chain rule entry by entry ----------------------------------------------------------


def first_answer_outer(params: Params, x: Float[Array, " D"], y: Scalar, sigma: Activation = logistic) -> Scalar:
    """(a), first line's factor: (1 + exp(-y wᵀσ(Wx + b)))^{-1}."""
    return 1 / (1 + jnp.exp(-y * (params.w @ sigma.value(params.W @ x + params.b))))


def first_answer_exponential(params: Params, x: Float[Array, " D"], y: Scalar, sigma: Activation = logistic) -> Scalar:
    """(a), second line's factor: exp(-y wᵀσ(Wx + b))."""
    return jnp.exp(-y * (params.w @ sigma.value(params.W @ x + params.b)))


def first_answer_literal(params: Params, x: Float[Array, " D"], y: Scalar, sigma: Activation = logistic) -> Matrix:
    """(a) taken literally: with ∂(Wx + b)/∂W_ij = x_j, every row is -y wᵀσ′(z)·xᵀ times the two factors.

    It is wrong for H > 1, because each entry holds the sum over all hidden units. It is here for comparison.
    """
    row = -y * (params.w @ sigma.slope(params.W @ x + params.b)) * x
    factors = first_answer_outer(params, x, y, sigma) * first_answer_exponential(params, x, y, sigma)
    return factors * jnp.broadcast_to(row, params.W.shape)


def first_answer_corrected(params: Params, x: Float[Array, " D"], y: Scalar, sigma: Activation = logistic) -> Matrix:
    """(a) with ∂(Wx + b)/∂W_ij = x_j e_i in the last line, so that the product with w keeps only the i-th term."""
    H, D = params.W.shape
    e = jnp.eye(H, dtype=bool)
    dz_dW = jnp.where(e[:, :, None], x[None, None, :], jnp.zeros_like(x))  # k, i, j: ∂z_k/∂W_ij = x_j (e_i)_k
    w_sigma = params.w * sigma.slope(params.W @ x + params.b)
    factors = first_answer_outer(params, x, y, sigma) * first_answer_exponential(params, x, y, sigma)
    return factors * -y * (w_sigma @ dz_dW.reshape(H, H * D)).reshape(H, D)
