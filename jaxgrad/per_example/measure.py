"""per_example_norms: the norms of all examples' gradients, in no more memory than a plain gradient needs."""

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
from jaxgrad.sharding import automatic, automatic_over, in_both

LOW_PRECISION = 2.0**6
"""Multiplies the magnitude of the terms that may cancel, if their products have fewer digits than those of float32."""


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

    `per_example_grad(fun)(...).norms()` holds the factors of all parameters at once, including those of every layer of
    a `lax.scan`. This function takes a layer's norm inside the loop that computes its gradient and drops the factors
    there, so that `jax.checkpoint` in the loop still saves memory. The norms are the same. Call it under `jax.jit`,
    which leaves out what is not used.

    The factors of three kinds of parameters are held until the loop has ended: of a parameter that every step uses (a
    recurrent weight), because the norm has cross terms between steps; of a parameter whose gradient goes through
    anything but a reshape, transpose or cast after the loop; and of a parameter that is used inside `cond` or
    `shard_map`.

    Args:
        fun, argnums, in_axes, has_aux, spmd_axis_name: as in `per_example_grad`.
        leaf_norms: whether to return the norm of each parameter's gradient instead of the norm over all parameters.

    Returns:
        A function of fun's arguments, the batched ones with an example axis, that returns (values [B], norms [B]) or,
        with has_aux, ((values, aux), norms). With `leaf_norms` the norms are a tree like the parameters with leaves
        [B]. Norms are accumulated in float32 at least; squares do not overflow unless the norm itself does.

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
        axes, examples = in_both(arguments.batch, arguments.axes, [*arguments.params, *arguments.shared])
        if axes:
            return automatic_over(axes, measured, examples, *args, **kwargs)
        values, aux, measures = transformed.measured(arguments, MEASURER)
        by_leaf = jax.tree.unflatten(arguments.params_tree, [m.norm for m in measures])
        if leaf_norms:
            result = complexes.joined(by_leaf, lambda *parts: norms.root_sum_of_squares(parts))
        else:
            result = norms.root_sum_of_squares(jax.tree.leaves(by_leaf))
        return ((values, aux), result) if has_aux else (values, result)

    return measured


def _measure(value: Value, shape: tuple[int, ...], dtype: Any) -> Measure:
    """The measure of one example's gradient with respect to a parameter of this shape and dtype."""
    measure = measure_of(value)
    return _measure_factors(*taken_out(factors_of(value, shape, dtype))) if measure is None else measure


@automatic(by_example=True)
def _measure_batch(factors: tuple[Factor, ...]) -> Measure:
    """The measure of every example, [B] in each field."""
    norm, magnitude = norms.length(factors).norm, norms.magnitude(factors)
    dtype = accumulator(*factors)
    if magnitude is None:
        return Measure(norm.astype(dtype), jnp.zeros_like(norm, dtype))
    half = any(jnp.issubdtype(a.dtype, jnp.floating) and a.dtype.itemsize < 4 for f in factors for a in arrays(f))
    return Measure(norm.astype(dtype), magnitude.astype(dtype) * _precision_factor(half, dtype).astype(dtype))


def _precision_factor(half: bool, dtype: jnp.dtype) -> Array:
    """LOW_PRECISION if factors are in half precision or products round float32 operands, otherwise 1."""
    if half or dtype == jnp.float64:
        return jnp.asarray(LOW_PRECISION if half else 1.0)
    return jnp.where(product_rounding() > 0, LOW_PRECISION, 1.0)


_BATCHED: Any = Measure(True, True)  # type: ignore[arg-type]  # both fields have the example axis after a vmap


@custom_vmap
def _measure_factors(parts: tuple[Factor, ...], shared: list[Array]) -> Measure:
    """Measure one example; under a vmap over examples, measure the whole batch at once, in bounded memory."""
    return _measure_example(parts, shared)


@_measure_factors.def_vmap
def _over_examples(size: int, batched: Any, parts: tuple[Factor, ...], shared: list[Array]) -> tuple[Measure, Any]:
    parts_batched, shared_batched = batched
    if any(shared_batched):  # a vmap over something other than examples
        axes = jax.tree.map(lambda has_axis: 0 if has_axis else None, batched)
        return jax.vmap(_measure_example, axes)(parts, shared), _BATCHED

    def with_axis(a: Array, has_axis: bool) -> Array:
        return a if has_axis else jnp.broadcast_to(a[None], (size, *a.shape))

    return _measure_batch(put_back(jax.tree.map(with_axis, parts, parts_batched), shared)), _BATCHED


def _measure_example(parts: tuple[Factor, ...], shared: list[Array]) -> Measure:
    batch = map_examples_of(lambda a: a[None], put_back(parts, shared))
    return jax.tree.map(lambda a: a[0], _measure_batch(batch))


def _combine_steps(measure: Measure) -> Measure:
    """The measure of a stacked parameter, from those of the steps of a loop along axis 0."""
    return Measure(*(norms.root_sum_of_squares(list(a)) for a in measure))


MEASURER = Measurer(_measure, _combine_steps)
