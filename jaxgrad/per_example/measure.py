"""per_example_norms: the norms of all examples' gradients, in about the memory of a plain gradient."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxgrad.per_example.algebra import complexes, inner_products, norms
from jaxgrad.per_example.algebra.factors import Factor, accumulator, arrays
from jaxgrad.per_example.algebra.one_example import for_one_example
from jaxgrad.per_example.algebra.product import Product
from jaxgrad.per_example.algebra.rows import Lookup
from jaxgrad.per_example.algebra.scales import power_of_two, safe_sqrt
from jaxgrad.per_example.arguments import Arguments
from jaxgrad.per_example.interpreter.measuring import CrossTerms, Measurer, measure_of
from jaxgrad.per_example.interpreter.values import Value
from jaxgrad.per_example.lower import factors_of
from jaxgrad.per_example.transform import Transformed
from jaxgrad.precision import product_rounding
from jaxgrad.sharding import with_automatic_axes

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
    """Transform a loss into the norms of its per-example gradients, in about the memory of a plain gradient.

    `per_example_grad(fun)(...).norms()` holds the factors of all parameters at once, including those of every layer of
    a `lax.scan`. This function computes the norms of a layer's gradients inside the loop that computes these gradients,
    and drops the factors there, so that `jax.checkpoint` in the loop still saves memory. The norms are the same up to
    rounding. Call the returned function under `jax.jit`, which removes computations whose results are not used, such as
    those of the gradients themselves.

    If a table of lookups is also multiplied with, as a tied embedding is, the norm of the product's gradient and its
    rows at the ids that are looked up are kept until the lookups' gradient is there. The factors of three kinds of
    parameters are held until the loop has ended: parameters that every step uses, such as recurrent weights, because
    their norms have cross terms between steps; parameters whose gradient goes through anything but reshapes, transposes
    and casts after the loop; and parameters that are used inside `cond` or `shard_map`.

    Args:
        fun, argnums, in_axes, has_aux, spmd_axis_name: as in `per_example_grad`.
        leaf_norms: whether to return the norm of each parameter's gradient instead of the norm over all parameters.

    Returns:
        A function that takes fun's arguments, with an example axis on the batched ones, and returns (values [B], norms
        [B]) or, with has_aux, ((values, aux), norms). The values are the losses. With `leaf_norms`, the norms are a
        tree like the parameters, with leaves [B]. Norms are accumulated in float32 or wider; no square overflows unless
        the norm itself does.

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
        values, aux, measures = measured_magnitudes(transformed, arguments)
        by_leaf = jax.tree.unflatten(arguments.params_tree, [m.norm for m in measures])
        if leaf_norms:
            result = complexes.joined(by_leaf, lambda *parts: norms.root_sum_of_squares(parts))
        else:
            result = norms.root_sum_of_squares(jax.tree.leaves(by_leaf))
        return ((values, aux), result) if has_aux else (values, result)

    return measured


def measured_magnitudes(transformed: Transformed, arguments: Arguments) -> tuple[Any, Any, list["Magnitude"]]:
    """(values, aux, the `Magnitude` of each parameter's gradient)."""
    return transformed.measured(arguments, MEASURER, lambda *_: [()] * len(arguments.params))


class Magnitude(NamedTuple):
    """What is measured of one example's gradient of one parameter.

    Attributes:
        norm: its norm.
        magnitude: the magnitude of the terms that may cancel in it, 0 if there is one term.
    """

    norm: Array
    magnitude: Array


def _measure(value: Value, shape: tuple[int, ...], dtype: Any, _: Any) -> Magnitude:
    """The measure of one example's gradient with respect to a parameter of this shape and dtype."""
    measure: Magnitude | None = measure_of(value)
    return _measure_one(factors_of(value, shape, dtype)) if measure is None else measure


@with_automatic_axes(by_example=True)
def _measure_batch(factors: tuple[Factor, ...], _: Any) -> Magnitude:
    """The measure of every example, [B] in each field."""
    norm, magnitude = norms.length(factors).norm, norms.magnitude(factors)
    dtype = accumulator(*factors)
    if magnitude is None:
        return Magnitude(norm.astype(dtype), jnp.zeros_like(norm, dtype))
    factor = _precision_factor(any(map(_is_half, factors)), dtype).astype(dtype)
    return Magnitude(norm.astype(dtype), magnitude.astype(dtype) * factor)


def _is_half(f: Factor) -> bool:
    return any(jnp.issubdtype(a.dtype, jnp.floating) and a.dtype.itemsize < 4 for a in arrays(f))


def _precision_factor(half: bool, dtype: jnp.dtype) -> Array:
    """LOW_PRECISION if factors are in half precision or products round float32 operands, otherwise 1."""
    if half or dtype == jnp.float64:
        return jnp.asarray(LOW_PRECISION if half else 1.0)
    return jnp.where(product_rounding() > 0, LOW_PRECISION, 1.0)


_measure_one = for_one_example(_measure_batch)


def _rows(product: Value, lookups: Value) -> Array | None:
    """The product's rows at the ids of the lookups, [T, K]; None if it is not one product in the table's layout."""
    factors, tables = (factors_of(value, value.shape, value.dtype) for value in (product, lookups))
    if len(factors) != 1 or len(tables) != 1 or not inner_products.picks_rows(factors[0], tables[0]):
        return None
    rows: Array = _rows_of_one((*factors, *tables))
    return rows


@with_automatic_axes(by_example=True)
def _rows_of_batch(factors: tuple[Product, Product], _: Any) -> Array:
    return inner_products.picked_rows(*factors)


_rows_of_one = for_one_example(_rows_of_batch)


def _total(of_product: Magnitude, rows: Array, lookups: Value) -> Magnitude | None:
    """The measure of a product and lookups together; None if the lookups are not in one table."""
    factors = factors_of(lookups, lookups.shape, lookups.dtype)
    if len(factors) != 1 or factors[0].kind != "Rows":
        return None
    measure: Magnitude = _total_of_one((factors[0], of_product, rows))
    return measure


@with_automatic_axes(by_example=True)
def _total_of_batch(parts: tuple[Product, Magnitude, Array], _: Any) -> Magnitude:
    table, first, rows = parts
    second = _measure_batch((table,), _)
    unit = power_of_two(jnp.maximum(first.norm, second.norm))
    _, values = Lookup.of(table).valid()
    cross = (rows / unit[:, None, None] * (values.astype(rows.dtype) / unit[:, None, None])).sum((1, 2))
    squares = (first.norm / unit) ** 2 + (second.norm / unit) ** 2 + 2 * cross
    norm = unit * safe_sqrt(jnp.maximum(squares, jnp.zeros_like(squares)))
    factor = _precision_factor(_is_half(table), norm.dtype).astype(norm.dtype)
    magnitudes = [jnp.maximum(m.magnitude, factor * m.norm) for m in (first, second)]
    return Magnitude(norm, magnitudes[0] + magnitudes[1])


_total_of_one = for_one_example(_total_of_batch)


def _combine_steps(measure: Magnitude, _: Any) -> Magnitude:
    """The measure of a stacked parameter, from those of the steps of a loop along axis 0."""
    return Magnitude(*(norms.root_sum_of_squares(list(a)) for a in measure))


MEASURER = Measurer(_measure, _combine_steps, kept=CrossTerms(_rows, _total))
