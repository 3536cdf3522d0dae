"""The exercise's gradients by hand, in a form that neither overflows nor loses digits.

In the exercise's names, for one example (uppercase matrix, lowercase vector, lowercase Greek scalar):

    z = Wx + b,  s = σ(z),  s′ = σ′(z),  s″ = σ″(z),  γ = y,  β = -γ wᵀs,  λ = log(1 + e^β),  π = 1/(1 + e^-β)

    ∂λ/∂W = δ xᵀ,   ∂λ/∂b = δ,   ∂λ/∂w = -πγ s,   ∂λ/∂x = Wᵀδ,   with δ = -πγ s′⊙w

π is the page's e^{-λ}α, rewritten so that it cannot overflow. s′ comes from `activations`, which keeps its digits in
saturation. The Hessian product in the direction (dW, db, dw) has the parts η xᵀ, η and -dπγ s - πγ ds, with
dz = dW x + db, ds = s′⊙dz, dβ = -γ(dwᵀs + wᵀds), dπ = π(1 - π)dβ and η = -dπγ s′⊙w - πγ (s′⊙dw + s″⊙w⊙dz).

Accuracy. All arithmetic is in float32 or wider, and each result is rounded once to its parameter's dtype, so bfloat16
and float16 parameters lose nothing on the way. Let u be the unit roundoff of that arithmetic. The inner products z and
β are off by at most δz = (D + 2)·u·(|W||x| + |b|) and δβ = |γ|·((H + 8)·u·|w|ᵀ|s| + |w|ᵀ|s′⊙δz|). For the logistic,
every entry of a gradient has a relative error of at most

    32·u + 2·(1 - π)·δβ + 2·max(1, |s″/s′|)·δz      (plus one rounding to the dtype)

so nothing is lost to saturation. For every activation, ∂/∂b (and therefore ∂/∂W) has an absolute error of at most

    |∂/∂b|·(32·u + 2·(1 - π)·δβ) + π|γ||w|·(8·u + 3·δz)

On GPUs and TPUs, float32 matrix products may be computed in lower precision;
`jax.default_matmul_precision("highest")` restores u. Finite margins give finite gradients, unless the gradient itself
overflows the dtype.

For a batch the hidden axis comes first, [H, B]. The two matrix products of a gradient are then Z = W Xᵀ and ΔX, where
the columns of Δ are the δ of the examples, and neither needs a transposed copy.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxgrad.exercise.activations import Activation, logistic
from jaxgrad.exercise.checks import batch, batch_mean, one_example_jitted
from jaxgrad.exercise.params import Params
from jaxgrad.per_example.algebra.constructors import Dense, Outer
from jaxgrad.per_example.gradients import PerExampleGrads
from jaxgrad.precision import working_dtype
from jaxgrad.sharding import replicated

__all__ = [
    "batched_grad",
    "batched_input_grad",
    "factored_grads",
    "grad",
    "hessian_vector_product",
    "input_grad",
    "value_and_grad",
    "value_and_grad_one",
]


@one_example_jitted
def grad(params: Params, x: Float[Array, " D"], y: Float[Array, ""], activation: Activation = logistic) -> Params:
    """The gradient of one example's loss with respect to W, b and w.

    Formula: δxᵀ, δ and -πγ s, derived in the module's docstring. Cost: one product W x and one outer product.

    Args:
        params: Params(W [H, D], b [H], w [H]).
        x: [D], floating.
        y: +1 or -1, floating.
        activation: σ.

    Returns:
        Params of the shapes and dtypes of `params`.

    Raises:
        ValueError: the shapes do not match.
        TypeError: a dtype is not floating. Both errors are raised before tracing.

    Example:
        >>> params = Params(jnp.ones((1, 2)), jnp.zeros(1), jnp.ones(1))
        >>> float(grad(params, jnp.zeros(2), 1.0).b[0])    # -π·s′·w = -logistic(-1/2)/4
        -0.09438...
    """
    return _gradient(params, x, _forward(params, x, y, activation))


@one_example_jitted
def value_and_grad_one(
    params: Params, x: Float[Array, " D"], y: Float[Array, ""], activation: Activation = logistic
) -> tuple[Float[Array, ""], Params]:
    """One example's loss and its gradient, as `jax.value_and_grad(loss)` returns them; the arguments are as in `grad`.

    Example:
        >>> params = Params(jnp.ones((1, 2)), jnp.zeros(1), jnp.ones(1))
        >>> value, gradient = value_and_grad_one(params, jnp.zeros(2), 1.0)
        >>> float(value)
        0.47407...
    """
    f = _forward(params, x, y, activation)
    return f.loss.astype(f.dtype), _gradient(params, x, f)


@one_example_jitted
def input_grad(
    params: Params, x: Float[Array, " D"], y: Float[Array, ""], activation: Activation = logistic
) -> Float[Array, " D"]:
    """The gradient Wᵀδ of one example's loss with respect to x, in x's dtype; the arguments are as in `grad`.

    Example:
        >>> params = Params(jnp.ones((1, 2)), jnp.zeros(1), jnp.ones(1))
        >>> input_grad(params, jnp.zeros(2), 1.0).tolist()
        [-0.09438..., -0.09438...]
    """
    return _product(_delta(params, _forward(params, x, y, activation)), params.W).astype(x.dtype)


@batch
def batched_grad(
    params: Params, X: Float[Array, "B D"], Y: Float[Array, " B"], activation: Activation = logistic
) -> Params:
    """The gradient of every example, materialized: jit(vmap(grad)).

    Cost: B·H·D numbers are written, which takes most of the time. For norms, sums or inner products of these gradients,
    use `factored_grads`, which does not materialize them.

    Args:
        params: Params(W [H, D], b [H], w [H]).
        X: [B, D], one example per row, floating; B may be 0.
        Y: [B], each +1 or -1, floating; `signs` makes it from labels.
        activation: σ.

    Returns:
        Params(W [B, H, D], b [B, H], w [B, H]) in the dtypes of `params`.

    Raises:
        ValueError, TypeError: as in `grad`.

    Example:
        >>> params = Params(jnp.ones((1, 2)), jnp.zeros(1), jnp.ones(1))
        >>> batched_grad(params, jnp.zeros((5, 2)), jnp.ones(5)).W.shape
        (5, 1, 2)
    """
    return jax.vmap(lambda x, y: _gradient(params, x, _forward(params, x, y, activation)))(X, Y)


@batch
def batched_input_grad(
    params: Params, X: Float[Array, "B D"], Y: Float[Array, " B"], activation: Activation = logistic
) -> Float[Array, "B D"]:
    """Every example's gradient with respect to its x: [B, D], in X's dtype.

    The arguments are as in `batched_grad`. Cost: two matrix products; no array larger than [B, H] or [B, D] is
    created.

    Example:
        >>> params = Params(jnp.ones((1, 2)), jnp.zeros(1), jnp.ones(1))
        >>> batched_input_grad(params, jnp.zeros((5, 2)), jnp.ones(5)).shape
        (5, 2)
    """
    return _product(_delta(params, _forward(params, X, Y, activation)).T, params.W).astype(X.dtype)


@batch
def factored_grads(
    params: Params, X: Float[Array, "B D"], Y: Float[Array, " B"], activation: Activation = logistic
) -> PerExampleGrads:
    """Every example's gradient, factored: W's is δ xᵀ, held as the pair (δ, x).

    Cost: one matrix product, Z = W Xᵀ. Neither this function nor any method except `materialize` creates an array of
    B × H × D numbers.

    Args:
        params, X, Y, activation: as in `batched_grad`.

    Returns:
        PerExampleGrads over Params(W, b, w); W's factor is Outer(δ, X), b's Dense(δ) and w's Dense(-πγ s).

    Raises:
        ValueError, TypeError: as in `batched_grad`.

    Example:
        >>> params = Params(jnp.ones((1, 2)), jnp.zeros(1), jnp.ones(1))
        >>> factored_grads(params, jnp.zeros((5, 2)), jnp.ones(5)).norms().shape
        (5,)
    """
    # vmap puts the example axis first, as the factors need it; transposing δ would cost as much as the products.
    delta, minus_pi_gamma_s = jax.vmap(lambda x, y: _hidden_gradients(params, _forward(params, x, y, activation)))(X, Y)
    return PerExampleGrads(
        Params(  # the parameters' tree, with factors for leaves
            W=(Outer.of_matrix(delta, X, params.W.dtype),),  # type: ignore[arg-type]
            b=(Dense.of(delta, params.b.dtype),),  # type: ignore[arg-type]
            w=(Dense.of(minus_pi_gamma_s, params.w.dtype),),  # type: ignore[arg-type]
        )
    )


@batch_mean
def value_and_grad(
    params: Params, X: Float[Array, "B D"], Y: Float[Array, " B"], activation: Activation = logistic
) -> tuple[Float[Array, ""], Params]:
    """The mean loss and its gradient; it replaces `jax.value_and_grad(mean loss)` in a training loop.

    Cost: two matrix products, and one exponential per hidden unit and example.

    Args:
        params, X, Y, activation: as in `batched_grad`, with B ≥ 1.

    Returns:
        (mean loss, Params of the shapes and dtypes of `params`).

    Raises:
        ValueError, TypeError: as in `batched_grad`, and for an empty batch.

    Example:
        >>> params = Params(jnp.ones((1, 2)), jnp.zeros(1), jnp.ones(1))
        >>> value, gradient = value_and_grad(params, jnp.zeros((5, 2)), jnp.ones(5))
        >>> float(value), gradient.W.shape
        (0.47407..., (1, 2))
    """
    f = _forward(params, X, Y, activation, scale=1 / X.shape[0])
    delta = _delta(params, f)
    gradient = Params(_over_examples(delta, X), delta.sum(1), _over_examples(f.s, f.minus_pi_gamma))
    return f.loss.mean().astype(f.dtype), _in_dtypes_of(params, gradient)


@batch_mean
def hessian_vector_product(
    params: Params, V: Params, X: Float[Array, "B D"], Y: Float[Array, " B"], activation: Activation = logistic
) -> Params:
    """The Hessian of the mean loss times V, by formula: `jax.jvp(jax.grad(mean loss), (params,), (V,))[1]`.

    Cost: three matrix products (Z, dZ, ηX); the Hessian is never materialized.

    Args:
        params: Params(W [H, D], b [H], w [H]).
        V: the direction (dW, db, dw), of the same shapes.
        X, Y, activation: as in `batched_grad`, with B ≥ 1.

    Returns:
        Params of the shapes and dtypes of `params`.

    Raises:
        ValueError, TypeError: as in `batched_grad`, for a V that does not match, and for an empty batch.

    Example:
        >>> params = Params(jnp.ones((1, 2)), jnp.zeros(1), jnp.ones(1))
        >>> float(hessian_vector_product(params, params, jnp.zeros((5, 2)), jnp.ones(5)).w[0])
        0.05875...
    """
    f = _forward(params, X, Y, activation, scale=1 / X.shape[0])
    dW, db, dw = V
    w, dw = (v.astype(f.s.dtype)[:, None] for v in (params.w, dw))
    dz = _product(dW, X.T).astype(f.s.dtype) + db.astype(f.s.dtype)[:, None]
    ds = f.slope * dz
    gamma = Y.astype(f.s.dtype)
    dbeta = -gamma * (dw[:, 0] @ f.s + w[:, 0] @ ds)
    c = f.minus_pi_gamma
    dc = c * jax.nn.sigmoid(-f.beta) * dbeta
    eta = f.slope * (dc[None] * w + c[None] * dw) + (f.curvature * dz) * (c[None] * w)
    gradient = Params(_over_examples(eta, X), eta.sum(1), _over_examples(f.s, dc) + _over_examples(ds, c))
    return _in_dtypes_of(params, gradient)


class _Forward(NamedTuple):
    """Intermediate values that every gradient uses; z, s, s′, s″ are [H] for one example and [H, B] for a batch."""

    s: Array
    slope: Array
    curvature: Array
    beta: Array  # [] or [B]
    minus_pi_gamma: Array  # [] or [B]: -πγ, times `scale` if that is given
    loss: Array  # [] or [B]
    dtype: jax.typing.DTypeLike  # dtype of the loss, as JAX would promote it


def _forward(params: Params, X: Array, Y: Array, activation: Activation, scale: float | None = None) -> _Forward:
    dtype = jnp.result_type(*params, X, Y)
    work = working_dtype(dtype)
    b, w, gamma = params.b.astype(work), params.w.astype(work), Y.astype(work)
    z = _product(params.W, X.T).astype(work) + (b if X.ndim == 1 else b[:, None])
    s, slope, curvature = activation.jet(z)
    beta = -gamma * (w @ s)
    minus_pi_gamma = -gamma * jax.nn.sigmoid(beta)
    if scale is not None:
        minus_pi_gamma = minus_pi_gamma * jnp.asarray(scale, work)
    return _Forward(s, slope, curvature, beta, minus_pi_gamma, jax.nn.softplus(beta), dtype)


def _delta(params: Params, f: _Forward) -> Array:
    w = params.w.astype(f.s.dtype)
    if f.s.ndim == 1:
        return (f.minus_pi_gamma * w) * f.slope
    return (f.minus_pi_gamma[None] * w[:, None]) * f.slope


def _hidden_gradients(params: Params, f: _Forward) -> tuple[Array, Array]:
    """(∂λ/∂b, ∂λ/∂w), each [H] or [H, B]."""
    return _delta(params, f), f.minus_pi_gamma * f.s


def _gradient(params: Params, x: Array, f: _Forward) -> Params:
    delta, x = _delta(params, f), x.astype(f.s.dtype)
    return _in_dtypes_of(params, Params(delta[:, None] * x[None], delta, f.minus_pi_gamma * f.s))


def _product(a: Array, b: Array) -> Array:
    """a @ b, accumulated in float32 or wider."""
    work = working_dtype(a.dtype, b.dtype)
    if a.dtype != b.dtype:
        a, b = a.astype(work), b.astype(work)
    return jnp.matmul(a, b, preferred_element_type=work)


def _over_examples(a: Array, b: Array) -> Array:
    """a [H, B] times b [B, …]: a sum over the examples, which may be sharded over several devices."""
    work = working_dtype(a.dtype, b.dtype)
    return jnp.matmul(a.astype(work), b.astype(work), out_sharding=replicated(b))


def _in_dtypes_of(params: Params, g: Params) -> Params:
    return Params(g.W.astype(params.W.dtype), g.b.astype(params.b.dtype), g.w.astype(params.w.dtype))
