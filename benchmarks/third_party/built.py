"""The type that a builder returns, and helpers for several builders."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Built(NamedTuple):
    """A model: the loss(params, *example) of one example, the parameters, and a batch."""

    loss: Callable[..., jax.Array]
    params: Any
    batch: tuple[Any, ...]


def cast(tree: Any, dtype: Any) -> Any:
    """Cast the floating-point arrays of a tree to a dtype, and the complex ones to its complex counterpart."""
    complex_dtype = jnp.result_type(dtype, jnp.complex64)

    def cast_leaf(a: Any) -> Any:
        if jnp.issubdtype(a.dtype, jnp.complexfloating):
            return a.astype(complex_dtype)
        return a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a

    return jax.tree.map(cast_leaf, tree)


def squared_error(prediction: jax.Array, target: jax.Array) -> jax.Array:
    return jnp.mean((prediction - target) ** 2)
