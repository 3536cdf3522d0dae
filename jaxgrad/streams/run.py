"""run: apply a function to all batches and write its results to disk; an interrupted run can be continued."""

import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import PyTree

from jaxgrad.errors import naming
from jaxgrad.per_example.serialized import named_tuple
from jaxgrad.progress import counted
from jaxgrad.streams.batches import as_partial, checked, jitted_call
from jaxgrad.streams.store import Store


@named_tuple
class Part(NamedTuple):
    """The results for one batch, which a function for `run` returns.

    Attributes:
        rows: name → [b, …], stored for every example.
        sums: name → array, added up over all batches in float64.

    Example:
        >>> import tempfile
        >>> largest = lambda params, x: Part({"largest": x.max(1)}, {"sum": x.sum(0)})
        >>> run(largest)(None, jg.streams.Batches(np.eye(3), size=2), tempfile.mkdtemp()).sums["sum"].tolist()
        [1.0, 1.0, 1.0]
    """

    rows: Mapping[str, Any]
    sums: Mapping[str, Any]


class Results(NamedTuple):
    """The results for all batches, which are also on disk.

    Attributes:
        rows: name → memory-mapped array [examples, …], in the order of the batches.
        sums: name → float64 array.
        batches: number of batches.
        examples: number of examples.

    Example:
        >>> import tempfile
        >>> same = lambda params, x: Part({"x": x}, {})
        >>> results = run(same)(None, jg.streams.Batches(np.eye(3), size=2), tempfile.mkdtemp())
        >>> results.rows["x"].shape, results.batches, results.examples
        ((3, 3), 2, 3)
    """

    rows: dict[str, np.ndarray]
    sums: dict[str, np.ndarray]
    batches: int
    examples: int


def run(
    function: Callable[..., Part], *, every: int = 1, progress: bool = False, jit: bool = True
) -> Callable[..., Results]:
    """Apply a function to all batches, and write the rows and sums that it returns to disk as they are computed.

    A run may be stopped at any moment, even by SIGKILL. Called again with the same arguments, it continues after the
    last committed batch and ends with the same files, to the byte, as an uninterrupted run. A commit first writes the
    rows and flushes them to disk, then replaces the state, which counts them, in one step; the next start truncates
    rows that the state does not count.

    Args:
        function: function(params, *batch) → `Part`, such as `norms(loss)`. To pass it more arrays, make it a
            `jax.tree_util.Partial`: they are then arguments of the compiled program, not constants in it.
        every: number of batches per commit; raise it if the sums are large, because every commit writes them.
        progress: True shows a progress bar (needs rich).
        jit: False calls the function without `jax.jit`, for functions that are not written in JAX.

    Returns:
        A function of (params, batches, folder) that returns `Results`, whose rows are memory-mapped. `params` is a tree
        of arrays and is passed to the function. `batches` is a sequence or another iterable of tuples, always from the
        first batch on. If a run continues, it does not read the completed batches of a sequence; it reads and skips
        those of another iterable. `folder` is created if it does not exist; only one run may use it at a time.

    Raises:
        TypeError: a batch that is not a tuple.
        ValueError: rows or sums whose names, shapes or dtypes differ from those in the folder; rows of different
            lengths; `every` below 1.

    Example:
        >>> import tempfile
        >>> each = jg.streams.norms(lambda w, x: jnp.sin(w @ x))
        >>> results = run(each)(jnp.ones(3), jg.streams.Batches(np.eye(3), size=2), tempfile.mkdtemp())
        >>> results.rows["norms"].shape, bool(np.allclose(results.rows["norms"], np.cos(1))), results.batches
        ((3,), True, 2)
    """
    if operator.index(every) < 1:
        raise ValueError(f"streams.run: expected to commit every 1 or more batches, got {every}.")
    partial = as_partial(function)

    @naming("streams.run")
    def run_batches(params: PyTree, batches: Iterable[tuple[Any, ...]], folder: str | os.PathLike[str]) -> Results:
        store = Store(Path(folder))
        uncommitted = 0
        for batch in counted(_from(batches, store.batches), _length(batches), store.batches, progress):
            args = params, *checked(batch)
            part = jitted_call(partial, *args) if jit else function(*args)
            store.add(part.rows, part.sums)
            uncommitted += 1
            if uncommitted == every:
                store.commit()
                uncommitted = 0
        if uncommitted:
            store.commit()
        return Results(store.rows(), store.sums, store.batches, store.examples)

    return run_batches


def _from(batches: Iterable[tuple[Any, ...]], start: int) -> Iterator[tuple[Any, ...]]:
    if isinstance(batches, Sequence):
        return (batches[k] for k in range(start, len(batches)))
    return islice(iter(batches), start, None)


def _length(batches: Iterable[Any]) -> int | None:
    return len(batches) if isinstance(batches, Sequence) else None
