"""The files of a run on disk."""

import functools
import json
import operator
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxgrad.errors import caller

STATE = "state.npz"


class Store:
    """The files of a run: one file of raw rows per name, and the state, which holds the counts and the sums.

    Opening a store truncates rows that the state does not count.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.batches, self.examples = folder, 0, 0
        self.layout: dict[str, tuple[str, tuple[int, ...]]] | None = None  # dtype and shape of each row
        self.sums: dict[str, np.ndarray] = {}
        if (folder / STATE).exists():
            with np.load(folder / STATE) as state:
                counts = json.loads(str(state["state"]))
                self.sums = {name: state[f"sum {name}"] for name in counts["sums"]}
            self.batches, self.examples = counts["batches"], counts["examples"]
            self.layout = {name: (dtype, tuple(shape)) for name, (dtype, shape) in counts["rows"].items()}
        for name, (dtype, shape) in (self.layout or {}).items():
            os.truncate(self._file(name), self.examples * _bytes(dtype, shape))
        self.pending: dict[str, list[bytes]] = {}

    def add(self, batch_rows: Mapping[str, Any], batch_sums: Mapping[str, Any]) -> None:
        """Add the rows and sums of one batch; `commit` writes them.

        Raises:
            ValueError: rows have different lengths; a name is not a valid name of a file; or the names, shapes or
                dtypes are not those of the earlier batches.
        """
        rows = {name: _as_stored(a) for name, a in batch_rows.items()}
        sums = {name: np.asarray(a, np.float64) for name, a in batch_sums.items()}
        layout = {name: (a.dtype.str, a.shape[1:]) for name, a in rows.items()}
        lengths = {len(a) for a in rows.values()}
        if len(lengths) > 1:
            raise ValueError(f"{caller()}: expected rows of one length, got {sorted(lengths)}.")
        if invalid := [name for name in rows if Path(name).name != name]:
            raise ValueError(f"{caller()}: expected names of rows that are valid names of files, got {invalid}.")
        if self.layout is None:
            self.layout, self.sums = layout, {name: np.zeros_like(a) for name, a in sums.items()}
            for name in layout:
                self._file(name).write_bytes(b"")
        shapes = {name: a.shape for name, a in self.sums.items()}
        if layout != self.layout or {name: a.shape for name, a in sums.items()} != shapes:
            got = {name: a.shape for name, a in sums.items()}
            raise ValueError(
                f"{caller()}: expected rows {self.layout} and sums {shapes} as in {self.folder}, "
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
        counts = {"batches": self.batches, "examples": self.examples, "rows": self.layout, "sums": list(self.sums)}
        new = self.folder / f"{STATE}.new"
        with new.open("wb") as file:
            np.savez(
                file,
                allow_pickle=False,
                state=np.array(json.dumps(counts)),
                **{f"sum {n}": a for n, a in self.sums.items()},
            )
            _flush(file)
        new.replace(self.folder / STATE)

    def rows(self) -> dict[str, np.ndarray]:
        """The rows, memory-mapped."""
        rows: dict[str, np.ndarray] = {}
        for name, (dtype, shape) in (self.layout or {}).items():
            shape_on_disk = (self.examples, *shape)
            if self.examples * _bytes(dtype, shape) == 0:  # an empty file cannot be mapped
                rows[name] = np.zeros(shape_on_disk, dtype)
            else:
                rows[name] = np.memmap(self._file(name), dtype, "r", shape=shape_on_disk)
        return rows

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.rows"


def _as_stored(a: Any) -> np.ndarray:
    """Convert to NumPy; bfloat16 becomes float32, because NumPy's files cannot hold it."""
    return np.asarray(a.astype(jnp.float32) if jnp.result_type(a) == jnp.bfloat16 else a)


def _bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return int(np.dtype(dtype).itemsize * functools.reduce(operator.mul, shape, 1))


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
