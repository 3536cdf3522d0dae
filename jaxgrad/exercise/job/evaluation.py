"""Evaluate every example's gradient by the closed form and by `jax.grad`: results, agreement and time."""

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxgrad.agreement import AgreementReport, check_gradient
from jaxgrad.exercise import Activation, Params, autodiff, closed_form, loss, margin
from jaxgrad.precision import working_dtype

_CHUNK_BYTES = 128 * 2**20  # bytes of gradients that are materialized at a time
_REPEATS = 7


class PerExample(NamedTuple):
    """Per-example results: each field holds one number per example."""

    margin: Float[Array | np.ndarray, " n"]
    loss: Float[Array | np.ndarray, " n"]
    grad_norm: Float[Array | np.ndarray, " n"]  # closed form
    grad_norm_autodiff: Float[Array | np.ndarray, " n"]
    relative_difference: Float[Array | np.ndarray, " n"]  # ‖closed form - jax.grad‖ / ‖jax.grad‖, same dtype


class Timing(NamedTuple):
    """Seconds for one pass over all examples: the first pass, which compiles, and the median of the later ones."""

    first: float
    later: float


def chunk_size(params: Params) -> int:
    """Return how many examples' gradients fit in the memory set aside for them."""
    return max(1, _CHUNK_BYTES // sum(leaf.nbytes for leaf in params))


def agreement(params: Params, X: Array, Y: Array, activation: Activation) -> AgreementReport:
    """Compare the closed form with `jax.grad` in float64, from the same numbers.

    Where units saturate, `jax.grad` in the parameters' dtype is less accurate than the closed form, so the comparison
    would measure its error.
    """
    return check_gradient(
        lambda p, x, y: closed_form.batched_grad(p, x, y, activation),
        lambda p, x, y: loss(p, x, y, activation),
        params,
        X,
        Y,
        reference_dtype=None if params.W.dtype == jnp.float64 else jnp.float64,
        batched=True,
        batch_size=chunk_size(params),
    )


def per_example(params: Params, X: Array, Y: Array, activation: Activation) -> PerExample:
    """Compute the margin, the loss and the gradient norms of every example."""

    @jax.jit
    def evaluate(X: Array, Y: Array) -> PerExample:
        by_hand = closed_form.batched_grad(params, X, Y, activation)
        by_jax = autodiff.batched_grad(params, X, Y, activation)
        difference = _norms(jax.tree.map(lambda a, b: a.astype(wide) - b.astype(wide), by_hand, by_jax))
        norms = _norms(by_jax)
        return PerExample(
            margin=jax.vmap(lambda x: margin(params, x, activation))(X),
            loss=jax.vmap(lambda x, y: loss(params, x, y, activation))(X, Y),
            grad_norm=_norms(by_hand),
            grad_norm_autodiff=norms,
            relative_difference=jnp.where(difference == 0, difference, difference / norms),
        )

    wide = working_dtype(params.W.dtype)
    parts = [evaluate(x, y) for x, y in _chunks(params, X, Y)]
    return PerExample(
        *(np.concatenate([np.asarray(a, np.float64) for a in field]) for field in zip(*parts, strict=True))
    )


def timings(params: Params, X: Array, Y: Array, activation: Activation) -> dict[str, Timing]:
    """Time both ways of computing every example's gradient, interleaved."""
    ways = {"closed form": closed_form.batched_grad, "jax.grad": autodiff.batched_grad}
    jax.clear_caches()  # so that each first call compiles
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(1 + _REPEATS):
        for name, function in ways.items():
            seconds[name].append(_seconds(function, params, X, Y, activation))
    return {name: Timing(s[0], float(np.median(s[1:]))) for name, s in seconds.items()}


def _seconds(function: Callable[..., Params], params: Params, X: Array, Y: Array, activation: Activation) -> float:
    start = time.perf_counter()
    for x, y in _chunks(params, X, Y):
        jax.block_until_ready(function(params, x, y, activation))
    return time.perf_counter() - start


def _chunks(params: Params, X: Array, Y: Array) -> Iterator[tuple[Array, Array]]:
    size = chunk_size(params)
    for start in range(0, len(X), size):
        yield X[start : start + size], Y[start : start + size]


def _norms(gradients: Params) -> Array:
    """[B]: the norm of each example's gradient over all leaves, summed in float32 or wider."""
    wide = [leaf.astype(working_dtype(leaf.dtype)) for leaf in gradients]
    return jnp.sqrt(sum(jnp.sum(leaf.reshape(len(leaf), -1) ** 2, axis=1) for leaf in wide))  # type: ignore[arg-type]
