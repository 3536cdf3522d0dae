"""The sum of weighted gradients as JAX's own program: the gradient of Σ_b c_b · loss_b."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxgrad import _jax
from jaxgrad.errors import called
from jaxgrad.per_example.arguments import Arguments
from jaxgrad.per_example.interpreter.linearity import not_linear
from jaxgrad.per_example.transform import Transformed
from jaxgrad.sharding import automatic


def weighted_gradients(
    transformed: Transformed, arguments: Arguments, weights: Sequence[Float[Array, " B"]], keep: Bool[Array, " B"]
) -> list[list[Array]]:
    """Return Σ_b c_b g_b for each weight vector c: a list with an array for every parameter, in its dtype.

    The forward pass runs once, the backward pass once for each c. An example that is not kept adds exactly zero, even
    if its gradient is NaN: the first example that is kept replaces it, with weight zero.

    Args:
        transformed, arguments: the loss and the call.
        weights: the weight vectors, each 0 where an example is not kept.
        keep: False for the examples that are left out.
    """
    batch = [_replaced(keep, a, axis) for a, axis in zip(arguments.batch, arguments.axes, strict=True)]
    axes_in_shard_map = frozenset(name for a in batch for name in _jax.varying(a))
    some = keep.any()

    over_examples = jax.vmap(
        _loss_of(transformed, arguments),
        (None, arguments.axes),
        axis_size=arguments.batch_size,
        spmd_axis_name=transformed.spmd_axis_name,
    )

    def sums(params: list[Array], batch: list[Array], weights: list[Array]) -> list[list[Array]]:
        values, back = jax.vjp(lambda params: over_examples(params, batch), params)
        return [[jnp.where(some, a, jnp.zeros_like(a)) for a in back(_no_longer(c, values.dtype))[0]] for c in weights]

    def nothing(params: list[Array], batch: list[Array], weights: list[Array]) -> list[list[Array]]:
        zeros = [_jax.made_varying(jnp.zeros_like(p), axes_in_shard_map) for p in params]
        return [zeros for _ in weights]

    # The predicate is always true. In a separate branch, the compiler cannot share the buffers of the second pass's
    # loops with those of the first pass, which would keep them alive through both passes.
    always = keep.sum() >= 0
    found: list[list[Array]] = jax.lax.cond(always, sums, nothing, list(arguments.params), batch, list(weights))
    return found


def check_linear(transformed: Transformed, arguments: Arguments) -> None:
    """Raise ValueError if the loss has a custom_vjp whose backward pass is not linear in the cotangent.

    The second pass scales cotangents by c; only a linear backward pass then scales the gradient by c.
    """
    loss, params, example = _loss_of(transformed, arguments), list(arguments.params), arguments.example
    if not _jax.uses_custom_vjp(_jax.program_of(jax.make_jaxpr(loss)(params, example)).jaxpr):
        return

    def back(params: Sequence[Any], examples: Sequence[Any], cotangent: Array) -> Any:
        return jax.vjp(lambda params: loss(params, examples), params)[1](cotangent)

    cotangent = jax.eval_shape(loss, params, example)
    program = _jax.program_of(jax.make_jaxpr(back)(params, example, cotangent))
    found = not_linear(program, len(program.jaxpr.invars) - 1)
    if found is not None:
        raise ValueError(
            f"{called()}: expected backward passes that are linear in the cotangent, as passes=2 scales it, got a "
            f"custom_vjp whose backward pass has {found}. Take passes=1."
        )


def _loss_of(transformed: Transformed, arguments: Arguments) -> Callable[[Sequence[Any], Sequence[Any]], Array]:
    """The loss of one example as a function of the leaves of the parameters and of the example."""

    def loss(params: Sequence[Any], examples: Sequence[Any]) -> Array:
        args, kwargs = arguments.put_back(params, examples)
        result = transformed.fun(*args, **kwargs)
        return result[0] if transformed.has_aux else result

    return loss


def _no_longer(c: Array, dtype: Any) -> Array:
    """Cast the weights to the loss's dtype, rounding towards zero so that no gradient gets longer."""
    narrow = c.astype(dtype)
    longer = jnp.abs(narrow.astype(c.dtype)) > jnp.abs(c)
    return jnp.where(longer, jnp.nextafter(narrow, jnp.zeros_like(narrow)), narrow)


@automatic(by_example=True)
def _first_axis_replaced(keep: Array, a: Array) -> Array:
    other = jax.lax.dynamic_index_in_dim(a, jnp.argmax(keep), 0)
    return jnp.where(keep.reshape(-1, *[1] * (a.ndim - 1)), a, other)


def _replaced(keep: Array, a: Any, axis: int) -> Array:
    """Replace every example that is not kept by the first one that is."""
    a = jnp.asarray(a)
    return jnp.moveaxis(_first_axis_replaced(keep, jnp.moveaxis(a, axis, 0)), 0, axis)
