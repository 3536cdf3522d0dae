"""optax's `differentially_private_aggregate` on factored gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree
from optax import contrib

from jaxgrad.clipping.weightings import limited
from jaxgrad.errors import naming
from jaxgrad.per_example.algebra.norms import shortened
from jaxgrad.per_example.gradients import PerExampleGrads
from jaxgrad.per_example.masks_and_bounds import checked_bound
from jaxgrad.sharding import kept

__all__ = ["differentially_private_aggregate"]


def differentially_private_aggregate(
    l2_norm_clip: jax.typing.ArrayLike, noise_multiplier: jax.typing.ArrayLike, key: jax.Array | int | None = None
) -> optax.GradientTransformation:
    """Clip, average and add noise as `optax.contrib.differentially_private_aggregate` does, without materializing.

    It takes the result of `jg.per_example_grad(loss)(params, *batch)`, where optax's function takes gradients with an
    example axis. Put it first in a chain, as optax's. The state and the noise are optax's: the same key gives the same
    numbers. The mean is the same up to rounding, with two differences: a gradient that is NaN or infinite adds zero;
    and a gradient whose products cancel to less than their rounding errors is clipped a little more (see
    `jg.clipped_grad`).

    Args:
        l2_norm_clip: a positive number: the largest norm of one example's gradient. It may be traced.
        noise_multiplier: standard deviation of the noise in the sum, divided by l2_norm_clip.
        key: a random key, or a seed.

    Returns:
        An `optax.GradientTransformation`. Its update turns `PerExampleGrads` into a tree of the parameters' shapes and
        dtypes; it passes anything else to optax's own function.

    Raises:
        ValueError: the bound is not a positive number; or, in an update, the gradients have the parameters' own shapes.

    Example:
        >>> import optax
        >>> w, X = jnp.ones(3), jnp.diag(jnp.array([0.5, 2.0, 8.0]))
        >>> optimizer = optax.chain(differentially_private_aggregate(1.0, 0.0, key=0), optax.sgd(1.0))
        >>> g = jg.per_example_grad(lambda w, x: w @ x)(w, X)          # was: jax.vmap(jax.grad(…), (None, 0))
        >>> updates, state = optimizer.update(g, optimizer.init(w), w)
        >>> (3 * updates).round(4).tolist()
        [-0.5, -1.0, -1.0]
    """
    with naming("differentially_private_aggregate"):
        checked_bound(l2_norm_clip)
    theirs = contrib.differentially_private_aggregate(l2_norm_clip, noise_multiplier, key)

    def update(updates: Any, state: Any, params: PyTree | None = None) -> tuple[PyTree, Any]:
        if not isinstance(updates, PerExampleGrads):
            _refuse_plain_gradient(updates, params)
            return theirs.update(updates, state, params)
        total = _clipped_sum(updates, l2_norm_clip)
        new_key, *keys = jax.random.split(state.rng_key, len(jax.tree.leaves(total)) + 1)
        keys = jax.tree.unflatten(jax.tree.structure(total), keys)

        def noised(a: jax.Array, like: jax.ShapeDtypeStruct, key: jax.Array) -> jax.Array:
            noise = l2_norm_clip * noise_multiplier * jax.random.normal(key, like.shape, like.dtype)
            return ((a + noise.astype(a.dtype)) / updates.batch_size).astype(like.dtype)

        mean = jax.tree.map(noised, total, jax.eval_shape(updates.sum), keys)
        return mean, contrib.DifferentiallyPrivateAggregateState(rng_key=new_key)

    return optax.GradientTransformation(theirs.init, update)


def _refuse_plain_gradient(updates: Any, params: PyTree | None) -> None:
    """Raise ValueError for a gradient without an axis of examples, whose first axis optax would take for one."""
    pairs = zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=False)
    shapes = [(jnp.shape(u), jnp.shape(p)) for u, p in pairs]
    if any(shape and shape == of_parameter for shape, of_parameter in shapes):
        raise ValueError(
            f"differentially_private_aggregate: expected gradients with an axis of examples, got arrays of the "
            f"parameters' own shapes, {shapes[0][0]}. Pass what jg.per_example_grad(loss)(params, *batch) returns."
        )


def _clipped_sum(g: PerExampleGrads, bound: Any) -> PyTree:
    norms = g.norms()
    keep = jnp.isfinite(norms)
    norms, limit = kept(keep, norms), jnp.asarray(bound, norms.dtype)
    c = limited(shortened(norms, limit), norms, g.magnitudes(), limit, keep, g.rounding())
    return g.where(keep).scale(c).sum(norms.dtype)
