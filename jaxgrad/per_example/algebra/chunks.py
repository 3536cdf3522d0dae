"""Loops that materialize at most a stated number of bytes at once."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree

from jaxgrad.per_example.algebra.mapped import map_examples_of, of_examples, with_shared, without_shared
from jaxgrad.sharding import devices

T = TypeVar("T")

CHUNK_BYTES = 64 * 2**20
"""Default of `PerExampleGrads.chunk_bytes`: how many bytes may be materialized at once."""


EXPECTED = 64
"""Number of examples assumed in cost estimates if `jax.export` leaves it symbolic."""


def expected(count: Any) -> int:
    """The number itself, or `EXPECTED` if it is symbolic; for decisions that change the cost but not the result."""
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
    """A context in which at most `nbytes` are materialized at once, unless a single example needs more."""
    return _set(_bound, nbytes)


def pairs_of_outputs(count: int) -> AbstractContextManager[None]:
    """A context in which each pair of examples stands for `count` pairs of their outputs, by `jax.vmap`."""
    return _set(_pairs, count)


def pairs_at_once(pair_bytes: int, count: int) -> int:
    """How many of `count` examples to pair with another example at once, if a pair takes `pair_bytes`."""
    return chunk_size(pair_bytes * _pairs.get(), count)


def chunk_size(bytes_each: int, count: int, most: int = CHUNK_BYTES) -> int:
    """How many of `count` things of `bytes_each` to hold at once in at most `most` bytes; at least one.

    More than `CHUNK_BYTES` are held only if `at_most` leaves the bound at its default.
    """
    bound = min(_bound.get(), most) if _bound.get() != CHUNK_BYTES else most
    return max(1, min(expected(count), bound // max(bytes_each, 1)))


class Blocks(NamedTuple):
    """How many examples to take at once: on a processor, where they are to fit its cache, and on accelerators."""

    processor: int
    accelerator: int

    @staticmethod
    def of(bytes_each: int, count: int, in_cache: int) -> "Blocks":
        """As many as fit in `in_cache` bytes on a processor and in `CHUNK_BYTES` on accelerators; at least one."""
        return Blocks(chunk_size(bytes_each, count, in_cache), chunk_size(bytes_each, count))

    @staticmethod
    def fewest(blocks: "Sequence[Blocks]") -> "Blocks":
        """The smallest number on processors, and the smallest on accelerators."""
        return Blocks(*map(min, zip(*blocks, strict=True)))


def _where_compiled(loop: Callable[..., Any], function: Callable[..., Any], size: Blocks, *trees: PyTree) -> Any:
    if size.processor == size.accelerator:
        return loop(function, size.processor, *trees)
    ways = {"cpu": size.processor, "default": size.accelerator}
    return lax.platform_dependent(
        *trees, **{name: lambda *trees, n=n: loop(function, n, *trees) for name, n in ways.items()}
    )


def map_examples(function: Callable[..., Array], size: int | Blocks, *trees: PyTree, spread: bool = True) -> Array:
    """Compute function(*trees) on `size` or somewhat fewer examples (axis 0) at a time; they must be independent.

    Each block is sliced where it is used, so that no second copy of the examples is made. If the batch may be sharded
    over devices, a block takes examples at a fixed stride, with `size` rounded up to equally many from each device, so
    that no example is communicated.

    Args:
        spread: True if axis 0 may be sharded over devices.
    """
    if isinstance(size, Blocks):
        return cast("Array", _where_compiled(functools.partial(map_examples, spread=spread), function, size, *trees))
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


def sum_examples(function: Callable[..., T], size: int | Blocks, *trees: PyTree, spread: bool = True) -> T:
    """Compute function(*trees), a tree of arrays, on blocks as in `map_examples`; it must be a sum over axis 0."""
    if isinstance(size, Blocks):
        return cast("T", _where_compiled(functools.partial(sum_examples, spread=spread), function, size, *trees))
    if not isinstance(_count(trees), int):
        return _sum_unknown(function, trees)
    cut = _Cut.of(trees, size, spread)
    if cut.blocks <= 1:
        return function(*trees)
    without, shared = without_shared(trees)
    blocks = jax.tree.map(lambda a: cut.whole(a).swapaxes(0, 1) if cut.spread else cut.whole(a), without)
    first, others = jax.tree.map(lambda a: a[0], blocks), jax.tree.map(lambda a: a[1:], blocks)
    start = function(*with_shared(first, shared))
    total, _ = lax.scan(
        lambda total, block: (_added(total, function(*with_shared(block, shared))), None), start, others
    )
    rest = cut.rest(trees)
    return _added(total, function(*rest)) if _count(rest) else total


def _added(a: T, b: T) -> T:
    return jax.tree.map(jnp.add, a, b)


# --- A symbolic number of examples, under `jax.export`: all blocks have the same size -------------------------------


def _map_unknown(function: Callable[..., Array], size: int, trees: PyTree) -> Array:
    """Map over blocks of `size`; the last block is padded with zeros."""
    count = _count(trees)
    blocks = 1 + (count - 1) // size
    without, shared = without_shared(trees)

    def cut(a: Array) -> Array:
        filled = lax.pad(a, jnp.zeros((), a.dtype), [(0, blocks * size - count, 0), *[(0, 0, 0)] * (a.ndim - 1)])
        return filled.reshape(blocks, size, *a.shape[1:])

    results = lax.map(lambda block: function(*with_shared(block, shared)), jax.tree.map(cut, without))
    return results.reshape(blocks * size, *results.shape[2:])[:count]


def _sum_unknown(function: Callable[..., T], trees: PyTree) -> T:
    """Sum one example at a time."""
    without, shared = without_shared(trees)

    def one(example: PyTree) -> T:
        return function(*with_shared(jax.tree.map(lambda a: a[None], example), shared))

    shapes = jax.eval_shape(one, jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), without))
    start = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    total, _ = lax.scan(lambda total, example: (_added(total, one(example)), None), start, without)
    return total


# --- A known number of examples --------------------------------------------------------------------------------------


class _Cut(NamedTuple):
    """How examples are divided into blocks.

    Attributes:
        size: number of examples in a block.
        blocks: number of blocks.
        spread: True if a block takes examples at a stride of `blocks`, False if it takes consecutive ones.
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
        even = (n for n in range(size, size // 2, -over) if count % n == 0)  # leaves no remainder
        size = min(next(even, size), count)
        return _Cut(size, count // size, over > 1)

    def whole(self, a: Array) -> Array:
        """[blocks, size, …] without the remainder; [size, blocks, …] if `spread`."""
        shape = (self.size, self.blocks) if self.spread else (self.blocks, self.size)
        return a[: self.blocks * self.size].reshape(*shape, *a.shape[1:])

    def block(self, trees: PyTree, k: Array) -> PyTree:
        """The examples of block k."""
        if not self.spread:
            return map_examples_of(lambda a: lax.dynamic_slice_in_dim(a, k * self.size, self.size), trees)
        return map_examples_of(lambda a: lax.dynamic_index_in_dim(self.whole(a), k, 1, keepdims=False), trees)

    def rest(self, trees: PyTree) -> PyTree:
        """The remainder, which fills no block."""
        return map_examples_of(lambda a: a[self.blocks * self.size :], trees)


def _count(trees: PyTree) -> int:
    return of_examples(trees)[0].shape[0]
