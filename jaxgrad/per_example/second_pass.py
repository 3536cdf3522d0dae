"""The sum of weighted gradients as JAX's own program: the gradient of Σ_b c_b · loss_b."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxgrad.per_example.arguments import Arguments
from jaxgrad.per_example.transform import Transformed
from jaxgrad.precision import working_dtype
from jaxgrad.sharding import automatic


def weighted_gradients(
    transformed: Transformed, arguments: Arguments, weights: Sequence[Float[Array, " B"]], keep: Bool[Array, " B"]
) -> list[list[Array]]:
    """Σ_b c_b g_b for several weights c: for each a list with an array for every parameter, in float32 at least.

    The forward pass runs once, the backward pass once for each c. An example that is not kept adds exactly zero, NaN or
    not: the first one that is kept takes its place, with weight zero.

    Args:
        weights: 0 where an example is not kept.
    """
    batch = [_replaced(keep, a, axis) for a, axis in zip(arguments.batch, arguments.axes, strict=True)]

    def losses(params: Sequence[Any]) -> Array:
        def one(examples: Sequence[Any]) -> Array:
            args, kwargs = arguments.put_back(params, examples)
            result = transformed.fun(*args, **kwargs)
            return result[0] if transformed.has_aux else result

        axes, size = (arguments.axes,), arguments.batch_size
        over_examples = jax.vmap(one, axes, axis_size=size, spmd_axis_name=transformed.spmd_axis_name)
        return over_examples(batch)

    values, back = jax.vjp(losses, list(arguments.params))
    some = keep.any()

    def weighted(c: Array) -> list[Array]:
        (total,) = back(_no_longer(c, values.dtype))
        return [jnp.where(some, a, jnp.zeros_like(a)).astype(working_dtype(a.dtype)) for a in total]

    return [weighted(c) for c in weights]


def _no_longer(c: Array, dtype: Any) -> Array:
    """The weights in the loss's dtype, rounded towards zero: no gradient gets longer."""
    narrow = c.astype(dtype)
    longer = jnp.abs(narrow.astype(c.dtype)) > jnp.abs(c)
    return jnp.where(longer, jnp.nextafter(narrow, jnp.zeros_like(narrow)), narrow)


@automatic(by_example=True)
def _first_axis_replaced(keep: Array, a: Array) -> Array:
    other = jax.lax.dynamic_index_in_dim(a, jnp.argmax(keep), 0)
    return jnp.where(keep.reshape(-1, *[1] * (a.ndim - 1)), a, other)


def _replaced(keep: Array, a: Any, axis: int) -> Array:
    """The batch with the first example that is kept in the place of every other one."""
    a = jnp.asarray(a)
    return jnp.moveaxis(_first_axis_replaced(keep, jnp.moveaxis(a, axis, 0)), 0, axis)
