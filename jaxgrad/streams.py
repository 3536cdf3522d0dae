"""Results over data sets that do not fit in memory: batch by batch, written to disk, resumed after an interruption.

The module's public names:

    run            apply a function of one batch to all batches: rows for every example, and sums over all examples
    Batches        arrays, memory-mapped ones too, as batches that can be resumed in the middle
    norms, second_moments, influence    functions for `run`
"""

import functools
import json
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxgrad.errors import called, naming
from jaxgrad.per_example.arguments import checked_batch
from jaxgrad.per_example.gradients import PerExampleGrads
from jaxgrad.per_example.transform import per_example_grad, per_example_value_and_grad
from jaxgrad.progress import shown

__all__ = ["Batches", "Part", "Results", "influence", "norms", "run", "second_moments"]

STATE = "state.npz"


class Part(NamedTuple):
    """What a function for `run` returns for one batch.

    Attributes:
        rows: name → [b, …], stored for every example.
        sums: name → array, added up over all batches in float64.

    Example:
        >>> import tempfile
        >>> largest = lambda x: Part({"largest": x.max(1)}, {"sum": x.sum(0)})
        >>> run(largest, Batches(np.eye(3), size=2), tempfile.mkdtemp()).sums["sum"].tolist()
        [1.0, 1.0, 1.0]
    """

    rows: Mapping[str, Any]
    sums: Mapping[str, Any]


class Results(NamedTuple):
    """The results on disk when `run` returns.

    Attributes:
        rows: name → memory-mapped [examples, …], in the order of the batches.
        sums: name → float64 array.
        batches: number of batches.
        examples: number of examples.

    Example:
        >>> import tempfile
        >>> results = run(lambda x: Part({"x": x}, {}), Batches(np.eye(3), size=2), tempfile.mkdtemp())
        >>> results.rows["x"].shape, results.batches, results.examples
        ((3, 3), 2, 3)
    """

    rows: dict[str, np.ndarray]
    sums: dict[str, np.ndarray]
    batches: int
    examples: int


class Batches(Sequence[tuple[Any, ...]]):
    """Arrays with a leading example axis, memory-mapped ones too, as a sequence of batches; the last may be smaller.

    Args:
        arrays: each [N, …].
        size: examples per batch.

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
        """Return one batch: the k-th part of every array, as NumPy arrays."""
        k = operator.index(index)
        if not 0 <= k < len(self):
            raise IndexError(f"streams.Batches: expected an index from 0 to {len(self) - 1}, got {k}.")
        return tuple(np.asarray(a[k * self.size : (k + 1) * self.size]) for a in self.arrays)


@naming("streams.run")
def run(
    function: Callable[..., Part],
    batches: Iterable[tuple[Any, ...]],
    folder: str | os.PathLike[str],
    *,
    every: int = 1,
    progress: bool = False,
) -> Results:
    """Call function(*batch) on all batches and write the rows and sums to disk as they come.

    A run may be stopped at any moment, even by SIGKILL. Called again with the same arguments, it continues after the
    last committed batch and ends with the same files, to the byte, as an uninterrupted run. Rows are written and
    flushed to disk before the state that counts them is replaced in one step; the next start truncates rows that the
    state does not count.

    Args:
        function: maps one batch to a `Part`. `run` does not jit it, so jit it yourself (`norms` and the others are).
        batches: a sequence, whose completed batches are not read again; or an iterable that starts from the beginning,
            whose completed batches are skipped.
        folder: folder for the files, one for each name in rows, and the state; it is created if it does not exist. Only
            one run may use it at a time.
        every: number of batches per commit; use more for large sums, which are written at every commit.
        progress: True shows a progress bar (needs rich).

    Returns:
        `Results`; the rows are memory-mapped and not read.

    Raises:
        TypeError: a batch that is not a tuple.
        ValueError: rows or sums whose names, shapes or dtypes differ from those in the folder; rows of different
            lengths; `every` below 1.

    Example:
        >>> import tempfile
        >>> each = norms(lambda w, x: jnp.sin(w @ x), jnp.ones(3))
        >>> results = run(each, Batches(np.eye(3), size=2), tempfile.mkdtemp())
        >>> results.rows["norms"].shape, bool(np.allclose(results.rows["norms"], np.cos(1))), results.batches
        ((3,), True, 2)
    """
    if operator.index(every) < 1:
        raise ValueError(f"{called()}: expected to commit every 1 or more batches, got {every}.")
    store = _Store(Path(folder))
    waiting = 0
    for batch in shown(_from(batches, store.batches), _length(batches), store.batches, progress):
        store.add(function(*checked_batch("a batch", batch)))
        waiting += 1
        if waiting == every:
            store.commit()
            waiting = 0
    if waiting:
        store.commit()
    return store.results()


def norms(loss: Callable[..., Any], params: PyTree, *, in_axes: Any = 0) -> Callable[..., Part]:
    """Return a function for `run` with rows "values", the losses, and "norms", the norms of their gradients.

    Args:
        loss: loss of one example, as in `per_example_grad`.
        params: parameters at which to take the gradients.
        in_axes: as in `per_example_grad`.

    Example:
        >>> each = norms(lambda w, x: jnp.sin(w @ x), jnp.ones(3))
        >>> {name: rows.shape for name, rows in each(jnp.eye(3)).rows.items()}
        {'values': (3,), 'norms': (3,)}
    """
    transformed = jax.jit(lambda params, batch: _values_and_norms(loss, in_axes, params, batch))

    def part(*batch: Any) -> Part:
        values, lengths = transformed(params, batch)
        return Part({"values": values, "norms": lengths}, {})

    return part


def _values_and_norms(loss: Any, in_axes: Any, params: PyTree, batch: Any) -> Any:
    values, g = per_example_value_and_grad(loss, in_axes=in_axes)(params, *batch)
    return values, g.norms()


def second_moments(loss: Callable[..., Any], params: PyTree, *, in_axes: Any = 0) -> Callable[..., Part]:
    """Return a function for `run` that sums the gradients and their squares, entry by entry.

    The names in sums are "sum" or "squares" followed by the parameter's path. Squares are summed in float32 or wider,
    whatever the parameters' dtype.

    Args:
        loss, params, in_axes: as in `norms`.

    Example:
        >>> each = second_moments(lambda p, x: jnp.sin(p["w"] @ x), {"w": jnp.ones(3)})
        >>> {path: total.shape for path, total in each(jnp.eye(3)).sums.items()}
        {"squares['w']": (3,), "sum['w']": (3,)}
    """

    @jax.jit
    def sums(params: PyTree, batch: Any) -> Any:
        g = per_example_grad(loss, in_axes=in_axes)(params, *batch)
        squares = jax.tree.map(lambda a: a * g.batch_size, g.second_moment())
        return {"sum": g.sum(rounded=False), "squares": squares}

    def part(*batch: Any) -> Part:
        leaves = jax.tree_util.tree_leaves_with_path(sums(params, batch))
        return Part({}, {path[0].key + jax.tree_util.keystr(path[1:]): leaf for path, leaf in leaves})

    return part


def influence(
    loss: Callable[..., Any], params: PyTree, fixed: PerExampleGrads, *, in_axes: Any = 0
) -> Callable[..., Part]:
    """Return a function for `run` with rows "products": inner products of every gradient with a fixed set of gradients.

    Args:
        loss, params, in_axes: as in `norms`.
        fixed: gradients of M examples with respect to the same parameters; rows are [b, M].

    Example:
        >>> loss, w = lambda w, x: jnp.sin(w @ x), jnp.ones(3)
        >>> each = influence(loss, w, fixed=per_example_grad(loss)(w, jnp.eye(3)))
        >>> each(jnp.ones((5, 3))).rows["products"].shape
        (5, 3)
    """
    gram = jax.jit(lambda params, fixed, batch: per_example_grad(loss, in_axes=in_axes)(params, *batch).gram(fixed))
    return lambda *batch: Part({"products": gram(params, fixed, batch)}, {})


# --- Files on disk ---------------------------------------------------------------------------------------------------


class _Store:
    """The files of a run: one flat file of rows per name, and the state, which holds the counts and the sums."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.batches, self.examples = folder, 0, 0
        self.layout: dict[str, tuple[str, tuple[int, ...]]] | None = None  # dtype and shape of each row
        self.sums: dict[str, np.ndarray] = {}
        if (folder / STATE).exists():
            with np.load(folder / STATE) as state:
                told = json.loads(str(state["state"]))
                self.sums = {name: state[f"sum {name}"] for name in told["sums"]}
            self.batches, self.examples = told["batches"], told["examples"]
            self.layout = {name: (dtype, tuple(shape)) for name, (dtype, shape) in told["rows"].items()}
        for name, (dtype, shape) in (self.layout or {}).items():
            os.truncate(self._file(name), self.examples * _bytes(dtype, shape))
        self.pending: dict[str, list[bytes]] = {}

    def add(self, part: Part) -> None:
        rows = {name: _on_disk(a) for name, a in part.rows.items()}
        sums = {name: np.asarray(a, np.float64) for name, a in part.sums.items()}
        layout = {name: (a.dtype.str, a.shape[1:]) for name, a in rows.items()}
        lengths = {len(a) for a in rows.values()}
        if len(lengths) > 1:
            raise ValueError(f"{called()}: expected rows of one length, got {sorted(lengths)}.")
        if strange := [name for name in rows if Path(name).name != name]:
            raise ValueError(f"{called()}: expected names of rows that are valid names of files, got {strange}.")
        if self.layout is None:
            self.layout, self.sums = layout, {name: np.zeros_like(a) for name, a in sums.items()}
            for name in layout:
                self._file(name).write_bytes(b"")
        shapes = {name: a.shape for name, a in self.sums.items()}
        if layout != self.layout or {name: a.shape for name, a in sums.items()} != shapes:
            got = {name: a.shape for name, a in sums.items()}
            raise ValueError(
                f"{called()}: expected rows {self.layout} and sums {shapes} as in {self.folder}, "
                f"got rows {layout} and sums {got}. Another run's results are in that folder."
            )
        for name, a in rows.items():
            self.pending.setdefault(name, []).append(a.tobytes())
        self.sums = {name: self.sums[name] + a for name, a in sums.items()}
        self.batches, self.examples = self.batches + 1, self.examples + (lengths.pop() if lengths else 0)

    def commit(self) -> None:
        """Write the rows first, then the state that counts them."""
        for name, blocks in self.pending.items():
            with self._file(name).open("ab") as file:
                file.writelines(blocks)
                _flush(file)
        self.pending = {}
        told = {"batches": self.batches, "examples": self.examples, "rows": self.layout, "sums": list(self.sums)}
        new = self.folder / f"{STATE}.new"
        with new.open("wb") as file:
            np.savez(
                file,
                allow_pickle=False,
                state=np.array(json.dumps(told)),
                **{f"sum {n}": a for n, a in self.sums.items()},
            )
            _flush(file)
        new.replace(self.folder / STATE)

    def results(self) -> Results:
        rows: dict[str, np.ndarray] = {}
        for name, (dtype, shape) in (self.layout or {}).items():
            whole = (self.examples, *shape)
            empty = self.examples * _bytes(dtype, shape) == 0  # nothing to map
            rows[name] = np.zeros(whole, dtype) if empty else np.memmap(self._file(name), dtype, "r", shape=whole)
        return Results(rows, self.sums, self.batches, self.examples)

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.rows"


def _on_disk(a: Any) -> np.ndarray:
    """Convert to NumPy; bfloat16 becomes float32, which NumPy's files can hold."""
    return np.asarray(a.astype(jnp.float32) if jnp.result_type(a) == jnp.bfloat16 else a)


def _bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return int(np.dtype(dtype).itemsize * functools.reduce(operator.mul, shape, 1))


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


# --- Batches --------------------------------------------------------------------------------------------------------


def _from(batches: Iterable[tuple[Any, ...]], start: int) -> Iterator[tuple[Any, ...]]:
    if isinstance(batches, Sequence):
        return (batches[k] for k in range(start, len(batches)))
    return islice(iter(batches), start, None)


def _length(batches: Iterable[Any]) -> int | None:
    return len(batches) if isinstance(batches, Sequence) else None
