"""The files of a run on disk: rows of every example, sums, and a manifest that says how much of them is committed.

    manifest.json     what is committed, with checksums of itself, of the sums and of every block of rows
    NAME.rows         the rows of all examples, one after another
    sums-N.npz        the sums over the first N batches, if there are any

A commit appends rows, writes the new sums beside the old ones, and then replaces the manifest in one step. What a
manifest does not count was written by a commit that did not finish, and is dropped when the run continues.
"""

import hashlib
import io
import json
import math
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxgrad.errors import caller
from jaxgrad.progress import counted

MANIFEST = "manifest.json"
FORMAT = "jaxgrad rows 1"
BLOCK_BYTES = 2**24
"""How many bytes of rows share a checksum, at most; at least one row."""


class Rows(NamedTuple):
    """One file of rows.

    Attributes:
        dtype: its dtype as NumPy writes it, or a name: "bfloat16".
        shape: the shape of one row.
        checksums: the CRC-32 of each block; the last block may have fewer rows.
    """

    dtype: str
    shape: tuple[int, ...]
    checksums: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of one row."""
        return int(jnp.dtype(self.dtype).itemsize * math.prod(self.shape))

    @property
    def block(self) -> int:
        """Rows of a whole block."""
        return max(1, BLOCK_BYTES // max(1, self.nbytes))

    def extended(self, data: bytes, offset: int) -> "Rows":
        """With the checksums of the rows in `data` too, which follow this many bytes of rows."""
        checksums, view = list(self.checksums), memoryview(data)
        size = max(1, self.block * self.nbytes)
        if room := -offset % size:  # the last block is not full
            checksums[-1] = zlib.crc32(view[:room], checksums[-1])
        checksums += [zlib.crc32(view[k : k + size]) for k in range(room, len(view), size)]
        return self._replace(checksums=tuple(checksums))


class Manifest(NamedTuple):
    """What is committed.

    Attributes:
        batches, examples: how many.
        rows: name → its file.
        sums: (name of a file, its SHA-256); None if there are no sums.
    """

    batches: int = 0
    examples: int = 0
    rows: Mapping[str, Rows] | None = None
    sums: tuple[str, str] | None = None

    def written(self) -> bytes:
        """The bytes of the file, the only ones that `read` takes for this manifest."""
        rows = {name: dict(part._asdict(), block=part.block) for name, part in (self.rows or {}).items()}
        contents = {"format": FORMAT, **self._asdict(), "rows": rows}
        text = json.dumps(contents, sort_keys=True)
        checksum = hashlib.sha256(text.encode()).hexdigest()
        return json.dumps({"contents": contents, "sha256": checksum}, sort_keys=True, indent=1).encode() + b"\n"

    @staticmethod
    def read(path: Path) -> "Manifest":
        """Read a manifest.

        Raises:
            ValueError: the file does not hold what `written` returns.
        """
        data = path.read_bytes()
        try:
            contents = json.loads(data)["contents"]
            rows = {
                name: Rows(part["dtype"], tuple(part["shape"]), tuple(part["checksums"]))
                for name, part in contents["rows"].items()
            }
            sums = contents["sums"] and tuple(contents["sums"])
            manifest = Manifest(contents["batches"], contents["examples"], rows, sums)
            same = manifest.written() == data
        except (ValueError, TypeError, KeyError, AttributeError):
            same = False
        if not same:
            raise ValueError(
                f"{caller()}: expected a manifest of the format {FORMAT!r} with its checksum in {path}, got a file "
                f"that was damaged or written by something else. Restore it from a copy, or start in another folder."
            )
        return manifest


class Store:
    """The files of a run, to continue it: opening a store drops rows that the manifest does not count.

    Raises:
        ValueError: as in `opened`.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.committed, self.sums = folder, Manifest(), dict[str, np.ndarray]()
        if (folder / MANIFEST).exists():
            self.committed, self.sums = opened(folder)
        for name, part in (self.committed.rows or {}).items():
            os.truncate(_file(folder, name), self.committed.examples * part.nbytes)
        for path in folder.glob("sums-*.npz"):
            if self.committed.sums is None or path.name != self.committed.sums[0]:
                path.unlink()
        self.batches, self.examples = self.committed.batches, self.committed.examples
        self.layout = self.committed.rows
        self.pending: dict[str, list[bytes]] = {}

    def add(self, batch_rows: Mapping[str, Any], batch_sums: Mapping[str, Any]) -> None:
        """Add the rows and sums of one batch; `commit` writes them.

        Raises:
            ValueError: rows have different lengths; a name is not a valid name of a file; or the names, shapes or
                dtypes are not those of the earlier batches.
        """
        rows = {name: np.asarray(a) for name, a in batch_rows.items()}
        sums = {name: np.asarray(a, np.float64) for name, a in batch_sums.items()}
        layout = {name: Rows(_dtype_name(a), a.shape[1:]) for name, a in rows.items()}
        lengths = {len(a) for a in rows.values()}
        if len(lengths) > 1:
            raise ValueError(f"{caller()}: expected rows of one length, got {sorted(lengths)}.")
        if invalid := [name for name in rows if Path(name).name != name]:
            raise ValueError(f"{caller()}: expected names of rows that are valid names of files, got {invalid}.")
        if self.layout is None:
            self.layout, self.sums = layout, {name: np.zeros_like(a) for name, a in sums.items()}
            for name in layout:
                _file(self.folder, name).write_bytes(b"")
        shapes = {name: a.shape for name, a in self.sums.items()}
        expected = {name: part._replace(checksums=()) for name, part in self.layout.items()}
        if layout != expected or {name: a.shape for name, a in sums.items()} != shapes:
            got = {name: a.shape for name, a in sums.items()}
            raise ValueError(
                f"{caller()}: expected rows {_shown(expected)} and sums {shapes} as in {self.folder}, "
                f"got rows {_shown(layout)} and sums {got}. Another run's results are in that folder."
            )
        for name, a in rows.items():
            self.pending.setdefault(name, []).append(a.tobytes())
        self.sums = {name: self.sums[name] + a for name, a in sums.items()}
        self.batches, self.examples = self.batches + 1, self.examples + (lengths.pop() if lengths else 0)

    def commit(self) -> None:
        """Write the rows and the sums first, then the manifest that counts them."""
        layout = dict(self.layout or {})
        for name, blocks in self.pending.items():
            offset = self.committed.examples * layout[name].nbytes
            for data in blocks:
                layout[name] = layout[name].extended(data, offset)
                offset += len(data)
            _write(_file(self.folder, name), blocks, "ab")
        sums = None
        if self.sums:
            file = io.BytesIO()
            np.savez(file, allow_pickle=False, **self.sums)  # type: ignore[arg-type]
            data = file.getvalue()
            sums = f"sums-{self.batches}.npz", hashlib.sha256(data).hexdigest()
            _write(self.folder / sums[0], [data])
        manifest = Manifest(self.batches, self.examples, layout, sums)
        new = self.folder / f"{MANIFEST}.new"
        _write(new, [manifest.written()])
        new.replace(self.folder / MANIFEST)
        before, self.committed, self.layout, self.pending = self.committed.sums, manifest, layout, {}
        if before is not None and sums is not None and before[0] != sums[0]:
            (self.folder / before[0]).unlink()


def opened(folder: Path) -> tuple[Manifest, dict[str, np.ndarray]]:
    """(the manifest, the sums) of a folder, after checks of both and of the sizes of all files.

    Raises:
        ValueError: the manifest is missing or damaged, files are missing or shorter than it says, or sums are damaged.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise ValueError(f"{caller()}: expected a folder that streams.run wrote, got {folder} without {MANIFEST}.")
    manifest = Manifest.read(path)
    for name, part in (manifest.rows or {}).items():
        file, expected = _file(folder, name), manifest.examples * part.nbytes
        got = file.stat().st_size if file.exists() else 0
        if got < expected or not file.exists():
            raise ValueError(
                f"{caller()}: expected {expected} bytes of committed rows in {file}, got {got}. The file was cut off "
                f"or lost: restore it from a copy, or run again in another folder."
            )
    if manifest.sums is None:
        return manifest, {}
    name, checksum = manifest.sums
    data = (folder / name).read_bytes() if (folder / name).exists() else b""
    if hashlib.sha256(data).hexdigest() != checksum:
        raise ValueError(f"{caller()}: expected the sums of {path} in {folder / name}, got a file that was damaged.")
    with np.load(io.BytesIO(data)) as file:
        return manifest, dict(file)


def mapped(folder: Path, manifest: Manifest) -> dict[str, np.ndarray]:
    """The committed rows, memory-mapped."""
    rows: dict[str, np.ndarray] = {}
    for name, part in (manifest.rows or {}).items():
        shape, dtype = (manifest.examples, *part.shape), jnp.dtype(part.dtype)
        if manifest.examples * part.nbytes == 0:  # an empty file cannot be mapped
            rows[name] = np.zeros(shape, dtype)
        else:
            rows[name] = np.memmap(_file(folder, name), dtype, "r", shape=shape)
    return rows


def check_blocks(folder: Path, manifest: Manifest, progress: bool) -> None:
    """Read all committed rows and compare the checksum of every block.

    Raises:
        ValueError: the checksum of a block is not the one in the manifest.
    """
    blocks = [(name, part, k) for name, part in (manifest.rows or {}).items() for k in range(len(part.checksums))]
    for name, part, k in counted(blocks, len(blocks), progress=progress):
        start, stop = k * part.block, min((k + 1) * part.block, manifest.examples)
        with _file(folder, name).open("rb") as file:
            file.seek(start * part.nbytes)
            data = file.read((stop - start) * part.nbytes)
        if zlib.crc32(data) != part.checksums[k]:
            raise ValueError(
                f"{caller()}: expected rows {start} to {stop - 1} of {_file(folder, name)} with the checksum that they "
                f"were written with, got others. The file was damaged: restore it from a copy."
            )


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.rows"


def _dtype_name(a: np.ndarray) -> str:
    """NumPy's name with the byte order; NumPy has none for bfloat16."""
    return a.dtype.name if a.dtype.kind == "V" or a.dtype.str[1] == "V" else a.dtype.str


def _shown(rows: Mapping[str, Rows]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (part.dtype, part.shape) for name, part in rows.items()}


def _write(path: Path, blocks: Sequence[bytes], mode: str = "wb") -> None:
    """Write the blocks and wait until they are on disk."""
    with path.open(mode) as file:
        file.writelines(blocks)
        file.flush()
        os.fsync(file.fileno())
