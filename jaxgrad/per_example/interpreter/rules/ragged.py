"""Products of groups of rows, each with a matrix of its own (`jax.lax.ragged_dot`), as in a mixture of experts."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array

from jaxgrad import _jax


def _weights_gradient(lhs: Array, rhs: Array, sizes: Array, **params: Any) -> Array | None:
    """Σ over each group's rows, as a product: the smaller operand is set to zero outside of the group."""
    parts = _jax.ragged_parts(params)
    if parts is None or parts.rows not in parts.lhs_contracted or sizes.ndim != 1:
        return None
    rows, G = parts.rows, sizes.shape[0]
    rows_ = parts.rhs_contracted[parts.lhs_contracted.index(rows)]
    hot = _groups(sizes, lhs.shape[rows])[None] == jnp.arange(G)[:, None]
    contracted = list(parts.lhs_contracted), list(parts.rhs_contracted)
    options = {"precision": parts.precision, "preferred_element_type": parts.dtype}
    if lhs.size <= rhs.size:
        left = _of_each_group(hot, lhs, rows)
        return lax.dot_general(left, rhs, (([k + 1 for k in contracted[0]], contracted[1]), ((), ())), **options)
    right = _of_each_group(hot, rhs, rows_)
    product = lax.dot_general(lhs, right, ((contracted[0], [k + 1 for k in contracted[1]]), ((), ())), **options)
    return jnp.moveaxis(product, lhs.ndim - len(contracted[0]), 0)


def _product(lhs: Array, rhs: Array, sizes: Array, **params: Any) -> Array:
    """Each group of rows times its matrix: all rows with every matrix, with zeros for the rows of other groups."""
    parts, numbers = _jax.ragged_parts(params), params["ragged_dot_dimension_numbers"]
    assert parts is not None
    (group,), (k,), (k_,) = numbers.rhs_group_dimensions, parts.lhs_contracted, parts.rhs_contracted
    hot = _groups(sizes, lhs.shape[parts.rows])[None] == jnp.arange(sizes.shape[0])[:, None]
    contracted = (([0, k + 1], [group, k_]), ((), ()))
    options = {"precision": parts.precision, "preferred_element_type": parts.dtype}
    return lax.dot_general(_of_each_group(hot, lhs, parts.rows), rhs, contracted, **options)


def _groups(sizes: Array, rows: int) -> Array:
    """The group of each row; the number of groups for a row behind the last."""
    ends = jnp.cumsum(sizes)
    return (ends[None] <= jnp.arange(rows, dtype=ends.dtype)[:, None]).sum(1)


def _of_each_group(hot: Array, a: Array, axis: int) -> Array:
    shape = [n if k == axis else 1 for k, n in enumerate(a.shape)]
    return jnp.where(hot.reshape(hot.shape[0], *shape), a[None], jnp.zeros((), a.dtype))


def bind(eqn: _jax.Equation, values: Sequence[Any]) -> list[Any]:
    """Evaluate a ragged product, also for batches for which JAX's own vmap raises.

    If all examples share the matrices, the rows of all examples are sorted by their groups, and are then the rows of
    one ragged product.
    """
    parts = _jax.ragged_parts(eqn.params)
    if parts is None or jnp.ndim(values[0]) != 2 or jnp.ndim(values[2]) != 1:
        return _jax.bind(eqn, values)

    @custom_vmap
    def product(lhs: Array, rhs: Array, sizes: Array) -> Any:
        return _jax.bind(eqn, [lhs, rhs, sizes])[0]

    @product.def_vmap
    def over_examples(B: int, batched: Sequence[bool], *operands: Array) -> tuple[Array, bool]:
        lhs, rhs, sizes = operands
        if batched[1] or parts.rows in parts.lhs_contracted:
            equals: Any = _weights_gradient if parts.rows in parts.lhs_contracted else _product
            axes = [0 if on else None for on in batched]
            found: Array = jax.vmap(functools.partial(equals, **eqn.params), axes)(lhs, rhs, sizes)
            return found, True
        lhs, sizes = (
            a if on else jnp.broadcast_to(a, (B, *a.shape)) for a, on in ((lhs, batched[0]), (sizes, batched[2]))
        )
        return _rows_of_all(eqn, parts.rows, lhs, rhs, sizes), True

    return [product(*values)]


def _rows_of_all(eqn: _jax.Equation, axis: int, lhs: Array, rhs: Array, sizes: Array) -> Array:
    """One ragged product of the rows of all examples: lhs [B, M, K] or [B, K, M], sizes [B, G] → [B, M, N]."""
    lhs = jnp.moveaxis(lhs, 1 + axis, 1)
    (B, M, K), G = lhs.shape, sizes.shape[1]
    groups = jax.vmap(lambda s: _groups(s, M))(sizes).reshape(B * M)
    order = jnp.argsort(groups, stable=True)
    rows = lhs.reshape(B * M, K)[order]
    (found,) = bind(eqn, [rows if axis == 0 else rows.T, rhs, sizes.sum(0, dtype=sizes.dtype)])
    found = jnp.where((groups[order] < G)[:, None], found, jnp.zeros_like(found))
    return jnp.zeros_like(found).at[order].set(found).reshape(B, M, -1)


EQUALS = {"ragged_dot_general": _weights_gradient}
