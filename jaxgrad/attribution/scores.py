"""Similarities of gradients, and how much of a mean gradient is noise."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxgrad.errors import naming
from jaxgrad.per_example.algebra.scales import power_of_two
from jaxgrad.per_example.gradients import PerExampleGrads, checked_gradients
from jaxgrad.per_example.serialized import named_tuple
from jaxgrad.precision import added


@naming("cosine_similarity")
def cosine_similarity(g: PerExampleGrads, other: PerExampleGrads | None = None) -> Float[Array, "B C"]:
    """The cosines of the angles between all pairs of gradients, one from g and one from `other` or, without it, from g.

    Args:
        g: gradients of B examples.
        other: gradients of C examples with respect to the same parameters; None for g itself.

    Returns:
        [B, C], in [-1, 1]; 0 for a zero gradient.

    Raises:
        ValueError: g and `other` are gradients with respect to different parameters.

    Example:
        >>> g = jg.per_example_grad(lambda w, x: w @ x)(jnp.zeros(2), jnp.array([[2.0, 0], [0, 0], [3.0, 3.0]]))
        >>> cosine_similarity(g).round(3)[0].tolist()
        [1.0, 0.0, 0.707]
    """
    checked_gradients(g)
    first, inverse = _near_unit_norm(g)
    second, inverse_ = (None, inverse) if other is None else _near_unit_norm(other)
    return jnp.clip(first.gram(second) * inverse[:, None] * inverse_[None, :], -1, 1)


def _near_unit_norm(g: PerExampleGrads) -> tuple[PerExampleGrads, Array]:
    """Divide each gradient by a power of two near its norm; also return 1/norm of the results, 0 where it is zero."""
    norms = g.norms()
    unit = power_of_two(norms)
    scaled = norms / unit
    return g.scale(1 / unit), jnp.where(scaled == 0, scaled, 1 / jnp.where(scaled == 0, jnp.ones_like(scaled), scaled))


@named_tuple
class NoiseScale(NamedTuple):
    """The noise scale of a batch of gradients. For several batches, average noise and signal before you divide them.

    Attributes:
        noise: tr Σ, the variance of one example's gradient, over all parameters together.
        signal: ‖mean gradient‖² over all data; an unbiased estimate, which may be negative.
        scale: noise / signal: the batch size, in examples, at which noise and signal are equal; inf if signal ≤ 0.

    Example:
        >>> g = jg.per_example_grad(lambda w, x: w @ x)(jnp.zeros(2), jnp.array([[3.0, 1], [3.0, -1]]))
        >>> noise_scale(g).scale.round(3).item()
        0.25
    """

    noise: Array
    signal: Array
    scale: Array


@naming("noise_scale")
def noise_scale(g: PerExampleGrads) -> NoiseScale:
    """The simple noise scale tr Σ / ‖ḡ‖²: roughly the batch size above which more examples help little.

    Formula: the noise is tr Σ = (Σ‖g_b‖² - B‖ḡ‖²)/(B - 1) and the signal is ‖ḡ‖² - tr Σ/B; both are unbiased. Accuracy:
    the absolute error of tr Σ is a few eps times the mean ‖g_b‖². If tr Σ is smaller than that, as for equal gradients,
    the noise may be 0 but is never negative.

    Args:
        g: gradients of B ≥ 2 examples that were drawn at random from many more; fewer than 2 give NaN. If the examples
            are the whole data set, the signal is too low by noise/B.

    Returns:
        `NoiseScale` of scalars.

    Example:
        >>> g = jg.per_example_grad(lambda w, x: w @ x)(jnp.zeros(2), jnp.array([[3.0, 1], [3.0, -1]]))
        >>> [number.round(3).item() for number in noise_scale(g)]
        [2.0, 8.0, 0.25]

    Source: McCandlish et al. 2018, appendix A.1.
    """
    checked_gradients(g)
    B, norms = g.batch_size, g.norms()
    if isinstance(B, int) and B < 2:
        return NoiseScale(*[jnp.full((), jnp.nan, norms.dtype)] * 3)
    unit = power_of_two(norms.max())
    total = g.scale(jnp.full_like(norms, 1) / unit).sum(norms.dtype)
    mean = added([(leaf.astype(norms.dtype) ** 2).sum() for leaf in jax.tree.leaves(total)]) / B / B
    spread = (((norms / unit) ** 2).sum() - B * mean) / (B - 1)
    noise = jnp.maximum(spread, jnp.zeros_like(spread))
    signal = mean - noise / B
    infinite = signal <= 0
    scale = jnp.where(infinite, jnp.ones_like(noise), noise) / jnp.where(infinite, jnp.zeros_like(signal), signal)
    return NoiseScale(noise * unit * unit, signal * unit * unit, scale)
