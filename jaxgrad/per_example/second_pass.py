"""The weighted sum of gradients as the ordinary gradient, by JAX, of Σ_b c_b · loss_b."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxgrad import _jax
from jaxgrad.errors import caller
from jaxgrad.per_example.arguments import Arguments
from jaxgrad.per_example.interpreter.cotangent_check import narrow_range, not_linear
from jaxgrad.per_example.on_mesh import call_on_mesh
from jaxgrad.per_example.transform import Transformed
from jaxgrad.sharding import with_automatic_axes


def weighted_gradients(
    transformed: Transformed, arguments: Arguments, weights: Sequence[Float[Array, " B"]], keep: Bool[Array, " B"]
) -> list[list[Array]]:
    """Return Σ_b c_b g_b for each weight vector c: a list with an array for every parameter, in its dtype.

    The forward pass runs once, and the backward pass once for each c. An example that is not kept adds exactly zero,
    even if its gradient is NaN, because the first example that is kept replaces it, with weight zero.

    Args:
        transformed, arguments: the loss and the call.
        weights: the weight vectors [B], each 0 where an example is not kept.
        keep: [B], False for the examples that are left out.
    """
    gradients: Any = functools.partial(_gradients, transformed)
    return call_on_mesh(gradients, arguments, [list(arguments.params) for _ in weights], list(weights), keep)


def _gradients(transformed: Transformed, arguments: Arguments, weights: list[Array], keep: Array) -> list[list[Array]]:
    batch = [_replaced(keep, a, axis) for a, axis in zip(arguments.batch, arguments.axes, strict=True)]
    axes_in_shard_map = frozenset(name for a in batch for name in _jax.varying(a))
    count = keep.sum()

    over_examples = jax.vmap(
        _loss_of(transformed, arguments),
        (None, arguments.axes),
        axis_size=arguments.batch_size,
        spmd_axis_name=transformed.spmd_axis_name,
    )

    def sums(params: list[Array], batch: list[Array], weights: list[Array]) -> list[list[Array]]:
        values, back = jax.vjp(lambda params: over_examples(params, batch), params)
        gradients = [back(_rounded_towards_zero(c, values.dtype))[0] for c in weights]
        return [[_or_zero(count, a) for a in gradient] for gradient in gradients]

    def zero_sums(params: list[Array], batch: list[Array], weights: list[Array]) -> list[list[Array]]:
        zeros = [_jax.made_varying(jnp.zeros_like(p), axes_in_shard_map) for p in params]
        return [zeros for _ in weights]

    # The predicate is always true. The branch keeps the compiler from sharing buffers between the loops of the two
    # passes, which would keep those buffers alive through both passes.
    always = count >= 0
    result: list[list[Array]] = jax.lax.cond(always, sums, zero_sums, list(arguments.params), batch, weights)
    return result


def _or_zero(count: Array, a: Array) -> Array:
    """The array if the count of examples is positive; otherwise zeros, even if it is NaN.

    The count itself is the zero. A constant would be the zeros that the loops of the backward pass start from, for a
    compiler that merges equal arrays: it would then keep these, and start the loops from copies.
    """
    return jnp.where(count > 0, a, count.astype(a.dtype))


def check_linear(transformed: Transformed, arguments: Arguments) -> None:
    """Raise ValueError if scaling the loss's cotangent by c does not scale the gradient by c.

    It does not if a `custom_vjp` has a backward pass that is not linear in the cotangent, or if a cotangent is in a
    dtype of narrow range, such as float16: c is small for large gradients, and the cotangent underflows.
    """
    loss, params, example = _loss_of(transformed, arguments), list(arguments.params), arguments.example
    program = _jax.program_of(jax.make_jaxpr(loss)(params, example)).jaxpr
    results = [v.aval for eqn in _jax.equations_in(program) for v in eqn.outvars]
    if not _jax.uses_custom_vjp(program) and not any(narrow_range(a.dtype) for a in results):
        return

    def back(params: Sequence[Any], examples: Sequence[Any], cotangent: Array) -> Any:
        return jax.vjp(lambda params: loss(params, examples), params)[1](cotangent)

    cotangent = jax.eval_shape(loss, params, example)
    backward = _jax.program_of(jax.make_jaxpr(back)(params, example, cotangent))
    culprit = not_linear(backward, len(backward.jaxpr.invars) - 1)
    if culprit is not None:
        raise ValueError(
            f"{caller()}: expected backward passes that are linear in the cotangent, as passes=2 scales it, got one "
            f"that has {culprit}. Take passes=1."
        )


def _loss_of(transformed: Transformed, arguments: Arguments) -> Callable[[Sequence[Any], Sequence[Any]], Array]:
    """The loss of one example as a function of the leaves of the parameters and of the example."""

    def loss(params: Sequence[Any], examples: Sequence[Any]) -> Array:
        args, kwargs = arguments.loss_arguments(params, examples)
        result = transformed.fun(*args, **kwargs)
        return result[0] if transformed.has_aux else result

    return loss


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _rounded_towards_zero(c: Array, dtype: Any) -> Array:
    """Cast the weights to the loss's dtype so that no weight, and therefore no gradient, gets larger."""
    nearest = c.astype(dtype)
    larger = jnp.abs(nearest.astype(c.dtype)) > jnp.abs(c)
    return jnp.where(larger, jnp.nextafter(nearest, jnp.zeros_like(nearest)), nearest)


@_rounded_towards_zero.defjvp
def _cast_tangent(dtype: Any, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return _rounded_towards_zero(*primals, dtype), tangents[0].astype(dtype)


@with_automatic_axes(by_example=True)
def _first_axis_replaced(keep: Array, a: Array) -> Array:
    def along(mask: Array) -> Array:
        return mask.reshape(-1, *[1] * (a.ndim - 1))

    if jnp.issubdtype(a.dtype, jax.dtypes.extended):  # random keys, which cannot be added
        return jnp.where(along(keep), a, jax.lax.dynamic_index_in_dim(a, jnp.argmax(keep), 0))
    # A sum over zeros and one example: if the examples are sharded, only one of them is sent to other devices.
    first = keep & (jnp.arange(keep.size) == jnp.argmax(keep))
    wide = a.dtype if a.dtype.itemsize > 1 else jnp.float32 if jnp.issubdtype(a.dtype, jnp.floating) else jnp.int32
    alone = jnp.where(along(first), a, jnp.zeros_like(a)).astype(wide)
    return jnp.where(along(keep), a, alone.sum(0, dtype=wide).astype(a.dtype)[None])


def _replaced(keep: Array, a: Any, axis: int) -> Array:
    """Replace every example that is not kept by the first one that is."""
    a = jnp.asarray(a)
    return jnp.moveaxis(_first_axis_replaced(keep, jnp.moveaxis(a, axis, 0)), 0, axis)
