"""Weighted sums of one factor's gradients over the examples, and how far rounded operands change them."""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxgrad.per_example.algebra import sums
from jaxgrad.per_example.algebra.factors import Factor, accumulator, arrays, convolved, is_nothing, times, wide
from jaxgrad.per_example.algebra.mapped import Common, Mapped
from jaxgrad.per_example.algebra.product import Product
from jaxgrad.per_example.algebra.rows import Lookup
from jaxgrad.precision import added, product_rounding


def weighted_sum(f: Factor, c: Float[Array, " B"] | None) -> Array:
    """Σ_b c_b · gradient of example b (c None: their sum), with the parameter's shape, in the accumulator's dtype.

    Cost: a product takes one matrix product of B·G·T·F·K operations or one convolution; no array of B × parameter
    size is made. Accuracy: c_b times a side is rounded to bfloat16 if both sides are in bfloat16 (`rounds`), which
    changes each product by a factor within 1 ± 2⁻⁸; otherwise in float32 or float64.
    """
    acc = accumulator(f)
    if is_nothing(f):
        return jnp.zeros(f.layout.shape, acc)
    if isinstance(f, Product) and f.right is None:  # no weighted copy
        B, matrix = f.left.shape[0], f.layout.matrix
        weights = jnp.ones(B, acc) if c is None else c.astype(acc)
        total = sums.weighted_rows(weights, f.left.reshape(B, matrix[1]).astype(acc))
        return f.layout.from_matrix(total.reshape(matrix))
    if isinstance(f, Mapped):
        totals = [added([weighted_sum(part, c) for part in parts]) for parts in f.inputs]
        return f.apply([a.astype(acc) for a in totals]).astype(acc)
    f = f if rounds(f) else wide(f, acc)
    f = f if c is None else times(f, c.astype(acc))
    if isinstance(f, Common):
        return sums.weighted_rows(jnp.ones_like(f.number), f.number[:, None])[0] * f.array.value
    assert isinstance(f, Product)
    return f.layout.from_matrix(_sum_of_products(f))


def _sum_of_products(f: Product) -> Array:
    """[G, F, K]: the sum over all examples and positions."""
    if f.windows:
        return convolved(f)
    if f.row is not None:
        ids, values = Lookup.of(f).valid()
        return sums.table(ids.ravel(), values.reshape(ids.size, values.shape[2]), f.rows)[None]
    left, right = f.sides()
    if left.shape[1] != 1:
        return sums.grouped_products(left, right)
    left, right = left[:, 0], right[:, 0]
    if f.stepped:
        left, right = left.swapaxes(0, 1), right.swapaxes(0, 1)
    count = left.shape[0] * left.shape[1]
    return sums.products(left.reshape(count, left.shape[2]), right.reshape(count, right.shape[2]))[None]


def rounds(f: Factor) -> bool:
    """True if `weighted_sum` rounds c_b · (an array of the factor) to bfloat16."""
    match f:
        case Product(left, right, row=None) if right is not None:
            return accumulator(f) == jnp.float32 and left.dtype == right.dtype == jnp.bfloat16
        case Mapped(inputs):
            return any(rounds(part) for parts in inputs for part in parts)
    return False


def rounding(f: Factor) -> Array:
    """How far a norm and a contribution to `weighted_sum` may be off, relative to the magnitude of the products.

    Three causes add up, beside what the accumulator rounds: `weighted_sum` rounds once to bfloat16 (`rounds`); the
    compiler may take an array of half precision before it is rounded in one place and afterwards in another; and where
    products of float32 round their operands, two of them do so in the norm and two in the sum.
    """
    if isinstance(f, Mapped):
        return functools.reduce(jnp.maximum, [rounding(part) for parts in f.inputs for part in parts])
    half = [float(jnp.finfo(a.dtype).eps) / 2 for a in arrays(f) if a.dtype in (jnp.bfloat16, jnp.float16)]
    known = jnp.asarray(sum(half) + (max(half) if rounds(f) else 0.0), jnp.float32)
    exact = isinstance(f, Common) or f.right is None or accumulator(f) == jnp.float64 or rounds(f)
    return known if exact else known + 4 * product_rounding()
