"""The dtypes that the library computes in."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array


def working_dtype(*dtypes: jax.typing.DTypeLike) -> jnp.dtype:
    """Return the dtype to compute in: float64 if one of these is double, otherwise float32; complex if one is."""
    kinds = [jnp.dtype(d) for d in dtypes]
    double = any(d in (jnp.float64, jnp.complex128) for d in kinds)
    if any(jnp.issubdtype(d, jnp.complexfloating) for d in kinds):
        return jnp.dtype(jnp.complex128 if double else jnp.complex64)
    return jnp.dtype(jnp.float64 if double else jnp.float32)


def added(terms: Sequence[Array]) -> Array:
    """Return the sum of float32 or float64 arrays, in the wider of the two."""
    dtype = working_dtype(*(term.dtype for term in terms))
    total = terms[0].astype(dtype)
    for term in terms[1:]:
        total = total + term.astype(dtype)
    return total


def index_dtype(*dtypes: jax.typing.DTypeLike) -> jnp.dtype:
    """Return an integer dtype that holds every index into an axis, whichever of these dtypes the index has."""
    return jnp.dtype(jnp.int64 if any(jnp.dtype(dtype).itemsize > 4 for dtype in dtypes) else jnp.int32)


def joined(arrays: Sequence[Array], axis: int = 0) -> Array:
    """Concatenate arrays in their own dtype if they share one, otherwise in one that holds them (float32 or wider)."""
    dtype, *others = {a.dtype for a in arrays}
    if others:
        dtype = (working_dtype if jnp.issubdtype(dtype, jnp.inexact) else index_dtype)(dtype, *others)
    return jnp.concatenate([a.astype(dtype) for a in arrays], axis)
