"""Powers of two near the magnitude of numbers, to divide by before squaring; and sums along rows."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxgrad.per_example.algebra.platforms import by_platform

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


def squares(a: Array, first: int, dtype: jax.typing.DTypeLike) -> tuple[Array, Array]:
    """(Σ (a / unit)², unit) over all axes from `first` on, in `dtype`; unit is a power of two near the magnitude.

    Nothing overflows or underflows. Where a is 0 both are 0. The unit is not differentiated. It comes from the largest
    magnitude, in a pass of its own, or for a whole example from a number near it. On a GPU one pass adds up large,
    middling and small entries apart (Anderson 2017, ACM TOMS Algorithm 978), and the unit comes from their sum; a TPU's
    compiler joins the largest magnitude to what makes the array, and not the three sums.
    """
    options = first, jnp.dtype(dtype)
    return by_platform(_squares_in_two_passes, _squares_in_one_pass, *options, tpu=_squares_in_two_passes)(a)


def _squares_in_two_passes(a: Array, first: int, dtype: jnp.dtype) -> tuple[Array, Array]:
    a = a.astype(dtype)
    most = largest(a) if first == 1 else jnp.abs(lax.stop_gradient(a)).max(-1, initial=0)
    parts = (a / power_of_two(most).reshape(*most.shape, *[1] * (a.ndim - most.ndim))) ** 2
    return row_sums(parts) if first == 1 else parts.sum(-1), nearest_power(most)


LARGE = {jnp.dtype(jnp.float32): (2.0**52, 2.0**-76), jnp.dtype(jnp.float64): (2.0**486, 2.0**-538)}
SMALL = {jnp.dtype(jnp.float32): (2.0**-63, 2.0**75), jnp.dtype(jnp.float64): (2.0**-511, 2.0**537)}
"""The magnitude from which on an entry counts as large or small, and its multiplier before it is squared."""


def _squares_in_one_pass(a: Array, first: int, dtype: jnp.dtype) -> tuple[Array, Array]:
    size, axes = jnp.abs(lax.stop_gradient(a)).astype(dtype), tuple(range(first, a.ndim))
    (most, down), (least, up) = ([jnp.asarray(x, dtype) for x in pair[dtype]] for pair in (LARGE, SMALL))
    one = jnp.ones((), dtype)

    def squared(these: Array, scale: Array) -> Array:
        return jnp.where(these, a.astype(dtype) * scale, jnp.zeros_like(size)) ** 2

    large, small = size > most, size < least
    bands = squared(large, down), squared(~(large | small), one), squared(small, up)
    parts = _sums(axes, *bands)
    of_large, of_middle = parts[0] > 0, ~(parts[1] == 0)  # NaN is in the middle
    beside = safe_sqrt(parts[1]) * down, safe_sqrt(parts[2]) / up  # before they are squared, so that nothing underflows
    total = jnp.where(of_large, parts[0] + beside[0] ** 2, jnp.where(of_middle, parts[1] + beside[1] ** 2, parts[2]))
    scale = jnp.where(of_large, one / down, jnp.where(of_middle, one, one / up))
    norm = scale * jnp.sqrt(lax.stop_gradient(total))
    return total * (scale / power_of_two(norm)) ** 2, nearest_power(norm)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _sums(axes: tuple[int, ...], *arrays: Array) -> tuple[Array, ...]:
    """The sum of each array, as one reduction, which a compiler does not take apart into one pass for each."""
    zeros = tuple(jnp.zeros((), a.dtype) for a in arrays)

    def add(totals: tuple[Array, ...], terms: tuple[Array, ...]) -> tuple[Array, ...]:
        return tuple(map(jnp.add, totals, terms))

    found: tuple[Array, ...] = tuple(lax.reduce(arrays, zeros, add, axes))
    return found


@_sums.defjvp
def _tangents_of_sums(axes: tuple[int, ...], primals: Any, tangents: Any) -> tuple[Any, Any]:
    return _sums(axes, *primals), tuple(t.sum(axes) for t in tangents)


def safe_sqrt(a: Array) -> Array:
    """√a with derivative 0 at 0."""
    positive = jnp.where(a == 0, jnp.ones_like(a), a)
    return jnp.where(a == 0, jnp.zeros_like(a), jnp.sqrt(positive))


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
