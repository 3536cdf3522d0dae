"""What a builder returns, and what builders share."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Built(NamedTuple):
    """A model with its loss: loss(params, *example) of one example, the params, a batch."""

    loss: Callable[..., jax.Array]
    params: Any
    batch: tuple[Any, ...]


def of_dtype(tree: Any, dtype: Any) -> Any:
    """The tree with every floating-point number in a dtype, and complex numbers made of it."""
    complex_dtype = jnp.result_type(dtype, jnp.complex64)

    def cast(a: Any) -> Any:
        if jnp.issubdtype(a.dtype, jnp.complexfloating):
            return a.astype(complex_dtype)
        return a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a

    return jax.tree.map(cast, tree)


def squared_error(prediction: jax.Array, target: jax.Array) -> jax.Array:
    return jnp.mean((prediction - target) ** 2)
