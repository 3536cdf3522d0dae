"""The weights of the exercise's network."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import export
from jaxtyping import Array, Float, PRNGKeyArray


class Params(NamedTuple):
    """The weights of the network as a pytree; a gradient with respect to them is a `Params` too.

    Attributes:
        W: [H, D], the weights of the hidden units; the gradients of a batch have an example axis in front.
        b: [H], their biases.
        w: [H], the weights of the output.

    Example:
        >>> params = Params(W=jnp.ones((2, 3)), b=jnp.zeros(2), w=jnp.ones(2))
        >>> jax.tree.map(jnp.shape, params)
        Params(W=(2, 3), b=(2,), w=(2,))
    """

    W: Float[Array, "*batch H D"]
    b: Float[Array, "*batch H"]
    w: Float[Array, "*batch H"]


export.register_namedtuple_serialization(Params, serialized_name="jaxgrad.Params")


def init_params(
    key: PRNGKeyArray | Array, inputs: int, hidden: int, dtype: jax.typing.DTypeLike = jnp.float32
) -> Params:
    """Random weights: W with variance 1/inputs, w with variance 1/hidden, b zero.

    Args:
        key: a PRNG key.
        inputs: D, the length of an example x.
        hidden: H, the number of hidden units.
        dtype: the floating dtype of the weights.

    Returns:
        Params(W [H, D], b [H], w [H]).

    Raises:
        ValueError: a size is negative.
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
