"""Scores of a loss over several checkpoints of its parameters."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxgrad.curvature.damping import checked_damping
from jaxgrad.curvature.primal import gradients_times, is_tall, matrix_of, second_moments
from jaxgrad.curvature.solve import damped_solve, in_full_precision, scaled_system
from jaxgrad.errors import caller, naming
from jaxgrad.per_example.arguments import checked_batch
from jaxgrad.per_example.measure import per_example_norms
from jaxgrad.per_example.transform import per_example_grad, per_example_value_and_grad
from jaxgrad.sharding import gathered


def grand(
    loss: Callable[..., Any], *, argnums: int | Sequence[int] = 0, in_axes: Any = 0, spmd_axis_name: Any = None
) -> Callable[..., Float[Array, " B"]]:
    """GraNd: the norm of each example's gradient, averaged over several initializations or checkpoints.

    Args:
        loss: loss of one example, as in `per_example_grad`.
        argnums, in_axes, spmd_axis_name: as in `per_example_grad`.

    Returns:
        A function of (checkpoints, *batch) that returns [B]; checkpoints is an iterable of trees of parameters.

    Raises:
        TypeError: checkpoints is a single tree of parameters; otherwise as in `per_example_grad`.
        ValueError: there are no checkpoints; otherwise as in `per_example_grad`.

    Example:
        >>> grand(lambda w, x: jnp.sin(w @ x))([jnp.zeros(2), jnp.ones(2)], jnp.eye(2)).round(3).tolist()
        [0.77, 0.77]

    Source: Paul et al. 2021.
    """
    measured = per_example_norms(loss, argnums, in_axes=in_axes, spmd_axis_name=spmd_axis_name)
    norms = jax.jit(lambda params, batch: measured(params, *batch)[1])

    @naming("grand")
    def mean_norms(checkpoints: Iterable[PyTree], *batch: Any) -> Array:
        total, count = _summed(norms(params, batch) for params in _checked_checkpoints(checkpoints))
        return total / count

    return mean_norms


def _checked_checkpoints(checkpoints: Any) -> Iterable[PyTree]:
    """Return the checkpoints; raise TypeError for a single one, whose leaves or rows would count as several."""
    single = isinstance(checkpoints, Mapping) or hasattr(checkpoints, "shape") or hasattr(checkpoints, "_fields")
    if single or not isinstance(checkpoints, Iterable):
        raise TypeError(
            f"{caller()}: expected several parameters, a list or another iterable, as checkpoints, got "
            f"{type(checkpoints).__name__}. For a single one pass [params]."
        )
    return checkpoints


def _summed(terms: Iterable[Array]) -> tuple[Array, int]:
    """(the sum of the terms, their number); only one term is in memory at a time."""
    total: Array | None = None
    count = 0
    for term in terms:
        total, count = term if total is None else total + term, count + 1
    if total is None:
        raise ValueError(f"{caller()}: expected at least one checkpoint, got none.")
    return total, count


def tracin(
    loss: Callable[..., Any], *, argnums: int | Sequence[int] = 0, in_axes: Any = 0, spmd_axis_name: Any = None
) -> Callable[..., Float[Array, "C B"]]:
    """TracIn: how much training on each example lowered each test loss, to first order, summed over checkpoints.

    Formula: Σ_k η_k test_c(w_k) · g_b(w_k), for plain gradient descent with learning rates η_k.

    Args:
        loss: loss of one example, as in `per_example_grad`.
        argnums, in_axes, spmd_axis_name: as in `per_example_grad`.

    Returns:
        A function of (checkpoints, rates, train, test) that returns [C, B]. A score > 0 means that training on the
        example lowered the test loss. checkpoints are the parameters w_k, rates are as many learning rates η_k, and
        train and test are batches: each is a tuple of the loss's arguments other than the parameters.

    Raises:
        TypeError: checkpoints is a single tree of parameters; a batch is not a tuple; otherwise as in
            `per_example_grad`.
        ValueError: there are no checkpoints, or not as many rates as checkpoints; otherwise as in `per_example_grad`.

    Example:
        >>> loss = lambda w, x, y: (w @ x - y) ** 2
        >>> train, test = (jnp.eye(2), jnp.ones(2)), (jnp.eye(2)[:1], jnp.ones(1))
        >>> tracin(loss)([jnp.zeros(2), jnp.full(2, 0.5)], [0.1, 0.1], train, test).round(3).tolist()
        [[0.5, 0.0]]

    Source: Pruthi et al. 2020.
    """
    gradients = per_example_grad(loss, argnums, in_axes=in_axes, spmd_axis_name=spmd_axis_name)
    products = jax.jit(lambda params, train, test: gradients(params, *test).gram(gradients(params, *train)))

    missing = object()

    @naming("tracin")
    def scores(checkpoints: Iterable[PyTree], rates: Iterable[Any], train: Any, test: Any) -> Array:
        train, test = checked_batch("train", train), checked_batch("test", test)
        trees = _checked_checkpoints(checkpoints)

        def terms() -> Iterator[Array]:
            for params, rate in zip_longest(trees, rates, fillvalue=missing):
                if params is missing or rate is missing:
                    raise ValueError("tracin: expected as many rates as checkpoints, got fewer of one of them.")
                term = products(params, train, test)
                yield jnp.asarray(rate, term.dtype) * term

        return _summed(terms())[0]

    return scores


def log_odds(logits: Float[Array, " O"], label: Any) -> Float[Array, ""]:
    """log p/(1 - p) for the probability p of the label: the output that TRAK explains of a classifier.

    Args:
        logits: [O], of one example.
        label: an integer.

    Returns:
        A number; NaN for a label out of range.

    Example:
        >>> log_odds(jnp.log(jnp.array([0.5, 0.25, 0.25])), 1).round(4).item()          # log(0.25/0.75)
        -1.0986
    """
    index = jnp.arange(logits.size)
    is_label = index == jnp.asarray(label, index.dtype)
    others = jnp.where(is_label, jnp.full_like(logits, -jnp.inf), logits)
    own = jnp.where(is_label, logits, jnp.zeros_like(logits)).sum()
    return jnp.where(is_label.any(), own - jax.nn.logsumexp(others), jnp.full_like(own, jnp.nan))


def _logistic_loss(output: Array) -> Array:
    """-log p for the log-odds of p."""
    return jax.nn.softplus(-output)


def trak(
    output: Callable[..., Any],
    damping: Any,
    *,
    loss: Callable[[Array], Array] = _logistic_loss,
    argnums: int | Sequence[int] = 0,
    in_axes: Any = 0,
    spmd_axis_name: Any = None,
) -> Callable[..., Float[Array, "C B"]]:
    """TRAK with the exact kernel: how much training on each example raised a model's output on each test example.

    Formula: mean_k (test Gᵀ(GGᵀ + μB I)⁻¹)_cb · mean_k q_b, over checkpoints w_k. G [B, parameters] and test hold the
    gradients of the output f at w_k, which G keeps as factors. The published method projects them to a few thousand
    numbers first, to approximate GGᵀ; here GGᵀ is exact and no random numbers are drawn. q_b = -d loss/df is how much
    the model still has to learn from the example. Cost for each checkpoint: the Gram matrices, a B × B solve.

    Damping: the published formula has none. It inverts ΦᵀΦ for projections Φ [B, S] of the gradients onto fewer numbers
    than there are examples. The exact kernel needs a damping if there are more parameters than examples; start with
    `relative(1e-3)`. Since (ΦᵀΦ + λI)⁻¹Φᵀ = Φᵀ(ΦΦᵀ + λI)⁻¹, μB is the ridge λ of the projected kernel.

    Args:
        output: output(params, *example) → f, a number, for one example. For a classifier, the `log_odds` of the right
            label.
        damping: μ ≥ 0, or `jg.curvature.relative(ratio)`.
        loss: the training loss of an example as a function of f; by default log(1 + exp(-f)), which is the
            cross-entropy if f is the log-odds of the right label.
        argnums, in_axes, spmd_axis_name: as in `per_example_grad`.

    Returns:
        A function of (checkpoints, train, test) that returns [C, B]; > 0 means that training on the example raised the
        output of the test example. Its arguments are an iterable of parameters, of models that were trained on
        different halves of the data or with different seeds, and two batches, each a tuple of the output's other
        arguments.

    Raises:
        TypeError: checkpoints is a single tree of parameters; a batch is not a tuple; otherwise as in
            `per_example_grad`.
        ValueError: the damping is not a number ≥ 0; there are no checkpoints; otherwise as in `per_example_grad`.

    Example:
        >>> margin = lambda w, x, y: y * (w @ x)
        >>> train, test = (jnp.eye(2), jnp.array([1.0, -1.0])), (jnp.ones((1, 2)), jnp.ones(1))
        >>> trak(margin, 0.0)([jnp.zeros(2), jnp.zeros(2)], train, test).round(3).tolist()
        [[0.5, -0.5]]

    Source: Park et al. 2023 (TRAK), equations 13 and 17.
    """
    with naming("trak"):
        checked_damping(damping)
    gradients = per_example_value_and_grad(output, argnums, in_axes=in_axes, spmd_axis_name=spmd_axis_name)

    @jax.jit
    @in_full_precision
    def of_checkpoint(params: PyTree, train: Any, test: Any) -> Array:
        (outputs, g), (_, test_g) = gradients(params, *train), gradients(params, *test)
        if not g.batch_size:
            return jnp.stack([test_g.gram(g)] * 2)
        scaled, ridge, unit = scaled_system(g, damping)
        if is_tall(g):
            solved = damped_solve(second_moments(scaled), matrix_of(test_g).T.astype(ridge.dtype), ridge)
            weights = gradients_times(scaled, jnp.ones((g.batch_size, 1), ridge.dtype), solved).T / unit
        else:
            weights = damped_solve(scaled.gram(), scaled.gram(test_g), ridge).T / unit
        still_to_learn = gathered(-jax.vmap(jax.grad(loss))(outputs).astype(weights.dtype))
        return jnp.stack([weights, jnp.broadcast_to(still_to_learn[None], weights.shape)])

    @naming("trak")
    def scores(checkpoints: Iterable[PyTree], train: Any, test: Any) -> Array:
        train, test = checked_batch("train", train), checked_batch("test", test)
        trees = _checked_checkpoints(checkpoints)
        total, count = _summed(of_checkpoint(params, train, test) for params in trees)
        return total[0] / count * (total[1] / count)

    return scores
