"""Sums and products together with their rounding errors.

exp(-z²/2) multiplies the rounding error of its argument by the argument: at z = 13 in float32, rounding z² correctly
still costs forty units in the last place. `two_product` and `two_sum` return the rounded result and the part that
rounding dropped, so that it can be added back. They stay exact if a compiler fuses a product and a sum into one
operation, because every product that has to be exact is exact without rounding.

Source: Dekker, A floating-point technique for extending the available precision (1971); Knuth, TAOCP 2, 4.2.2.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

# (exponent bits, mantissa bits) of a half, chosen so that the product of two halves is exact.
_HALF = {jnp.dtype(jnp.float32): (8, 11), jnp.dtype(jnp.float64): (11, 25)}


def _split(a: Array) -> tuple[Array, Array]:
    exponent_bits, mantissa_bits = _HALF[a.dtype]
    high = lax.reduce_precision(a, exponent_bits, mantissa_bits)
    return high, a - high


def two_product(a: Float[Array, "*shape"], b: Float[Array, "*shape"]) -> tuple[Array, Array]:
    """Return the product a·b as (p, e): p is the rounded product, p + e the exact one.

    Args:
        a, b: float32 or float64, of the same shape and dtype; |a|, |b| below the square root of the largest float.
    """
    a_high, a_low = _split(a)
    b_high, b_low = _split(b)
    product = a * b
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


def two_sum(a: Float[Array, "*shape"], b: Float[Array, "*shape"]) -> tuple[Array, Array]:
    """Return the sum a + b as (s, e): s is the rounded sum, s + e the exact one."""
    total = a + b
    b_part = total - a
    return total, (a - (total - b_part)) + (b - b_part)
