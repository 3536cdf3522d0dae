"""Train the network with its closed-form gradient."""

from typing import NamedTuple

import jax
import numpy as np
import optax
from jaxtyping import Array, Float
from rich.console import Console
from rich.progress import track

from jaxgrad.exercise import Activation, Params, closed_form
from jaxgrad.precision import working_dtype

LEARNING_RATE = 0.01


class Trained(NamedTuple):
    """The final parameters, and the mean loss before each step."""

    params: Params
    losses: Float[np.ndarray, " steps"]


def train(
    params: Params, X: Float[Array, "n D"], Y: Float[Array, " n"], activation: Activation, steps: int, console: Console
) -> Trained:
    """Run full-batch Adam with `closed_form.value_and_grad`; on a terminal, a bar shows the progress.

    The optimizer keeps float32 copies of float16 and bfloat16 parameters; the gradient is that at the rounded ones.
    """
    optimizer = optax.adam(LEARNING_RATE)
    dtype = params.W.dtype
    params = _cast(params, working_dtype(dtype))

    @jax.jit
    def step(params: Params, state: optax.OptState) -> tuple[Params, optax.OptState, Array]:
        loss, gradient = closed_form.value_and_grad(_cast(params, dtype), X, Y, activation)
        updates, state = optimizer.update(_cast(gradient, params.W.dtype), state, params)
        return optax.apply_updates(params, updates), state, loss

    state = optimizer.init(params)
    losses = []
    progress = track(range(steps), "training", console=console, transient=True, disable=not console.is_terminal)
    for _ in progress:
        params, state, loss = step(params, state)
        losses.append(loss)
    return Trained(_cast(params, dtype), np.asarray([float(loss) for loss in losses]))


def _cast(params: Params, dtype: jax.typing.DTypeLike) -> Params:
    return Params(*(leaf.astype(dtype) for leaf in params))
