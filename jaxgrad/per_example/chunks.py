"""Loops that write out no more at once than a stated number of bytes."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree

CHUNK_BYTES = 64 * 2**20
"""How much may be written out at once, unless the caller says otherwise."""

T = TypeVar("T")


def chunk_size(bytes_each: int, chunk_bytes: int, count: int) -> int:
    """How many of `count` things of `bytes_each` to hold at once: at least one."""
    return max(1, min(count, chunk_bytes // max(bytes_each, 1)))


def map_examples(function: Callable[..., Array], size: int, *trees: PyTree) -> Array:
    """function(*trees) where it treats examples (axis 0) independently, on `size` examples at a time."""
    count = jax.tree.leaves(trees)[0].shape[0]
    if size >= count:
        return function(*trees)
    whole = count - count % size
    blocks = jax.tree.map(lambda a: a[:whole].reshape(whole // size, size, *a.shape[1:]), trees)
    results = lax.map(lambda block: function(*block), blocks)
    results = results.reshape(whole, *results.shape[2:])
    if whole == count:
        return results
    return jnp.concatenate([results, function(*jax.tree.map(lambda a: a[whole:], trees))])


def sum_examples(function: Callable[..., Array], size: int, *trees: PyTree) -> Array:
    """function(*trees) where it sums over examples (axis 0), on `size` examples at a time."""
    count = jax.tree.leaves(trees)[0].shape[0]
    if size >= count:
        return function(*trees)
    whole = count - count % size
    blocks = jax.tree.map(lambda a: a[:whole].reshape(whole // size, size, *a.shape[1:]), trees)
    rest = jax.tree.map(lambda a: a[whole:], trees)
    first = function(*jax.tree.map(lambda a: a[0], blocks))
    others = jax.tree.map(lambda a: a[1:], blocks)
    total, _ = lax.scan(lambda total, block: (total + function(*block), None), first, others)
    return total if whole == count else total + function(*rest)
