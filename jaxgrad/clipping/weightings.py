"""Weightings: the factors that multiply the gradients, and how they are reduced so that no gradient is too long."""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from jaxgrad.per_example.algebra.norms import root_sum_of_squares, shortened
from jaxgrad.sharding import kept

Weighting = Callable[[Array, Array], Array]
"""A function (norms [B], bound) → the numbers [B] by which the gradients are multiplied."""

# A gradient that is a sum of terms of magnitude S is treated as if its norm were √(‖g‖² + GUARD·S²), because rounding
# errors grow with S. Together with EPSILON, which determines ε, this gives the guarantee of `clipped_grad`. The keys
# are the dtypes of the sum.
GUARD = {jnp.dtype(jnp.float32): 2.0**-20, jnp.dtype(jnp.float64): 2.0**-40}


def _normalize(norms: Array, max_norm: Array) -> Array:
    """max_norm/‖g‖; 0 for a zero gradient."""
    positive = norms > 0
    return jnp.where(positive, max_norm / jnp.where(positive, norms, jnp.ones_like(norms)), jnp.zeros_like(norms))


def automatic(gamma: float = 0.01) -> Weighting:
    """The weighting of automatic clipping, max_norm/(‖g‖ + gamma) (Bu et al. 2023), which has no bound to tune.

    Example:
        >>> automatic(gamma=1.0)(jnp.array([0.0, 1.0, 3.0]), jnp.array(1.0)).tolist()
        [1.0, 0.5, 0.25]
    """

    def weighting(norms: Array, max_norm: Array) -> Array:
        return max_norm / (norms + gamma)

    return weighting


WEIGHTINGS: dict[str, Weighting] = {"clip": shortened, "normalize": _normalize}
"""The weightings that `clipped_grad` accepts by name."""


def one_for_each(c: Any, norms: Array) -> Array:
    """Return the weighting's result as an array of the norms' shape and dtype."""
    shape = getattr(c, "shape", () if isinstance(c, int | float) else None)
    if shape not in ((), norms.shape) or jnp.issubdtype(jnp.result_type(c), jnp.complexfloating):
        got = type(c).__name__ if shape is None else f"{jnp.result_type(c)} of shape {shape}"
        raise ValueError(
            f"clipped_grad: expected a weighting that returns an array of factors of shape {norms.shape}, like its "
            f"norms, or one number for all, got {got}."
        )
    return jnp.broadcast_to(jnp.asarray(c, norms.dtype), norms.shape)


def limited(c: Array, norms: Array, magnitudes: Array | None, limit: Array, keep: Array, rounding: Array) -> Array:
    """Reduce factors c [B] so that no gradient becomes longer than the limit, rounding included; 0 where not kept."""
    norms, rounding = kept(keep, norms), rounding.astype(norms.dtype)
    largest, size = norms, norms
    if magnitudes is not None:
        guard = jnp.asarray(math.sqrt(GUARD[jnp.dtype(norms.dtype)]), norms.dtype)
        magnitudes = kept(keep, magnitudes.astype(norms.dtype))
        largest, size = (root_sum_of_squares([norms, part]) for part in (guard * magnitudes, magnitudes))
    largest = largest + rounding * size
    finfo = jnp.finfo(norms.dtype)
    bound = jnp.minimum(limit, finfo.max)
    c_max = bound / jnp.maximum(largest, jnp.maximum(bound / (finfo.max / 4), finfo.tiny))  # never infinite
    c = jnp.clip(c, -c_max, c_max)
    return kept(keep & ~jnp.isnan(c), c)
