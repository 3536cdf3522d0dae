"""The normal distribution's density and tail, accurate to the last digits even for large |z|.

The gelu needs φ(z) = exp(-z²/2)/√(2π) and Φ(z) = ∫ φ. The tail is computed as Φ(-t) = φ(t)·M(t), where Mills' ratio M
is a smooth and slowly varying function, so that no digit is lost where Φ is tiny.
"""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxgrad.exercise.compensated import two_product

# Chebyshev coefficients of (1 + t)·M(t) in u = (t - 5)/(t + 5), for 0 ≤ t < ∞.
_MILLS = (
    1.1579976221305188,
    -0.1633449388451398,
    -0.013683136055781576,
    0.03082200019810004,
    -0.016220073012046806,
    0.005616691016460094,
    -0.0014133933783549216,
    0.0002502625460725661,
    -2.468907239728387e-05,
    -1.0107964061837592e-06,
    7.495419179740573e-07,
    -7.600274268728337e-08,
    -1.1574771441328644e-08,
    3.333386472599843e-09,
    7.538039628171347e-11,
    -1.1104247263727494e-10,
    3.509243776551059e-12,
    3.6894953861750955e-12,
    -2.3376697776383095e-13,
    -1.3271797523541405e-13,
    9.921706995888276e-15,
    5.276004995455379e-15,
    -3.373097694187922e-16,
    -2.2804338776379946e-16,
)
_TERMS = {jnp.dtype(jnp.float32): 14, jnp.dtype(jnp.float64): len(_MILLS)}


def mills_ratio(t: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """M(t) = Φ(-t)/φ(t) for t ≥ 0, in float32 or float64. The error bounds of the gelu include its error."""
    u = (t - 5) / (t + 5)
    # Clenshaw's recurrence, b_k = 2u·b_(k+1) - b_(k+2) + c_k.
    b_next, b = jnp.zeros_like(u), jnp.zeros_like(u)
    for c in _MILLS[_TERMS[t.dtype] - 1 : 0 : -1]:
        b_next, b = b, 2 * u * b - b_next + c
    return (u * b - b_next + _MILLS[0]) / (1 + t)


def root_density(t: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """exp(-t²/4), the square root of the density up to a constant.

    A product `r * (r * c)` underflows only where the true value does, whereas `exp(-t²/2) * c` underflows earlier.
    """
    t = jnp.minimum(t, jnp.asarray(80, t.dtype))  # exp(-1600) is 0 in float64, and t² cannot overflow
    square, lost = two_product(t, t)
    return jnp.exp(-square / 4) * (1 - lost / 4)


def halves(z: Float[Array, "*shape"]) -> tuple[Array, Array, Array]:
    """Return (r, c, d) for t = |z|: r = exp(-t²/4), c·r² = Φ(-t), d·r² = φ(t)."""
    t = lax.select(z >= 0, z, -z)
    density = jnp.full_like(t, 1 / math.sqrt(2 * math.pi))
    return root_density(t), density * mills_ratio(t), density
