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
    magnitude, in a pass of its own, or for a whole example from a number near it. On a GPU one pass adds up the squares
    of large, middling and small entries in units of their own (Anderson 2017, ACM TOMS Algorithm 978), and the unit
    comes from their sum; a TPU's compiler joins the largest magnitude to what makes the array, and not this sum.
    """
    options = first, jnp.dtype(dtype)
    return by_platform(_squares_in_two_passes, _squares_in_one_pass, *options, tpu=_squares_in_two_passes)(a)


def _squares_in_two_passes(a: Array, first: int, dtype: jnp.dtype) -> tuple[Array, Array]:
    a = a.astype(dtype)
    most = largest(a) if first == 1 else jnp.abs(lax.stop_gradient(a)).max(-1, initial=0)
    parts = (a / power_of_two(most).reshape(*most.shape, *[1] * (a.ndim - most.ndim))) ** 2
    return row_sums(parts) if first == 1 else parts.sum(-1), nearest_power(most)


BANDS = {jnp.dtype(jnp.float32): (2.0**52, 2.0**-63, 2.0**76), jnp.dtype(jnp.float64): (2.0**486, 2.0**-511, 2.0**538)}
"""(large, small, unit): a magnitude above `large` is divided by `unit` before it is squared, and one below `small` by
1 / unit."""


def _squares_in_one_pass(a: Array, first: int, dtype: jnp.dtype) -> tuple[Array, Array]:
    size, axes = jnp.abs(lax.stop_gradient(a)).astype(dtype), tuple(range(first, a.ndim))
    large, small, unit = BANDS[dtype]
    units = jnp.where(size > large, unit, jnp.where(size < small, 1 / unit, jnp.ones_like(size)))  # NaN has the unit 1
    scales = jnp.where(size > large, 1 / unit, jnp.where(size < small, unit, jnp.ones_like(size)))
    total, found = _sum_in_units(axes, (a.astype(dtype) * scales) ** 2, units)
    norm = found * jnp.sqrt(lax.stop_gradient(total))
    return total * (found / power_of_two(norm)) ** 2, nearest_power(norm)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _sum_in_units(axes: tuple[int, ...], squares: Array, units: Array) -> tuple[Array, Array]:
    """(Σ squares · (units / unit)², unit), where unit is the largest of the units; these are three, as in BANDS.

    Both are parts of one complex number: XLA joins a reduction with one result to what makes the array, and takes
    another pass over the array for a reduction with two.
    """
    _, _, unit = BANDS[squares.dtype]

    def add(x: Array, y: Array) -> Array:
        x_sum, x_unit, y_sum, y_unit = lax.real(x), lax.imag(x), lax.real(y), lax.imag(y)
        above, below = jnp.where(x_unit < y_unit, y_sum, x_sum), jnp.where(x_unit < y_unit, x_sum, y_sum)
        # Between large and small the ratio is smaller yet, but what is small then adds nothing in either case.
        ratio = jnp.where(x_unit == y_unit, jnp.ones_like(x_unit), 1 / unit)
        return lax.complex(above + below * ratio * ratio, jnp.maximum(x_unit, y_unit))

    zero = lax.complex(jnp.zeros((), squares.dtype), jnp.asarray(1 / unit, squares.dtype))
    found = lax.reduce(lax.complex(squares, units), zero, add, axes)
    return lax.real(found), lax.imag(found)


@_sum_in_units.defjvp
def _tangents_of_sum(axes: tuple[int, ...], primals: Any, tangents: Any) -> tuple[Any, Any]:
    (squares, units), (moved, _) = primals, tangents
    total, unit = _sum_in_units(axes, squares, units)
    ratio = units / jnp.expand_dims(unit, axes)
    return (total, unit), ((moved * ratio * ratio).sum(axes), jnp.zeros_like(unit))


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
