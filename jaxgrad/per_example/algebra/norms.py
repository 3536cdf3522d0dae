"""Norms of one parameter's gradients, and of several parameters together."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxgrad.per_example.algebra import inner_products, scaled
from jaxgrad.per_example.algebra.chunks import CHUNK_BYTES, chunk_size, expected, map_examples
from jaxgrad.per_example.algebra.factors import (
    Factor,
    accumulator,
    arrays,
    at_once,
    is_nothing,
    scale_by_powers,
    scaled_by_power_of_two,
    unfolded,
    written_out,
)
from jaxgrad.per_example.algebra.mapped import Common, Mapped, of_examples
from jaxgrad.per_example.algebra.product import Product
from jaxgrad.per_example.algebra.rows import Lookup
from jaxgrad.per_example.algebra.scales import compact, power_of_two, safe_sqrt, squares
from jaxgrad.precision import added, working_dtype

Factors = tuple[Factor, ...]

MAPPED_BYTES = 16 * 2**20
"""How many bytes are materialized at once for gradients that are passed through a linear map, before and after it."""

COPIED = 8
"""A norm copies up to this many times the bytes that may be materialized at once. Above that it takes the examples in a
loop, which copies the slices that it takes too."""


class Length(NamedTuple):
    """‖·‖ of every example as unit · √squares: the roots of several parameters are taken in one call.

    Attributes:
        squares: [B].
        unit: [B], ≥ 0.
    """

    squares: Array
    unit: Array

    @property
    def norm(self) -> Array:
        """[B]."""
        return self.unit * safe_sqrt(self.squares)


def squared(leaf: Factors) -> Array:
    """[B]: ‖Σ_i f_i‖² of one parameter's factors, cross terms included; 0 where rounding makes the sum negative."""
    terms = []
    for i, f in enumerate(leaf):
        terms.append(inner_products.inner(f, f))
        others = [f_ for f_ in leaf[:i] if not f.layout.disjoint(f_.layout)]
        terms += [2 * inner_products.inner(f, f_) for f_ in others]
    total = added(terms)
    return jnp.maximum(total, jnp.zeros_like(total))  # NaN stays NaN


def length(leaf: Factors) -> Length:
    """‖Σ_i f_i‖ of one parameter's factors.

    Sides that are multiplied with themselves are first scaled by powers of two. A sum that is materialized is not: its
    entries are those of the gradient, and only their squares need a scale.
    """
    leaf = tuple(scaled.as_rows(f) for f in leaf)
    match leaf:
        case (f,) if is_nothing(f):
            a = arrays(f)[0]
            nothing = jnp.zeros_like(a.sum(tuple(range(1, a.ndim))), accumulator(f))
            return Length(nothing, nothing)
        case (Product(left, right=None),):
            return _of_vectors(left, accumulator(*leaf))
        case (Product(left, right) as f,) if f.is_vectors:
            a, b = (_of_vectors(side, accumulator(*leaf)).norm for side in (left, right))
            return Length(jnp.ones_like(a), a * b)
        case (Product(windows=(_, *_)) as f,):
            norms = map_examples(lambda w: _of_sum((w,)).norm, at_once(f), f)
            return Length(jnp.ones_like(norms), norms)
    B, bytes_each = _held(leaf)
    if any(isinstance(f, Mapped) for f in leaf):
        products = scaled.scaled_products(leaf)
        return _of_written_out(leaf, MAPPED_BYTES // 2) if products is None else _of_scaled(products)
    matrices = inner_products.as_matrices(leaf)
    if matrices:  # of all examples at once, if they hold as much: a block of examples is a copy of its sides
        all_bytes = expected(B) * matrices[0].layout.size * accumulator(*leaf).itemsize
        fits = all_bytes <= max(2 * CHUNK_BYTES, expected(B) * bytes_each)
        return _of_written_out(matrices, all_bytes if fits else CHUNK_BYTES)
    size = chunk_size(bytes_each // COPIED, B)
    if size >= expected(B):
        return _of_sum(leaf)
    norms = map_examples(lambda *leaf: _of_sum(leaf).norm, size, *leaf)  # copies of a few examples at a time
    return Length(jnp.ones_like(norms), norms)


def _of_scaled(products: Sequence[scaled.Scaled]) -> Length:
    """Length of a sum of products scaled by arrays shared by all examples, each also scaled by powers of two."""
    parts = [scaled.scaled_by_powers_of_two(product) for product in products]
    unit = functools.reduce(jnp.maximum, [unit for _, unit in parts])
    divisor = jnp.where(unit == 0, jnp.ones_like(unit), unit)
    balanced = [scaled.times(product, unit / divisor) for product, unit in parts]
    terms = []
    for i, p in enumerate(balanced):
        terms.append(scaled.inner(p, p))
        terms += [2 * scaled.inner(p, q) for q in balanced[:i]]
    total = added(terms)
    return Length(jnp.maximum(total, jnp.zeros_like(total)) if len(parts) > 1 else total, unit)


def _held(leaf: Factors) -> tuple[Any, int]:
    """(the number of examples, the bytes that the factors hold of each)."""
    held = of_examples(leaf)
    return held[0].shape[0], sum(math.prod(a.shape[1:]) * a.dtype.itemsize for a in held)


def _of_written_out(leaf: Factors, most: int) -> Length:
    """Length of materialized gradients, at most this many bytes at a time."""
    acc = accumulator(*leaf)

    def norm(*leaf: Factor) -> Array:
        return _of_vectors(added([written_out(f) for f in leaf]), acc).norm

    size = chunk_size(leaf[0].layout.size * acc.itemsize, _held(leaf)[0], most)
    norms = map_examples(norm, size, *leaf)
    return Length(jnp.ones_like(norms), norms)


def _of_sum(leaf: Factors) -> Length:
    """Length from the inner products of all pairs of factors, each scaled by powers of two."""
    scaled = [scaled_by_power_of_two(f) for f in leaf]
    units = [unit for _, unit in scaled]
    unit = units[0]
    for u in units[1:]:
        unit = jnp.maximum(unit, u)
    if len(leaf) == 1:
        return Length(squared((scaled[0][0],)), unit)
    divisor = jnp.where(unit == 0, jnp.ones_like(unit), unit)
    balanced = tuple(scale_by_powers(f, u / divisor) for f, u in scaled)
    return Length(squared(balanced), unit)


def magnitude(leaf: Factors) -> Array | None:
    """Upper bound [B] on the sum of the norms of the products that add up to one parameter's gradient.

    If it is far larger than the gradient's norm, the products cancel, and the computed norm is mostly rounding error.
    None if the gradient is one product or materialized, because then nothing cancels.

    Formula: for an Outer, Σ_t ‖left_t‖ ‖right_t‖; for other kinds, ‖left‖ ‖right‖ over all positions together, which is
    no less by Cauchy-Schwarz. If an array shared by all examples multiplies the products elementwise, it multiplies
    left_t ⊗ right_t too.
    """
    leaf = tuple(scaled.as_rows(f) for f in leaf)
    match leaf:
        case (f,) if is_nothing(f):
            return None
        case (Product() as f,) if f.right is None or f.is_vectors:
            return None
        case (Mapped(((Product() as part,),)) as f,) if part.is_vectors:
            if scaled.elementwise(f) is not None:
                return None
    total = [_magnitude(f, accumulator(*leaf)) for f in leaf if not is_nothing(f)]
    return added(total)


def _magnitude(f: Factor, dtype: jnp.dtype) -> Array:
    match f:
        case Product(left, right=None):
            return _of_vectors(left, dtype).norm
        case Product(row=int()):
            table = Lookup.of(f)
            norm = _of_vectors(table.used(), dtype).norm
            return table.inside.sum(1).astype(dtype) * norm if table.repeated else math.sqrt(f.positions) * norm
        case Product(left, right, windows=(_, *_)):
            places = math.prod(w.window.places for w in f.windows)
            return math.sqrt(places) * _product(_of_vectors(left, dtype).norm, _of_vectors(right, dtype).norm)
        case Product():
            left, right = f.sides()
            return _product(_of_positions(left, dtype), _of_positions(right, dtype)).sum((1, 2))
        case Common(number, array):
            return _product(jnp.abs(number.astype(dtype)), _of_vectors(array.value[None], dtype).norm)
        case Mapped(inputs):
            found = _magnitude_of_scaled(f, dtype)
            if found is not None:
                return found
            sizes = [added([_magnitude(part, dtype) for part in parts]) for parts in inputs]
            return f.norm(dtype) * root_sum_of_squares(sizes)


def _magnitude_of_scaled(f: Mapped, dtype: jnp.dtype) -> Array | None:
    """Σ_t ‖left_t ⊗ right_t ⊙ C‖ [B] of products that are multiplied elementwise by C; None for any other map."""
    found = scaled.elementwise(f)
    if found is None:
        return None
    part, array = found

    def of_outer(f: Product) -> Array:
        norms = _of_scaled([scaled.of_positions(f, array, dtype)]).norm
        return norms.reshape(f.left.shape[0], f.positions).sum(1)

    if not isinstance(part, Product) or part.layout.matrix[0] != 1:
        return None
    if part.windows:
        return map_examples(lambda w: of_outer(unfolded(w)), at_once(part), part)
    return of_outer(part) if part.kind == "Outer" else None


def _of_vectors(a: Array, dtype: jax.typing.DTypeLike) -> Length:
    """Length of a [B, …], with one vector per example."""
    return Length(*squares(compact(a), 1, dtype))


def _of_positions(a: Array, dtype: jax.typing.DTypeLike) -> Array:
    """‖a_bgt‖ of a [B, G, T, …], with one vector per position."""
    return Length(*squares(a, 3, dtype)).norm


def _product(a: Array, b: Array) -> Array:
    """a · b for norms, where 0 times infinity is 0."""
    zero = (a == 0) | (b == 0)
    return jnp.where(zero, jnp.zeros_like(a), jnp.where(zero, jnp.ones_like(a), a) * b)


def shortened(norms: Array, limit: Array) -> Array:
    """min(1, limit/‖g‖); 1 for an infinite limit, NaN for a limit that is not positive."""
    endless = jnp.isinf(limit)
    finite = jnp.where(endless, jnp.ones_like(limit), limit)
    factor = jnp.where(endless, jnp.ones_like(norms), finite / jnp.maximum(finite, norms))
    return nan_unless(limit > 0, factor)


def nan_unless(condition: Array, value: Array) -> Array:
    """The value where the condition holds, otherwise NaN; where it holds, `jax.debug_nans` has nothing to report."""
    return value * jnp.sqrt(jnp.where(condition, jnp.ones_like(value), -jnp.ones_like(value)))


def joint_norm(each: Sequence[Length]) -> Array:
    """√Σ ‖·‖² for lengths that may be huge or tiny."""
    if len(each) == 1:
        return each[0].norm
    dtype = working_dtype(*(length.unit.dtype for length in each))
    norms = Length(*(jnp.stack([a.astype(dtype) for a in part]) for part in zip(*each, strict=True))).norm
    unit = power_of_two(norms.max(0))
    return unit * safe_sqrt(((norms / unit[None]) ** 2).sum(0))


def root_sum_of_squares(each: Sequence[Array]) -> Array:
    """√Σ n² for norms that may be huge or tiny."""
    return joint_norm([Length(jnp.ones_like(n), n) for n in each])
