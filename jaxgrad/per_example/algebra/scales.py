"""Powers of two near the magnitude of numbers, to divide by before squaring; and sums along rows."""

import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

LONG_AXIS = 32  # from this length, the last axis is reduced first, which on CPU is faster than all axes at once
LONG_ROW = 512  # from this length, a reduction is as fast as a product with ones, and allocates nothing


def nearest_power(a: Array) -> Array:
    """The largest power of two ≤ a ≥ 0, at most 2 ** (maxexp - 3); 0 if a is 0 or subnormal. Not differentiated."""
    bits = jnp.finfo(a.dtype)
    whole = np.dtype(f"int{bits.bits}")
    exponent = np.asarray(2 ** (bits.bits - 1) - 2**bits.nmant, whole)
    most = np.asarray(2.0 ** (bits.maxexp - 3), a.dtype).view(whole)
    found = lax.bitcast_convert_type(lax.stop_gradient(a), whole) & exponent
    return lax.bitcast_convert_type(jnp.minimum(found, most), a.dtype)


def power_of_two(a: Array) -> Array:
    """`nearest_power`, but 1 where that is 0. Dividing by it loses no digits; values that are not finite stay so."""
    near = nearest_power(a)
    return jnp.where(near == 0, jnp.ones_like(near), near)


def largest(a: Array) -> Float[Array, " B"]:
    """[B, …] → [B]: a number near each example's largest magnitude; not differentiated."""
    a = jnp.abs(lax.stop_gradient(compact(a)))
    if a.ndim > 2 and a.shape[-1] >= LONG_AXIS:  # powers of two keep XLA from fusing both reductions into one
        a = nearest_power(a.max(-1))
    flat = _flat(a)
    return flat.max(1) if flat.shape[1] >= LONG_ROW else row_sums(flat)


def row_sums(a: Array) -> Float[Array, " B"]:
    """[B, …] → [B]: sum each example's entries; short rows by a product with ones, which is faster on CPU."""
    flat = _flat(a)
    if flat.shape[1] >= LONG_ROW:
        return flat.sum(1)
    return jnp.matmul(jnp.ones((1, flat.shape[1]), a.dtype), flat.T, precision=lax.Precision.HIGHEST)[0]


def compact(a: Array) -> Array:
    """[B, …] without axes of size 1, so that arrays shared by two parameters are identical and computed once."""
    return a.reshape(a.shape[0], *(n for n in a.shape[1:] if n != 1))


def _flat(a: Array) -> Array:
    return a.reshape(a.shape[0], math.prod(a.shape[1:]))
