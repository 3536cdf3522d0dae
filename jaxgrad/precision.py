"""What the library computes in."""

import jax
import jax.numpy as jnp


def working_dtype(*dtypes: jax.typing.DTypeLike) -> jnp.dtype:
    """What to compute in for inputs of these floating dtypes: float64 if one of them is, otherwise float32."""
    return jnp.dtype(jnp.float64 if any(jnp.dtype(d) == jnp.float64 for d in dtypes) else jnp.float32)
