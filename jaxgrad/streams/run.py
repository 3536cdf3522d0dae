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
from jaxgrad.streams.store import Store, check_blocks, mapped, opened


@named_tuple
class Part(NamedTuple):
    """The results for one batch, as a function for `run` returns them.

    Attributes:
        rows: name → array [b, …] with one row for each of the batch's b examples; all rows are stored.
        sums: name → array; the arrays of all batches are added up in float64.

    Example:
        >>> import tempfile
        >>> largest = lambda params, x: Part({"largest": x.max(1)}, {"sum": x.sum(0)})
        >>> run(largest)(None, jg.streams.Batches(np.eye(3), size=2), tempfile.mkdtemp()).sums["sum"].tolist()
        [1.0, 1.0, 1.0]
    """

    rows: Mapping[str, Any]
    sums: Mapping[str, Any]


class Results(NamedTuple):
    """The results for all batches. They are also on disk.

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

    After every `every` batches, the returned function commits their results: it writes the rows and flushes them to
    disk, and then replaces the manifest, which counts the rows, in one step. A run may be stopped at any moment, even
    by SIGKILL. To continue after the last committed batch, call the returned function again with the same arguments; it
    first drops rows that the manifest does not count. The files are then the same, to the byte, as those of an
    uninterrupted run. To append rows, call it with the old batches followed by the new ones.

    The rows of each name are one file, `folder/NAME.rows`, which can be read with NumPy alone, without jaxgrad:
    `np.memmap(file, dtype, "r", shape=(examples, *shape))` with the dtype, the number of examples and the shape that
    `folder/manifest.json` states. Rows keep their dtype; NumPy reads those of bfloat16 as the upper halves of float32:
    `(np.memmap(file, "<u2").astype("<u4") << 16).view("<f4")`. `load` opens them, and with `check=True`
    reads all rows to find damaged ones.

    Args:
        function: function(params, *batch) → `Part`, such as `norms(loss)`. To pass more arrays to it, make it a
            `jax.tree_util.Partial`: the arrays are then arguments of the compiled program, not constants in it.
        every: number of batches per commit. Every commit writes the sums, so raise this number if they are large.
        progress: True shows a progress bar (needs rich).
        jit: False calls the function without `jax.jit`, for functions that are not written in JAX.

    Returns:
        A function of (params, batches, folder) that returns `Results`, whose rows are memory-mapped. `params` is a tree
        of arrays, which is passed to the function. `batches` is a sequence or any other iterable of tuples. Always pass
        all batches from the first one on, even to continue a run: a run that continues does not read the completed
        batches of a sequence, and reads and skips those of any other iterable. `folder` is created if it does not
        exist. Only one run may use a folder at a time.

    Raises:
        TypeError: a batch is not a tuple.
        ValueError: rows or sums do not have the names, shapes and dtypes of those in the folder; files in the folder
            are damaged; the rows of one batch have different lengths; or `every` is below 1.

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
        return Results(mapped(store.folder, store.committed), store.sums, store.batches, store.examples)

    return run_batches


@naming("streams.load")
def load(folder: str | os.PathLike[str], *, check: bool = False, progress: bool = False) -> Results:
    """Open what `run` wrote, without changing it: the rows memory-mapped, the sums, and the counts.

    The checksums of the manifest and of the sums and the lengths of all files are compared on every call, so that a
    file that was cut off, changed or written by something else is an error and not wrong numbers.

    Args:
        folder: as in `run`. The run may still be going on: what it has committed is returned.
        check: True also reads all rows and compares the checksum of every block.
        progress: True shows a progress bar for that (needs rich).

    Returns:
        `Results`.

    Raises:
        ValueError: `run` did not write the folder, or files in it are damaged.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> same = lambda params, x: Part({"x": x}, {})
        >>> _ = run(same)(None, jg.streams.Batches(np.eye(3), size=2), folder)
        >>> load(folder, check=True).rows["x"].tolist()
        [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    manifest, sums = opened(Path(folder))
    if check:
        check_blocks(Path(folder), manifest, progress)
    return Results(mapped(Path(folder), manifest), sums, manifest.batches, manifest.examples)


def _from(batches: Iterable[tuple[Any, ...]], start: int) -> Iterator[tuple[Any, ...]]:
    if isinstance(batches, Sequence):
        return (batches[k] for k in range(start, len(batches)))
    return islice(iter(batches), start, None)


def _length(batches: Iterable[Any]) -> int | None:
    return len(batches) if isinstance(batches, Sequence) else None
