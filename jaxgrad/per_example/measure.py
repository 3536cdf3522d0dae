"""per_example_norms: the norms of all examples' gradients with no more memory than a plain gradient has."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array

from jaxgrad.per_example.algebra import complexes, norms
from jaxgrad.per_example.algebra.factors import Factor, accumulator, arrays
from jaxgrad.per_example.algebra.mapped import map_examples_of, put_back, taken_out
from jaxgrad.per_example.interpreter.measuring import Measure, Measurer, measure_of
from jaxgrad.per_example.interpreter.values import Value
from jaxgrad.per_example.lower import factors_of
from jaxgrad.per_example.transform import Transformed
from jaxgrad.precision import product_rounding

NARROW = 2.0**6
"""Factor on the magnitude of terms that cancel if they are in float16 or bfloat16, where sums lose more digits."""


def per_example_norms(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    *,
    in_axes: Any = 0,
    has_aux: bool = False,
    spmd_axis_name: Any = None,
    leaf_norms: bool = False,
) -> Callable[..., Any]:
    """Transform a loss into the norms of its per-example gradients, in no more memory than a plain gradient needs.

    `per_example_grad(fun)(...).norms()` holds the factors of all parameters at once, also those of every layer of a
    `lax.scan`. This function takes a layer's norm inside the loop that computes it and drops the factors there, so that
    `jax.checkpoint` in the loop keeps saving memory. The numbers are the same. Call it under `jax.jit`, which leaves
    out what is not used.

    Three kinds of parameters are measured after the loop instead, from their factors: a parameter that every step uses
    (a recurrent weight), because its steps have cross terms; a parameter whose gradient goes through anything but a
    reshape, transpose or cast after the loop; and a parameter that is used inside `cond` or `shard_map`.

    Args:
        fun, argnums, in_axes, has_aux, spmd_axis_name: as in `per_example_grad`.
        leaf_norms: whether to return the norm of each parameter by itself.

    Returns:
        A function of fun's arguments, the batched ones with an example axis, that returns (values [B], norms [B]), with
        has_aux ((values, aux), norms). With `leaf_norms` the norms are a tree like the parameters with a [B] at each
        leaf. Norms are accumulated in float32 at least, and overflow only where the norm itself does.

    Raises:
        TypeError, ValueError: as in `per_example_grad`.

    Example:
        >>> def loss(layers, x):                                                   # 12 layers, one after the other
        ...     step = jax.checkpoint(lambda h, W: (jnp.tanh(h @ W), None))
        ...     return jax.lax.scan(step, x, layers)[0].sum()
        >>> values, norms = per_example_norms(loss)(0.1 * jnp.ones((12, 8, 8)), jnp.ones((4, 16, 8)))
        >>> values.shape, norms.shape
        ((4,), (4,))
    """
    transformed = Transformed("per_example_norms", fun, argnums, in_axes, has_aux, spmd_axis_name=spmd_axis_name)

    @functools.wraps(fun, assigned=("__name__", "__qualname__", "__module__"), updated=())
    def measured(*args: Any, **kwargs: Any) -> Any:
        arguments = transformed.arguments(args, kwargs)
        values, aux, measures = transformed.measured(arguments, MEASURER)
        each = jax.tree.unflatten(arguments.params_tree, [m.norm for m in measures])
        if leaf_norms:
            found = complexes.joined(each, lambda *parts: norms.root_sum_of_squares(parts))
        else:
            found = norms.root_sum_of_squares(jax.tree.leaves(each))
        return ((values, aux), found) if has_aux else (values, found)

    return measured


def _one(value: Value, shape: tuple[int, ...], dtype: Any) -> Measure:
    """The measure of one example's gradient with respect to a parameter of this shape and dtype."""
    measure = measure_of(value)
    return _of_factors(*taken_out(factors_of(value, shape, dtype))) if measure is None else measure


def _of_batch(factors: tuple[Factor, ...]) -> Measure:
    norm, magnitude = norms.length(factors).norm, norms.magnitude(factors)
    dtype = accumulator(*factors)
    if magnitude is None:
        return Measure(norm.astype(dtype), jnp.zeros_like(norm, dtype))
    narrow = any(jnp.issubdtype(a.dtype, jnp.floating) and a.dtype.itemsize < 4 for f in factors for a in arrays(f))
    return Measure(norm.astype(dtype), magnitude.astype(dtype) * _fewer_digits(narrow, dtype).astype(dtype))


def _fewer_digits(narrow: bool, dtype: jnp.dtype) -> Array:
    """NARROW if sums of products are not exact to float32, otherwise 1."""
    if narrow or dtype == jnp.float64:
        return jnp.asarray(NARROW if narrow else 1.0)
    return jnp.where(product_rounding() > 0, NARROW, 1.0)


_BOTH: Any = Measure(True, True)  # type: ignore[arg-type]  # what a vmap measures has the axis


@custom_vmap
def _of_factors(parts: tuple[Factor, ...], shared: list[Array]) -> Measure:
    """Measure one example; under a vmap over examples, measure the whole batch at once, in bounded memory."""
    return _of_batch_of_one(parts, shared)


@_of_factors.def_vmap
def _over_examples(size: int, batched: Any, parts: tuple[Factor, ...], shared: list[Array]) -> tuple[Measure, Any]:
    parts_batched, shared_batched = batched
    if any(shared_batched):  # a vmap over something else than examples
        axes = jax.tree.map(lambda on: 0 if on else None, batched)
        return jax.vmap(_of_batch_of_one, axes)(parts, shared), _BOTH
    spread = jax.tree.map(lambda a, on: a if on else jnp.broadcast_to(a[None], (size, *a.shape)), parts, parts_batched)
    return _of_batch(put_back(spread, shared)), _BOTH


def _of_batch_of_one(parts: tuple[Factor, ...], shared: list[Array]) -> Measure:
    batch = map_examples_of(lambda a: a[None], put_back(parts, shared))
    return jax.tree.map(lambda a: a[0], _of_batch(batch))


def _of_all_steps(measure: Measure) -> Measure:
    return Measure(*(norms.root_sum_of_squares(list(a)) for a in measure))


MEASURER = Measurer(_one, _of_all_steps)
