"""The network of the exercise as pure functions of ONE example: margin wᵀσ(Wx + b), loss log(1 + exp(-y·margin)).

No function here has a batch axis; `jax.vmap` puts it there. Nothing here is rearranged for accuracy or speed beyond
the stable log(1 + exp(·)): this is the loss as anyone would write it, and what `jax.grad` is asked to differentiate.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from jaxtyping import Key as PRNGKey
from jaxtyping import PRNGKeyArray

from jaxgrad.network.activations import Activation, logistic
from jaxgrad.network.checks import one_example


class Params(NamedTuple):
    """The weights of the network: a pytree, and the form of every gradient with respect to them."""

    W: Float[Array, "*batch H D"]
    b: Float[Array, "*batch H"]
    w: Float[Array, "*batch H"]


def init_params(
    key: PRNGKeyArray | PRNGKey[Array, ""], inputs: int, hidden: int, dtype: jax.typing.DTypeLike = jnp.float32
) -> Params:
    """Random weights: W with variance 1/inputs, w with variance 1/hidden, b zero.

    Args:
        key: a PRNG key.
        inputs: D, the length of an example x.
        hidden: H, the number of hidden units.
        dtype: any floating dtype.

    Returns:
        Params(W [H, D], b [H], w [H]).

    Raises:
        ValueError: a negative size.
        TypeError: `dtype` is not floating.

    Example:
        >>> init_params(jax.random.key(0), inputs=30, hidden=16).W.shape
        (16, 30)
    """
    if inputs < 0 or hidden < 0:
        raise ValueError(
            f"init_params: expected sizes ≥ 0, got inputs={inputs}, hidden={hidden}. Pass the lengths of x and of b."
        )
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"init_params: expected a floating dtype, got {jnp.dtype(dtype)}. Pass jnp.float32, say.")
    key_W, key_w = jax.random.split(key)
    W = jax.random.normal(key_W, (hidden, inputs), jnp.float32) / max(inputs, 1) ** 0.5
    w = jax.random.normal(key_w, (hidden,), jnp.float32) / max(hidden, 1) ** 0.5
    return Params(W.astype(dtype), jnp.zeros(hidden, dtype), w.astype(dtype))


@one_example
def margin(params: Params, x: Float[Array, " D"], activation: Activation = logistic) -> Float[Array, ""]:
    """The network's output wᵀσ(Wx + b) for one example; its sign is the predicted class.

    Args:
        params: Params(W [H, D], b [H], w [H]).
        x: [D], floating.
        activation: σ.

    Raises:
        ValueError, TypeError: shapes that do not match, dtypes that are not floating; before tracing.

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
    """The logistic loss log(1 + exp(-y·margin)) of one example: finite for every finite margin.

    Args:
        params: Params(W [H, D], b [H], w [H]).
        x: [D], floating.
        y: +1 or -1, floating (`signs` makes it from labels); any other number scales the margin.
        activation: σ.

    Returns:
        A scalar in the dtype that JAX promotes params, x and y to.

    Raises:
        ValueError, TypeError: shapes that do not match, dtypes that are not floating; before tracing.

    Example:
        >>> params = Params(jnp.ones((2, 3)), jnp.zeros(2), jnp.ones(2))
        >>> float(loss(params, jnp.zeros(3), -1.0))        # log(1 + e)
        1.31326...
    """
    return jax.nn.softplus(-y * margin(params, x, activation))
