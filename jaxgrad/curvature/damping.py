"""Dampings: a number μ, or a multiple of the mean squared norm of the gradients."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxgrad.errors import caller
from jaxgrad.per_example.algebra.scales import power_of_two
from jaxgrad.per_example.serialized import named_tuple


@named_tuple
class Relative(NamedTuple):
    """A damping that `relative` returns.

    Attributes:
        ratio: the damping divided by the mean squared norm.

    Example:
        >>> relative(0.1).ratio
        0.1
    """

    ratio: Any


def relative(ratio: Any) -> Relative:
    """The damping μ = ratio · mean_b ‖g_b‖², for every function that takes a damping.

    The mean squared norm of the rows of G is the trace of GᵀG/n, so the same ratio damps to the same degree whatever
    the scale of the loss, the number of parameters and the number of examples are. In `damped_solve` the ridge μn is
    ratio · tr K. A derivative takes the mean squared norm into account.

    Args:
        ratio: a number ≥ 0; start with 0.01 to 0.1. It may be traced.

    Returns:
        `Relative`, to be passed as `damping=`.

    Example:
        >>> g = jg.per_example_grad(lambda w, x: w @ x)(jnp.zeros(3), 10 * jnp.eye(3))
        >>> step = jg.curvature.natural_gradient(g, damping=relative(0.01))             # μ = 0.01 · 100
        >>> bool(jnp.allclose(step, jg.curvature.natural_gradient(g, damping=1.0)))
        True
    """
    return Relative(ratio)


def checked_damping(damping: Any, positive: bool = False) -> None:
    """Raise ValueError if the damping is known not to be a number ≥ 0 (with `positive`, > 0), or `relative` of one."""
    number = damping.ratio if isinstance(damping, Relative) else damping
    try:
        wrong = np.ndim(number) != 0 or not (number > 0 if positive else number >= 0)
    except jax.errors.TracerBoolConversionError:
        wrong = False  # a traced damping has no value yet
    except TypeError:
        wrong = True
    if wrong:
        raise ValueError(f"{caller()}: expected a damping {'>' if positive else '≥'} 0, got {damping}.")


def unit_and_ridge(norms: Float[Array, " n"], damping: Any) -> tuple[Array, Array]:
    """(unit, μn/unit²); unit is a power of two near the largest of the n norms or √(μn), whichever is larger."""
    n, largest = jnp.asarray(norms.shape[0], norms.dtype), norms.max()
    if not isinstance(damping, Relative):
        mu = jnp.asarray(damping, norms.dtype)
        unit = power_of_two(jnp.maximum(largest, jnp.sqrt(lax.stop_gradient(mu)) * jnp.sqrt(n)))
        return unit, mu / unit * n / unit
    ratio, unit = jnp.asarray(damping.ratio, norms.dtype), power_of_two(largest)
    total = ((norms / unit) ** 2).sum()
    more = power_of_two(jnp.maximum(jnp.ones_like(total), jnp.sqrt(lax.stop_gradient(ratio * total))))
    return unit * more, ratio / more * total / more


def absolute_damping(damping: Any, mean_square: Any) -> Any:
    """μ, for gradients of this mean squared norm."""
    return damping.ratio * mean_square if isinstance(damping, Relative) else damping
