"""Loops that write out no more at once than a stated number of bytes."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree

T = TypeVar("T")

CHUNK_BYTES = 64 * 2**20
"""How much may be written out at once, unless the caller says otherwise."""


def chunk_size(bytes_each: int, chunk_bytes: int, count: int) -> int:
    """How many of `count` things of `bytes_each` to hold at once: at least one."""
    return max(1, min(count, chunk_bytes // max(bytes_each, 1)))


def map_examples(function: Callable[..., Array], size: int, *trees: PyTree) -> Array:
    """function(*trees) where it treats examples (axis 0) independently, on `size` examples at a time or somewhat fewer.

    The blocks are cut out where they are used: no second copy of the examples is made.
    """
    count = _count(trees)
    if size >= count:
        return function(*trees)
    size = _even(size, count)
    blocks = count // size

    def block(k: Array) -> Array:
        return function(*jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, k * size, size), trees))

    results = lax.map(block, jnp.arange(blocks))
    results = results.reshape(results.shape[0] * results.shape[1], *results.shape[2:])
    rest = jax.tree.map(lambda a: a[blocks * size :], trees)
    return jnp.concatenate([results, function(*rest)]) if _count(rest) else results


def sum_examples(function: Callable[..., T], size: int, *trees: PyTree) -> T:
    """function(*trees), a tree of arrays, where it sums over examples (axis 0), on `size` examples at a time."""
    if size >= _count(trees):
        return function(*trees)
    blocks, rest = _cut(trees, size)
    first = function(*jax.tree.map(lambda a: a[0], blocks))
    others = jax.tree.map(lambda a: a[1:], blocks)
    total, _ = lax.scan(lambda total, block: (jax.tree.map(jnp.add, total, function(*block)), None), first, others)
    return jax.tree.map(jnp.add, total, function(*rest)) if _count(rest) else total


def _count(trees: PyTree) -> int:
    return jax.tree.leaves(trees)[0].shape[0]


def _even(size: int, count: int) -> int:
    """A size that leaves nothing over, if there is one that is not much smaller."""
    return next((n for n in range(size, size // 2, -1) if count % n == 0), size)


def _cut(trees: PyTree, size: int) -> tuple[PyTree, PyTree]:
    """(whole blocks of `size` examples, [blocks, size, …]; what is left over)."""
    blocks = _count(trees) // size
    whole = jax.tree.map(lambda a: a[: blocks * size].reshape(blocks, size, *a.shape[1:]), trees)
    return whole, jax.tree.map(lambda a: a[blocks * size :], trees)
