"""Norms of gradients that are one product per example, scaled elementwise by arrays shared by all examples.

A masked weight, softplus(W), a normalized weight or a penalty has a gradient Σ_i left_i[b, f] right_i[b, k] C_i[f, k],
where C is the same for all examples. The inner product of two such terms is (left left′)ᵀ (C C′) (right right′), one
matrix product for the batch. No B × parameters array is materialized, and C C′ is computed a block of rows at a time.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxgrad.per_example.algebra.chunks import Blocks, map_examples
from jaxgrad.per_example.algebra.factors import Factor, accumulator, wide
from jaxgrad.per_example.algebra.mapped import Common, Mapped
from jaxgrad.per_example.algebra.product import Product
from jaxgrad.per_example.algebra.rows import Lookup, with_values
from jaxgrad.per_example.algebra.scales import nearest_power, power_of_two, row_sums

BLOCK_BYTES = 2**20
"""How many bytes of C C′ are held at once on a processor."""


class Scaled(NamedTuple):
    """left [B, F] · right [B, K] · array [F, K] / unit, where None stands for 1. The unit is a power of two."""

    left: Array | None
    right: Array | None
    array: Array | None
    unit: Array | None = None


def elementwise(f: Factor) -> tuple[Factor, Array] | None:
    """(the factor, the array of the parameter's shape) that a `Mapped` multiplies elementwise; None for any other."""
    if not isinstance(f, Mapped) or len(f.inputs) != 1 or len(f.inputs[0]) != 1 or len(f.map.results) != 1:
        return None
    (shape, dtype), *_ = f.shapes
    if f.map.entrywise() != () or shape != f.layout.shape or not jnp.issubdtype(dtype, jnp.floating):
        return None
    return f.inputs[0][0], f.apply([jnp.ones(shape, accumulator(f))])


def as_rows(f: Factor) -> Factor:
    """`Rows` whose table is scaled elementwise, as `Rows` with scaled values; any other factor unchanged."""
    if not isinstance(f, Mapped) or f.inputs[0][0].kind != "Rows":
        return f
    found = elementwise(f)
    if found is None:
        return f
    table, array = found
    assert isinstance(table, Product)
    ids, values = Lookup.of(table).valid()
    acc = accumulator(f)
    return with_values(table, ids, values.astype(acc) * table.layout.to_matrix(array.astype(acc))[0][ids])


def of_positions(f: Product, array: Array, dtype: jnp.dtype) -> Scaled:
    """The product at each position of an Outer with G = 1, as an example of its own; it is scaled by `array`."""
    left, right = (a.astype(dtype).reshape(-1, a.shape[3]) for a in f.sides())
    return Scaled(left, right, f.layout.to_matrix(array.astype(dtype))[0])


def scaled_products(leaf: Sequence[Factor]) -> list[Scaled] | None:
    """Convert one parameter's factors to this form; None if they have more positions or another layout."""
    acc = accumulator(*leaf)
    alone = elementwise(leaf[0]) if len(leaf) == 1 else None
    if alone is not None and isinstance(alone[0], Product) and alone[0].is_vectors:  # in any layout
        return [of_positions(alone[0], alone[1], acc)]
    found = [_scaled(wide(f, acc)) for f in leaf]
    return None if any(products is None for products in found) else [p for products in found for p in products or ()]


def _scaled(f: Factor) -> list[Scaled] | None:
    shape = f.layout.shape
    if isinstance(f, Product):
        if f.kind != "Outer" or f.positions != 1 or not all(axis.is_whole(f.sizes) for axis in f.place):
            return None
        G, _, F, K = f.roles
        if G or f.place[0].labels != F or f.out[len(F) :] != K:
            return None
        left, right = f.sides()
        return [Scaled(left[:, 0, 0], right[:, 0, 0], None)]
    if isinstance(f, Common):
        return [Scaled(f.number[:, None], None, _rows(f.array.value))]
    if not isinstance(f, Mapped) or len(f.inputs) != 1 or len(f.inputs[0]) != 1:
        return None
    dims, (part,), ((of, _),) = f.map.entrywise(), f.inputs[0], f.shapes
    if dims is None or not shape:
        return None
    ones = [jnp.ones(of, accumulator(f))]
    arrays = [_rows(dataclasses.replace(f, map=each).apply(ones)) for each in f.map.parts()]
    if isinstance(part, Product) and part.right is not None and of == shape:
        product = _scaled(part)
        return None if product is None else [product[0]._replace(array=array) for array in arrays]
    along = [d for d, n in zip(dims or range(len(of)), of, strict=True) if n != 1]
    if not isinstance(part, Product) or part.right is not None or along not in ([], [0], list(range(1, len(shape)))):
        return None
    values = part.left.reshape(part.left.shape[0], math.prod(of))
    first = not along or along == [0]
    return [Scaled(values if first else None, None if first else values, array) for array in arrays]


def _rows(a: Array) -> Array:
    return a.reshape(a.shape[0], math.prod(a.shape[1:]))


def scaled_by_powers_of_two(product: Scaled) -> tuple[Scaled, Array]:
    """(the product with each of its arrays scaled to near 1, unit [B]); the shared array is scaled when it is read."""

    def one(a: Array | None) -> tuple[Array | None, list[Array]]:
        if a is None:
            return None, []
        most = jnp.abs(lax.stop_gradient(a)).max(1, initial=0)
        return a / power_of_two(most)[:, None], [nearest_power(most)]

    (left, units), (right, more) = one(product.left), one(product.right)
    units += more
    if product.array is None:
        return Scaled(left, right, None), math.prod(units[1:], start=units[0])
    most = jnp.abs(lax.stop_gradient(product.array)).max(initial=0)
    units.append(nearest_power(most))
    return Scaled(left, right, product.array, power_of_two(most)), math.prod(units[1:], start=units[0])


def times(product: Scaled, c: Array) -> Scaled:
    """Multiply example b by c_b."""
    if product.left is not None:
        return product._replace(left=product.left * c[:, None])
    assert product.right is not None
    return product._replace(right=product.right * c[:, None])


def inner(p: Scaled, q: Scaled) -> Array:
    """[B]: the inner product of p and q for each example."""
    left, right = _both(p.left, q.left), _both(p.right, q.right)
    shared = [x for x in (p, q) if x.array is not None]
    if not shared:
        assert left is not None
        assert right is not None
        return row_sums(left) * row_sums(right)

    def whole(arrays: Sequence[Array]) -> Array:
        near = [a if x.unit is None else a / x.unit for a, x in zip(arrays, shared, strict=True)]
        return math.prod(near[1:], start=near[0])

    arrays = [x.array for x in shared if x.array is not None]
    F, K = arrays[0].shape
    if right is None:
        assert left is not None
        return row_sums(left * whole(arrays).sum(1)[None])
    if left is None:
        return row_sums(right * whole(arrays).sum(0)[None])
    size = Blocks.of(K * right.dtype.itemsize, F, BLOCK_BYTES)

    def across(*arrays: Array) -> Array:
        return jnp.matmul(whole(arrays), right.T)

    turned = map_examples(across, size, *arrays, spread=False)  # [F, B]
    return row_sums(left * turned.T)


def _both(a: Array | None, b: Array | None) -> Array | None:
    return b if a is None else a if b is None else a * b
