"""Accurate sums over very many examples and positions.

A CPU adds one term after another, so the sum of n equal numbers is off by up to n/2 roundings, 1e-2 of the sum for two
million. If blocks are summed first and then added, it is off by as many roundings as a block has terms. Accelerators,
and devices across which the examples are sharded, sum in parallel; there the sum is left as it is.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Integer

from jaxgrad.per_example.algebra.platforms import by_platform
from jaxgrad.precision import contracted, working_dtype
from jaxgrad.sharding import devices

MANY = 1024  # up to this many terms, the sum is one product
BLOCK = 32  # terms per block
VECTOR = 64  # rows shorter than this are summed side by side, up to BESIDE entries wide
BESIDE = 1024  # entries in rows that are summed side by side
FUSED = 256  # up to this row length, the compiler's own reduction is as fast as a product
SMALL = 8  # up to this many entries F·K, a CPU does not treat the product of sides as a matrix product
MANY_PRODUCTS = 2**17  # up to this many terms, a matrix product is as exact as one of a few thousand


def weighted_rows(c: Float[Array, " N"], v: Float[Array, "N D"]) -> Float[Array, " D"]:
    """Σ_n c_n v_n."""
    if _in_one(v):
        return jnp.matmul(c, v, precision=lax.Precision.HIGHEST)
    return _weighted_rows(c, v)


def products(left: Float[Array, "N F"], right: Float[Array, "N K"]) -> Float[Array, "F K"]:
    """Σ_n left_n ⊗ right_n, in float32 or wider."""
    F, K = left.shape[1], right.shape[1]
    if _in_one(left) or (F * K > SMALL and min(F, K) > 1 and left.shape[0] <= MANY_PRODUCTS):
        return _products_in_one(left, right)
    left, right = (a.astype(working_dtype(left.dtype, right.dtype)) for a in (left, right))
    if K == 1:
        return _weighted_rows(right[:, 0], left)[:, None]
    if F == 1:
        return _weighted_rows(left[:, 0], right)[None]
    return _products(left, right)


def grouped_products(left: Float[Array, "B G T F"], right: Float[Array, "B G T K"]) -> Float[Array, "G F K"]:
    """Σ_bt left_bgt ⊗ right_bgt."""
    B, G, T, _ = left.shape
    if not _known(B) or B * T <= MANY or devices(left) > 1:
        return contracted("bgtf,bgtk->gfk", left, right, working_dtype(left.dtype, right.dtype))
    sides = (a.swapaxes(0, 1).reshape(G, B * T, a.shape[3]) for a in (left, right))
    return jax.vmap(products)(*sides)


def table(ids: Integer[Array, " N"], values: Float[Array, "N K"], rows: int) -> Float[Array, "{rows} K"]:
    """Add values_n to row ids_n of `rows`; if these are few, runs of neighbors fill separate tables, then summed."""
    N, K = values.shape
    copies = 1 if _in_one(values) or not rows else min(N // rows, N // BLOCK)
    if copies <= 1:
        return jnp.zeros((rows, K), values.dtype).at[ids].add(values)
    copy = jnp.arange(N, dtype=ids.dtype) // jnp.asarray(-(-N // copies), ids.dtype)
    tables = jnp.zeros((copies, rows, K), values.dtype).at[copy, ids].add(values)
    return _weighted_rows(jnp.ones(copies, values.dtype), tables.reshape(copies, rows * K)).reshape(rows, K)


def _in_one(a: Array) -> bool:
    """True if one product sums the array: it has few terms or a symbolic number, or is on several devices."""
    return not _known(a.shape[0]) or a.shape[0] <= MANY or devices(a) > 1


def _known(count: Any) -> bool:
    return isinstance(count, int)


# --- On one CPU; derivatives are those of the plain product -----------------------------------------------------------


@jax.custom_jvp
def _weighted_rows(c: Array, v: Array) -> Array:
    return by_platform(_rows_in_blocks, _rows_in_one)(c, v)


@_weighted_rows.defjvp
def _tangent_of_rows(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    (c, v), (dc, dv) = primals, tangents
    return _weighted_rows(c, v), _rows_in_one(dc, v) + _rows_in_one(c, dv)


def _rows_in_one(c: Array, v: Array) -> Array:
    return jnp.matmul(c, v, precision=lax.Precision.HIGHEST)


def _rows_in_blocks(c: Array | None, v: Array) -> Array:
    """Sum blocks of BLOCK rows, or of BLOCK runs of short rows side by side; then sum the results in the same way."""
    N, D = v.shape
    if N <= 2 * BLOCK:
        return v.sum(0) if c is None else _rows_in_one(c, v)
    if VECTOR <= D <= FUSED:
        beside, count = 1, N // BLOCK
        terms = v if c is None else c[:, None] * v
        blocks = terms[: count * BLOCK].reshape(count, BLOCK, D).sum(1)
    else:
        beside = min(BESIDE // D, N // BLOCK) if 0 < D < VECTOR else 1
        count = N // (BLOCK * beside)
        blocks = _blocks_of_rows(c, v, count, beside)
    total, done = _rows_in_blocks(None, blocks), count * BLOCK * beside
    return total if done == N else total + _rows_in_blocks(None if c is None else c[done:], v[done:])


def _blocks_of_rows(c: Array | None, v: Array, count: int, beside: int) -> Array:
    """[count · beside, D]: each row is the sum of BLOCK rows that are `beside` rows apart."""
    size, ones = BLOCK * beside, jnp.ones(BLOCK, v.dtype)

    def block(k: Array) -> Array:
        terms = lax.dynamic_slice_in_dim(v, k * size, size)
        weights = None if c is None else lax.dynamic_slice_in_dim(c, k * size, size)
        if beside == 1:
            return _rows_in_one(ones if weights is None else weights, terms)
        terms = terms if weights is None else weights[:, None] * terms
        return _rows_in_one(ones, terms.reshape(BLOCK, beside * v.shape[1]))

    return lax.map(block, jnp.arange(count)).reshape(count * beside, v.shape[1])


@jax.custom_jvp
def _products(left: Array, right: Array) -> Array:
    return by_platform(_products_in_blocks, _products_in_one)(left, right)


@_products.defjvp
def _tangent_of_products(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    (left, right), (dl, dr) = primals, tangents
    tangent = _products_in_one(dl, right) + _products_in_one(left, dr)
    return _products(left, right), tangent


def _products_in_one(left: Array, right: Array) -> Array:
    return contracted("nf,nk->fk", left, right, working_dtype(left.dtype, right.dtype))


def _products_in_blocks(left: Array, right: Array) -> Array:
    N, F, K = *left.shape, right.shape[1]
    if F * K <= SMALL:
        count, size = N // BLOCK, BLOCK
        sides = (a[: count * size].reshape(count, size, a.shape[1]) for a in (left, right))
        total = _rows_in_blocks(None, jnp.einsum("nbf,nbk->nfk", *sides).reshape(count, F * K))
        total = total.reshape(F, K)
    else:
        count, size = 32, N // 32

        def add(total: Array, k: Array) -> tuple[Array, None]:
            part, part_ = (lax.dynamic_slice_in_dim(a, k * size, size) for a in (left, right))
            return total + _products_in_one(part, part_), None

        first = _products_in_one(left[:size], right[:size])
        total, _ = lax.scan(add, first, jnp.arange(1, count))
    return total if count * size == N else total + _products_in_one(left[count * size :], right[count * size :])
