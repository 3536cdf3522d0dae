"""Norms of one parameter's gradients, and of several parameters together."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxgrad.per_example import pairs
from jaxgrad.per_example.chunks import map_examples
from jaxgrad.per_example.factors import (
    Dense,
    Factor,
    Outer,
    Precision,
    Rows,
    Windows,
    accumulator,
    added,
    arrays,
    is_nothing,
    largest,
    power_of_two,
    row_sums,
    scale,
    scaled_by_power_of_two,
)

Factors = tuple[Factor, ...]


def squared(leaf: Factors, chunk_bytes: int, precision: Precision = None) -> Array:
    """[B]: ‖Σ_i f_i‖² of one parameter's factors, cross terms included."""
    terms = []
    for i, f in enumerate(leaf):
        terms.append(pairs.inner(f, f, chunk_bytes, precision))
        terms += [2 * pairs.inner(f, f_, chunk_bytes, precision) for f_ in leaf[:i]]
    total = added(terms)
    return total if len(leaf) == 1 else jnp.maximum(total, jnp.zeros_like(total))  # NaN stays NaN


def norm(leaf: Factors, chunk_bytes: int, precision: Precision = None) -> Array:
    """[B]: ‖Σ_i f_i‖ of one parameter's factors, each example scaled by powers of two on the way."""
    match leaf:
        case (f,) if is_nothing(f):
            return jnp.zeros_like(arrays(f)[0][:, 0].sum((1, 2)), accumulator(f))
        case (Outer(left, right, _),) if left.shape[1:3] == (1, 1):
            return _of_vectors(left, accumulator(*leaf)) * _of_vectors(right, accumulator(*leaf))
        case (Dense(value, _),):
            return _of_vectors(value, accumulator(*leaf))
        case (Windows() as f,):
            return map_examples(lambda w: _scaled_norm((w,), chunk_bytes, precision), f.at_once, f)
    return _scaled_norm(leaf, chunk_bytes, precision)


def _scaled_norm(leaf: Factors, chunk_bytes: int, precision: Precision) -> Array:
    """By the pairs of factors, each scaled by powers of two."""
    scaled = [scaled_by_power_of_two(f) for f in leaf]
    units = [unit for _, unit in scaled]
    unit = units[0]
    for u in units[1:]:
        unit = jnp.maximum(unit, u)
    if len(leaf) == 1:
        return unit * _safe_sqrt(squared((scaled[0][0],), chunk_bytes, precision))
    balanced = tuple(scale(f, u / unit) for f, u in scaled)
    return unit * _safe_sqrt(squared(balanced, chunk_bytes, precision))


def magnitude(leaf: Factors) -> Array | None:
    """[B]: no less than the sum of the norms of the products that one parameter's gradient is a sum of.

    Where that is far more than the gradient's norm, the products cancel, and the norm is what rounding leaves of them.
    None where there is one product, or what is written out: nothing cancels.

    Formula: of an Outer Σ_t ‖left_t‖ ‖right_t‖; elsewhere ‖left‖ ‖right‖ of all positions together, which is no less by
    Cauchy-Schwarz.
    """
    match leaf:
        case (f,) if is_nothing(f) or isinstance(f, Dense):
            return None
        case (Outer(left, _, _),) if left.shape[1:3] == (1, 1):
            return None
    total = [_magnitude(f, accumulator(*leaf)) for f in leaf if not is_nothing(f)]
    return added(total)


def _magnitude(f: Factor, dtype: jnp.dtype) -> Array:
    match f:
        case Outer(left, right, _):
            return (_of_positions(left, dtype) * _of_positions(right, dtype)).sum((1, 2))
        case Rows(ids, _, _):
            return math.sqrt(ids.shape[1]) * _of_vectors(f.valid()[1], dtype)
        case Windows(left, image, unfolding, _):
            places = math.prod(window.places for window in unfolding.windows)
            return math.sqrt(places) * _of_vectors(left, dtype) * _of_vectors(image, dtype)
        case Dense(value, _):
            return _of_vectors(value, dtype)


def _of_vectors(a: Array, dtype: jax.typing.DTypeLike) -> Array:
    """‖a_b‖ of a [B, …] as one vector an example. Flat: what two parameters share is then computed once."""
    a = a.reshape(a.shape[0], math.prod(a.shape[1:])).astype(dtype)
    unit = power_of_two(largest(a))
    return unit * _safe_sqrt(row_sums((a / unit[:, None]) ** 2))


def _of_positions(a: Array, dtype: jax.typing.DTypeLike) -> Array:
    """‖a_bgt‖ of a [B, G, T, …] as one vector a position."""
    a = a.astype(dtype)
    unit = power_of_two(jnp.abs(lax.stop_gradient(a)).max(3, initial=0))
    return unit * _safe_sqrt(((a / unit[..., None]) ** 2).sum(3))


def _safe_sqrt(a: Array) -> Array:
    """√a with derivative 0 at 0."""
    positive = jnp.where(a == 0, jnp.ones_like(a), a)
    return jnp.where(a == 0, jnp.zeros_like(a), jnp.sqrt(positive))


def shortened(norms: Array, limit: Array) -> Array:
    """min(1, limit/‖g‖): 1 for an infinite limit, NaN for one that is not positive."""
    endless = jnp.isinf(limit)
    finite = jnp.where(endless, jnp.ones_like(limit), limit)
    factor = jnp.where(endless, jnp.ones_like(norms), finite / jnp.maximum(finite, norms))
    return jnp.where(limit > 0, factor, jnp.full_like(norms, jnp.nan))


def together(each: Sequence[Array]) -> Array:
    """√Σ n² of norms that may be huge or tiny."""
    if len(each) == 1:
        return each[0]
    dtype = jnp.dtype(jnp.float64 if any(n.dtype == jnp.float64 for n in each) else jnp.float32)
    stacked = jnp.stack([n.astype(dtype) for n in each])
    unit = power_of_two(stacked.max(0))
    return unit * _safe_sqrt(((stacked / unit[None]) ** 2).sum(0))
