"""Loops that write out no more at once than a stated number of bytes."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree

from jaxgrad.per_example.algebra.mapped import map_examples_of, of_examples, put_back, taken_out
from jaxgrad.sharding import devices

T = TypeVar("T")

CHUNK_BYTES = 64 * 2**20
"""How much may be written out at once, unless the gradients say otherwise: `PerExampleGrads.chunk_bytes`."""


EXPECTED = 64
"""What is reckoned with where `jax.export` leaves the number of examples open."""


def expected(count: Any) -> int:
    """The number itself, or `EXPECTED` for one that is symbolic: for decisions that change cost and no result."""
    return count if isinstance(count, int) else EXPECTED


_bound: ContextVar[int] = ContextVar("bytes that may be written out at once", default=CHUNK_BYTES)
_pairs: ContextVar[int] = ContextVar("pairs of outputs that each pair of examples stands for", default=1)


@contextmanager
def _set(variable: ContextVar[int], value: int) -> Iterator[None]:
    before = variable.set(value)
    try:
        yield
    finally:
        variable.reset(before)


def at_most(nbytes: int) -> AbstractContextManager[None]:
    """Inside it no more than so many bytes are written out at once, unless a single example needs more."""
    return _set(_bound, nbytes)


def pairs_of_outputs(count: int) -> AbstractContextManager[None]:
    """Inside it what is done for a pair of examples is done for so many pairs of their outputs, by `jax.vmap`."""
    return _set(_pairs, count)


def pairs_at_once(pair_bytes: int, count: int) -> int:
    """How many of `count` examples to pair with one other at once, where a pair takes so many bytes."""
    return chunk_size(pair_bytes * _pairs.get(), count)


def chunk_size(bytes_each: int, count: int, most: int = CHUNK_BYTES) -> int:
    """How many of `count` things of `bytes_each` to hold at once, in no more bytes than `most`: at least one."""
    return max(1, min(expected(count), min(_bound.get(), most) // max(bytes_each, 1)))


def map_examples(function: Callable[..., Array], size: int, *trees: PyTree, spread: bool = True) -> Array:
    """function(*trees) where it treats examples (axis 0) independently, on `size` examples at a time or somewhat fewer.

    The blocks are cut out where they are used: no second copy of the examples is made. Of a batch that may be spread
    over devices a block has every so-manyth example, `size` rounded up to some of each device's: none has to travel.

    Args:
        spread: whether axis 0 may be spread over devices.
    """
    if not isinstance(_count(trees), int):
        return _map_unknown(function, size, trees)
    cut = _Cut.of(trees, size, spread)
    if cut.blocks <= 1:
        return function(*trees)
    results = lax.map(lambda k: function(*cut.block(trees, k)), jnp.arange(cut.blocks))
    results = results.swapaxes(0, 1) if cut.spread else results
    results = results.reshape(cut.blocks * cut.size, *results.shape[2:])
    rest = cut.rest(trees)
    return jnp.concatenate([results, function(*rest)]) if _count(rest) else results


def sum_examples(function: Callable[..., T], size: int, *trees: PyTree, spread: bool = True) -> T:
    """function(*trees), a tree of arrays, where it sums over examples (axis 0), on blocks as in `map_examples`."""
    if not isinstance(_count(trees), int):
        return _sum_unknown(function, trees)
    cut = _Cut.of(trees, size, spread)
    if cut.blocks <= 1:
        return function(*trees)
    without, shared = taken_out(trees)
    blocks = jax.tree.map(lambda a: cut.whole(a).swapaxes(0, 1) if cut.spread else cut.whole(a), without)
    first, others = jax.tree.map(lambda a: a[0], blocks), jax.tree.map(lambda a: a[1:], blocks)
    start = function(*put_back(first, shared))
    total, _ = lax.scan(lambda total, block: (_added(total, function(*put_back(block, shared))), None), start, others)
    rest = cut.rest(trees)
    return _added(total, function(*rest)) if _count(rest) else total


def _added(a: T, b: T) -> T:
    return jax.tree.map(jnp.add, a, b)


# --- Of as many examples as are only known later, under `jax.export`: no block is smaller than another --------------


def _map_unknown(function: Callable[..., Array], size: int, trees: PyTree) -> Array:
    """Blocks of `size`, the last one filled up with zeros."""
    count = _count(trees)
    blocks = 1 + (count - 1) // size
    without, shared = taken_out(trees)

    def cut(a: Array) -> Array:
        filled = lax.pad(a, jnp.zeros((), a.dtype), [(0, blocks * size - count, 0), *[(0, 0, 0)] * (a.ndim - 1)])
        return filled.reshape(blocks, size, *a.shape[1:])

    results = lax.map(lambda block: function(*put_back(block, shared)), jax.tree.map(cut, without))
    return results.reshape(blocks * size, *results.shape[2:])[:count]


def _sum_unknown(function: Callable[..., T], trees: PyTree) -> T:
    """An example at a time."""
    without, shared = taken_out(trees)

    def one(example: PyTree) -> T:
        return function(*put_back(jax.tree.map(lambda a: a[None], example), shared))

    shapes = jax.eval_shape(one, jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), without))
    start = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    total, _ = lax.scan(lambda total, example: (_added(total, one(example)), None), start, without)
    return total


# --- Of a known number -----------------------------------------------------------------------------------------------


class _Cut(NamedTuple):
    """How examples fall into blocks.

    Attributes:
        size: of a block.
        blocks: how many.
        spread: whether a block has every so-manyth example, and not neighbours.
    """

    size: int
    blocks: int
    spread: bool

    @staticmethod
    def of(trees: PyTree, size: int, spread: bool) -> "_Cut":
        count, over = _count(trees), devices(trees) if spread else 1
        if size >= count:
            return _Cut(count, 1, False)
        size = -(-size // over) * over
        even = (n for n in range(size, size // 2, -over) if count % n == 0)  # leaves nothing over
        size = min(next(even, size), count)
        return _Cut(size, count // size, over > 1)

    def whole(self, a: Array) -> Array:
        """[blocks, size, …] without what is left over; [size, blocks, …] where a block has every so-manyth."""
        shape = (self.size, self.blocks) if self.spread else (self.blocks, self.size)
        return a[: self.blocks * self.size].reshape(*shape, *a.shape[1:])

    def block(self, trees: PyTree, k: Array) -> PyTree:
        """Block k."""
        if not self.spread:
            return map_examples_of(lambda a: lax.dynamic_slice_in_dim(a, k * self.size, self.size), trees)
        return map_examples_of(lambda a: lax.dynamic_index_in_dim(self.whole(a), k, 1, keepdims=False), trees)

    def rest(self, trees: PyTree) -> PyTree:
        """What is left over."""
        return map_examples_of(lambda a: a[self.blocks * self.size :], trees)


def _count(trees: PyTree) -> int:
    return of_examples(trees)[0].shape[0]
