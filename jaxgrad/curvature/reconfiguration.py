"""Stochastic reconfiguration: natural-gradient steps for variational Monte Carlo, without approximation.

The N samples have the weights w [N], which are divided by their sum. Õ [N, parameters] are the centered derivatives of
log ψ with the root of the weight in each row, √w_b (O_b - Σ_c w_c O_c); ε [N] are the centered local energies with the
same roots. Then S = Re ÕᴴÕ is the quantum geometric tensor, and F = Re Õᴴε is half the gradient of the energy with
respect to real parameters. If log ψ is complex, Õ and ε have two real rows for each sample.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxgrad.curvature.damping import Relative, checked_damping
from jaxgrad.curvature.log_derivatives import BlockedRows, LogDerivatives
from jaxgrad.curvature.primal import centered_sums, is_tall, tree_of, vector_of
from jaxgrad.curvature.rows import Matrix, widened_rows
from jaxgrad.curvature.solve import damped_solve, in_full_precision
from jaxgrad.errors import caller, naming
from jaxgrad.per_example.algebra.scales import power_of_two
from jaxgrad.per_example.serialized import named_tuple
from jaxgrad.sharding import sharded_as, with_automatic_axes

Numbers = Any
"""An array [N], real or complex."""


@naming("centered_gram")
@in_full_precision
@with_automatic_axes(by_example=False)
def centered_gram(derivatives: LogDerivatives, weights: Float[Array, " N"] | None = None) -> Float[Array, "n n"]:
    """ÕÕᵀ, the Gram matrix of the centered derivatives: the kernel of minSR.

    Formula: P D OOᵀ D P with D = diag(√w) and the projector P = I - √w √wᵀ. Accuracy: the error is of the order of
    eps times the largest squared norm of O, before the mean is subtracted.

    Args:
        derivatives: O, the derivatives of log ψ for N samples, from `log_derivatives`.
        weights: [N], numbers ≥ 0 in proportion to the samples' weights; None for equal weights. With samples from
            another distribution q, they are |ψ|²/q.

    Returns:
        [n, n], in float32 or wider: n = N if log ψ is real. Otherwise n = 2N, and the rows of a sample, of Re log ψ and
        Im log ψ, come one after the other.

    Raises:
        TypeError: `derivatives` is not the result of `log_derivatives`.
        ValueError: the weights are not real numbers [N].

    Example:
        >>> O = jg.curvature.log_derivatives(lambda w, x: w @ x)(jnp.zeros(2), jnp.array([[1.0, 2.0], [3.0, 2.0]]))
        >>> centered_gram(O).round(3).tolist()
        [[0.5, -0.5], [-0.5, 0.5]]
    """
    w = _checked_weights(derivatives, weights)
    return _centered(widened_rows_of(derivatives.rows).gram(), w, derivatives.parts)


@naming("minsr")
def minsr(
    derivatives: LogDerivatives,
    local_energies: Numbers,
    damping: Any,
    *,
    weights: Float[Array, " N"] | None = None,
) -> PyTree:
    """(S + λI)⁻¹ F, the step of stochastic reconfiguration, without approximation for any number of parameters.

    Formula: Õᵀ(ÕÕᵀ + λI)⁻¹ε, one solve with the samples (minSR); where there are more rows than parameters, the solve
    is with S, from a few materialized derivatives at a time. For complex parameters and holomorphic log ψ, this is the
    complex step (OᴴO + λI)⁻¹Oᴴε of centered derivatives; otherwise real and imaginary parts are parameters of their
    own. NetKet's `VMC_SR` takes the gradient 2F, so that its step is twice as long.

    Accuracy: as in `natural_gradient`. In the solve with samples, the mean is subtracted after the inner products have
    been rounded; if ‖mean O‖² is far above tr S, an error of eps·‖mean O‖² must still be small beside λ. In the solve
    with S, the mean is subtracted first. Derivatives are first scaled by a power of two, as in `natural_gradient`.

    Edge cases: the step is zero for one sample, and NaN for none, for weights that are negative or add up to 0, and for
    numbers that are not finite.

    Args:
        derivatives: O, the derivatives of log ψ for N samples, from `log_derivatives`.
        local_energies: [N], real or complex, (Hψ)(x)/ψ(x) of every sample. If log ψ is real, the real part counts.
        damping: λ ≥ 0, or `relative(ratio)` for ratio · tr S.
        weights: as in `centered_gram`.

    Returns:
        The change of the parameters, a tree with their shapes and dtypes. Subtract it, times a learning rate; for
        complex parameters too, without a conjugate.

    Raises:
        TypeError: `derivatives` is not the result of `log_derivatives`.
        ValueError: the damping is not a number ≥ 0; the energies or weights are not numbers [N].

    Example:
        >>> log_psi = lambda w, x: w @ x
        >>> O = jg.curvature.log_derivatives(log_psi)(jnp.zeros(2), jnp.array([[1.0, 2.0], [3.0, 2.0]]))
        >>> minsr(O, jnp.array([-1.0, 1.0]), 1.0).round(3).tolist()                         # S = diag(1, 0), F = (1, 0)
        [0.5, 0.0]

    Source: Sorella 1998; Chen and Heyl 2024; the real form is that of Rende et al. 2024.
    """
    return _rounded(derivatives, _step(derivatives, local_energies, damping, weights, None, 0.0))


@naming("spring")
def spring(
    derivatives: LogDerivatives,
    local_energies: Numbers,
    damping: Any,
    previous: PyTree,
    momentum: Any,
    *,
    weights: Float[Array, " N"] | None = None,
) -> PyTree:
    """The step of SPRING: `minsr` with the previous step as a first guess, φ = Õᵀ(ÕÕᵀ + λI)⁻¹(ε - μÕφ′) + μφ′.

    Args:
        derivatives, local_energies, damping, weights: as in `minsr`.
        previous: φ′, the previous step, before it was multiplied by a learning rate; zeros at first.
        momentum: μ, from 0 to below 1; μ = 0 is `minsr`. Goldshlager et al. take 0.99.

    Returns:
        As in `minsr`.

    Raises:
        TypeError: as in `minsr`.
        ValueError: `previous` does not have the tree and the shapes of the parameters; otherwise as in `minsr`.

    Example:
        >>> log_psi = lambda w, x: w @ x
        >>> O = jg.curvature.log_derivatives(log_psi)(jnp.zeros(2), jnp.array([[1.0, 2.0], [3.0, 2.0]]))
        >>> spring(O, jnp.array([-1.0, 1.0]), 1.0, jnp.array([0.5, 1.0]), 0.5).round(3).tolist()
        [0.625, 0.5]

    Source: Goldshlager, Abrahamsen and Lin 2024.
    """
    return _rounded(derivatives, _step(derivatives, local_energies, damping, weights, previous, momentum))


@named_tuple
class SpringState(NamedTuple):
    """The state of `scale_by_spring`.

    Attributes:
        count: number of updates so far, the argument of a schedule.
        previous: the previous step, in float32 or wider; None without momentum.

    Example:
        >>> scale_by_spring(1e-3).init(jnp.zeros(3)).count.item()
        0
    """

    count: Array  # type: ignore[assignment]  # the name that optax uses; tuple.count is not used
    previous: PyTree


def scale_by_spring(damping: Any, momentum: Any = 0.0) -> Any:
    """`spring`, or `minsr` without momentum, as an optax transformation, whose updates are `LogDerivatives`.

    Put this transformation first in a chain: `update(derivatives, state, params, local_energies=e)` takes the
    derivatives and, by name, the local energies and perhaps `weights`; the chain passes them on.

    Args:
        damping: λ ≥ 0, or `relative(ratio)`, or a schedule: update count → either.
        momentum: μ, or a schedule. With the number 0, no step is kept.

    Returns:
        An `optax.GradientTransformationExtraArgs`.

    Raises:
        ImportError: optax is not installed.
        TypeError: `update` is called with anything other than LogDerivatives, or without local energies.

    Example:
        >>> import optax
        >>> log_psi = lambda w, x: jnp.log(jnp.cosh(w @ x))
        >>> optimizer = optax.chain(scale_by_spring(0.01, momentum=0.9), optax.scale(-0.1))
        >>> w, spins, energies = jnp.ones(3), jnp.array([[1.0, -1, 1], [1, 1, 1]]), jnp.array([-2.0, -1.0])
        >>> state = optimizer.init(w)
        >>> O = jg.curvature.log_derivatives(log_psi)(w, spins)
        >>> updates, state = optimizer.update(O, state, w, local_energies=energies)
        >>> optax.apply_updates(w, updates).shape
        (3,)
    """
    import optax

    has_momentum = callable(momentum) or not (isinstance(momentum, int | float) and momentum == 0)

    def init(params: PyTree) -> SpringState:
        wide = lambda p: jnp.zeros(jnp.shape(p), jnp.promote_types(jnp.result_type(p), jnp.float32))  # noqa: E731
        return SpringState(jnp.zeros((), jnp.int32), jax.tree.map(wide, params) if has_momentum else None)

    @naming("scale_by_spring")
    def update(
        derivatives: Any,
        state: SpringState,
        params: PyTree = None,
        *,
        local_energies: Any = None,
        weights: Any = None,
        **others: Any,
    ) -> tuple[PyTree, SpringState]:
        del params, others
        if local_energies is None:
            raise TypeError(
                "scale_by_spring: expected update(derivatives, state, params, local_energies=…), got no energies."
            )
        lam, mu = (number(state.count) if callable(number) else number for number in (damping, momentum))
        step = _step(derivatives, local_energies, lam, weights, state.previous, mu)
        kept = (
            jax.tree.map(
                lambda a, p: sharded_as(jax.typeof(p), a.astype(p.dtype)), derivatives.tree_of(step), state.previous
            )
            if has_momentum
            else None
        )
        return _rounded(derivatives, step), SpringState(state.count + 1, kept)

    return optax.GradientTransformationExtraArgs(init, update)


# --- The solve -------------------------------------------------------------------------------------------------------


@in_full_precision
@with_automatic_axes(by_example=False)
def _step(
    derivatives: LogDerivatives,
    local_energies: Numbers,
    damping: Any,
    weights: Any,
    previous: PyTree,
    momentum: Any,
) -> list[Array]:
    """The real numbers of the step, in float32 or wider."""
    checked_damping(damping)
    w = _checked_weights(derivatives, weights)
    e = _deviations(_checked_energies(derivatives, local_energies, w.dtype), w)
    guess = None
    if previous is not None:
        leaves = derivatives.leaves_of(previous)
        mu = jnp.asarray(momentum, w.dtype)
        e = e - mu * _deviations(derivatives.rows.dot(leaves).astype(w.dtype).reshape(e.shape), w)
        guess = [mu.astype(w.dtype) * a.astype(w.dtype) for a in leaves]
    scaled, ridge, unit = _scaled(derivatives, damping, w.dtype)
    if not derivatives.samples:
        step = [jnp.full(p.shape, jnp.nan, w.dtype) for p in derivatives.shapes]
    elif is_tall(scaled):
        step = tree_of(damped_solve(*_tensor_and_force(scaled, w, e), ridge), derivatives.shapes)
    else:
        root = jnp.sqrt(w)[:, None]
        c = damped_solve(_centered(scaled.gram(), w, derivatives.parts), (root * e).ravel(), ridge).reshape(e.shape)
        c = root * (c - root * (root * c).sum(0)[None])
        step = scaled.weighted_sum(c.ravel(), w.dtype)
    step = [a / unit.astype(a.dtype) for a in step]
    return step if guess is None else [a + b.astype(a.dtype) for a, b in zip(step, guess, strict=True)]


def _scaled(derivatives: LogDerivatives, damping: Any, dtype: Any) -> tuple[Matrix, Any, Array]:
    """(rows / unit, λ / unit², unit); unit is a power of two near the largest norm or √λ, whichever is larger."""
    rows = widened_rows_of(derivatives.rows)
    largest = rows.norms().max(initial=0).astype(dtype)
    ridge: Any
    if isinstance(damping, Relative):
        unit, ridge = power_of_two(largest), damping
    else:
        lam = jnp.asarray(damping, dtype)
        unit = power_of_two(jnp.maximum(largest, jnp.sqrt(jax.lax.stop_gradient(lam))))
        ridge = lam / unit / unit
    return rows * (1 / unit), ridge, unit


def widened_rows_of(rows: Matrix) -> Matrix:
    """The same rows with bfloat16 factors cast to float32; those of blocks are so already."""
    return rows if isinstance(rows, BlockedRows) else widened_rows(rows)


def _centered(K: Float[Array, "n n"], w: Float[Array, " N"], parts: int) -> Float[Array, "n n"]:
    """P D K D P.

    The two sides are centered in a loop of two steps, because the compiler computes the operand of a loop once. The sum
    of the parameters' Gram matrices that K is would be added up again in every use.
    """
    N = len(w)

    def center_one_side(_: Any, K: Array) -> Array:
        return (K - jnp.einsum("bicj,b->icj", K, w)[None]).transpose(2, 3, 0, 1)

    K = jax.lax.fori_loop(0, 2, center_one_side, K.astype(w.dtype).reshape(N, parts, N, parts))
    root = jnp.sqrt(w)
    K = root[:, None, None, None] * K * root[None, None, :, None]
    return K.reshape(N * parts, N * parts)


def _tensor_and_force(
    rows: Matrix, w: Float[Array, " N"], e: Float[Array, "N R"]
) -> tuple[Float[Array, "P P"], Float[Array, " P"]]:
    """S = ÕᵀÕ and F = Õᵀε."""
    parts = e.shape[1]
    each = [jnp.zeros_like(e).at[:, k].set(w) for k in range(parts)]
    means = jnp.stack([vector_of(rows.weighted_sum(c.ravel(), w.dtype), w.dtype) for c in each])
    if isinstance(rows, BlockedRows):
        S, F, rest = rows.summed(lambda block, w, e: centered_sums(block, w, e, means), w, e)
    else:
        S, F, rest = centered_sums(rows, w, e, means)
    return S - jnp.matmul(rest.T, rest), F


def _deviations(values: Float[Array, "N R"], w: Float[Array, " N"]) -> Float[Array, "N R"]:
    """The values less their mean. What the rounded mean leaves is taken out of the solution."""
    return values - (w[:, None] * values).sum(0)[None]


def _rounded(derivatives: LogDerivatives, step: list[Array]) -> PyTree:
    return derivatives.tree_of(
        [sharded_as(p, a.astype(p.dtype)) for a, p in zip(step, derivatives.shapes, strict=True)]
    )


# --- Checks ----------------------------------------------------------------------------------------------------------


def _checked_weights(derivatives: Any, weights: Any) -> Float[Array, " N"]:
    """The weights, divided by their sum, in float32 or wider."""
    if not isinstance(derivatives, LogDerivatives):
        raise TypeError(
            f"{caller()}: expected LogDerivatives, as jg.curvature.log_derivatives(log_amplitude)(params, samples) "
            f"returns, got {type(derivatives).__name__}."
        )
    dtype = jax.eval_shape(derivatives.rows.norms).dtype
    if weights is None:
        return jnp.full(derivatives.samples, 1 / max(derivatives.samples, 1), dtype)
    w = jnp.asarray(weights)
    if w.shape != (derivatives.samples,) or jnp.issubdtype(w.dtype, jnp.complexfloating):
        raise ValueError(
            f"{caller()}: expected real weights of shape {(derivatives.samples,)}, got {w.dtype} {w.shape}."
        )
    w = w.astype(dtype) / power_of_two(w.astype(dtype).max(initial=0))
    return w / w.sum()


def _checked_energies(derivatives: LogDerivatives, energies: Any, dtype: Any) -> Float[Array, "N R"]:
    energies = jnp.asarray(energies)
    if energies.shape != (derivatives.samples,):
        raise ValueError(
            f"{caller()}: expected one local energy for each sample, shape {(derivatives.samples,)}, got shape "
            f"{energies.shape}."
        )
    parts = [jnp.real(energies), jnp.imag(energies)][: derivatives.parts]
    return jnp.stack([a.astype(dtype) for a in parts], 1)
