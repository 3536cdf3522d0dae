"""Data as a sequence of batches."""

import mmap
import operator
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxgrad.errors import caller
from jaxgrad.per_example.arguments import checked_batch

Batch = tuple[Any, ...]


class Batches(Sequence[tuple[Any, ...]]):
    """A sequence of batches, cut from arrays with a leading example axis; the last batch may be smaller.

    Args:
        arrays: arrays [N, …], memory-mapped or not.
        size: examples per batch.

    Raises:
        ValueError: there are no arrays, the arrays have different lengths, or the size is below 1.

    Example:
        >>> batches = Batches(np.zeros((10, 3)), np.zeros(10), size=4)
        >>> len(batches), [len(x) for x, _ in batches]
        (3, [4, 4, 2])
    """

    def __init__(self, *arrays: Any, size: int):
        lengths = {len(a) for a in arrays}
        if len(lengths) != 1 or operator.index(size) < 1:
            raise ValueError(
                f"streams.Batches: expected arrays of one length and a size of at least 1, got lengths "
                f"{sorted(lengths)} and size {size}."
            )
        self.arrays, self.size, self.length = arrays, size, lengths.pop()

    def __len__(self) -> int:
        return -(-self.length // self.size)

    def __getitem__(self, index: Any) -> Any:
        """Return one batch: the part of every array with this index, as NumPy arrays."""
        k = operator.index(index)
        if not 0 <= k < len(self):
            raise IndexError(f"streams.Batches: expected an index from 0 to {len(self) - 1}, got {k}.")
        return tuple(_read(a, k * self.size, (k + 1) * self.size) for a in self.arrays)


def _read(a: Any, start: int, stop: int) -> np.ndarray:
    """A copy of some rows of an array. Those of a memory-mapped file are mapped by themselves, so that the memory of
    the rows that were read before can be given back."""
    if not isinstance(a, np.memmap) or not isinstance(a.base, mmap.mmap) or not a.flags.c_contiguous or a.ndim == 0:
        return np.asarray(a[start:stop])
    stop = min(stop, len(a))
    offset = a.offset + start * (a.nbytes // len(a))
    return np.array(np.memmap(a.filename, a.dtype, "r", offset, (stop - start, *a.shape[1:])))


def checked_sequences(**sequences: Any) -> None:
    """Raise TypeError for batches that cannot be counted and read again; the keywords are the names in the message."""
    for name, batches in sequences.items():
        if not (hasattr(batches, "__len__") and hasattr(batches, "__getitem__")):
            raise TypeError(
                f"{caller()}: expected a sequence of batches as {name}, because they are counted and reread, got "
                f"{type(batches).__name__}. Pass a list, or jg.streams.Batches(x, y, size=...)."
            )


def checked(batch: Any) -> Any:
    """Return the batch; raise TypeError if it is not a tuple of the loss's arguments."""
    return checked_batch("a batch", batch)


@jax.jit
def jitted_call(function: jax.tree_util.Partial, *args: Any) -> Any:
    """Return function(*args). Arrays in the Partial are arguments of the compiled program, not constants in it."""
    return function(*args)


def as_partial(function: Any) -> jax.tree_util.Partial:
    """Return the function as an argument for `jitted_call`."""
    return function if isinstance(function, jax.tree_util.Partial) else jax.tree_util.Partial(function)
