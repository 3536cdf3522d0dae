"""The exercise's network as pure functions of ONE example: margin wᵀσ(Wx + b), loss log(1 + exp(-y·margin)).

The functions have no batch axis; `jax.vmap` adds it. Only log(1 + exp(·)) is in a stable form; nothing else is
rearranged for accuracy or speed. This is the loss as anyone would write it, and `jax.grad` differentiates it.
"""

import jax
from jaxtyping import Array, Float

from jaxgrad.exercise.activations import Activation, logistic
from jaxgrad.exercise.checks import one_example
from jaxgrad.exercise.params import Params, init_params

__all__ = ["Params", "init_params", "loss", "margin"]


@one_example
def margin(params: Params, x: Float[Array, " D"], activation: Activation = logistic) -> Float[Array, ""]:
    """The network's output wᵀσ(Wx + b) for one example; its sign is the predicted class.

    Args:
        params: Params(W [H, D], b [H], w [H]).
        x: [D], floating.
        activation: σ.

    Returns:
        A scalar in the dtype to which JAX promotes params and x.

    Raises:
        ValueError: the shapes do not match.
        TypeError: a dtype is not floating. Both errors are raised before tracing.

    Example:
        >>> params = Params(jnp.ones((2, 3)), jnp.zeros(2), jnp.ones(2))
        >>> float(margin(params, jnp.zeros(3)))
        1.0
    """
    return params.w @ activation.value(params.W @ x + params.b)


@one_example
def loss(
    params: Params, x: Float[Array, " D"], y: Float[Array, ""], activation: Activation = logistic
) -> Float[Array, ""]:
    """The logistic loss log(1 + exp(-y·margin)) of one example; it is finite for every finite margin.

    Args:
        params: Params(W [H, D], b [H], w [H]).
        x: [D], floating.
        y: +1 or -1, floating (`signs` converts labels); any other number scales the margin.
        activation: σ.

    Returns:
        A scalar in the dtype to which JAX promotes params, x and y.

    Raises:
        ValueError, TypeError: as in `margin`.

    Example:
        >>> params = Params(jnp.ones((2, 3)), jnp.zeros(2), jnp.ones(2))
        >>> float(loss(params, jnp.zeros(3), -1.0))        # log(1 + e)
        1.31326...
    """
    return jax.nn.softplus(-y * margin(params, x, activation))
