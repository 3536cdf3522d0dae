"""Scores of a loss over several checkpoints of its parameters."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxgrad.errors import caller, naming
from jaxgrad.per_example.arguments import checked_batch
from jaxgrad.per_example.measure import per_example_norms
from jaxgrad.per_example.transform import per_example_grad


def grand(
    loss: Callable[..., Any], *, argnums: int | Sequence[int] = 0, in_axes: Any = 0
) -> Callable[..., Float[Array, " B"]]:
    """GraNd: the norm of each example's gradient, averaged over several initializations or checkpoints.

    Args:
        loss: loss of one example, as in `per_example_grad`.
        argnums, in_axes: as in `per_example_grad`.

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
    measured = per_example_norms(loss, argnums, in_axes=in_axes)
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
    loss: Callable[..., Any], *, argnums: int | Sequence[int] = 0, in_axes: Any = 0
) -> Callable[..., Float[Array, "C B"]]:
    """TracIn: how much training on each example lowered each test loss, to first order, summed over checkpoints.

    Formula: Σ_k η_k test_c(w_k) · g_b(w_k), for plain gradient descent with learning rates η_k.

    Args:
        loss: loss of one example, as in `per_example_grad`.
        argnums, in_axes: as in `per_example_grad`.

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
    gradients = per_example_grad(loss, argnums, in_axes=in_axes)
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
