"""Load a two-class table: the breast-cancer data that scikit-learn ships, a CSV file, or an NPZ file."""

import math
import reprlib
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import StandardScaler

from jaxgrad.exercise import signs

LABEL_NAMES = ("label", "labels", "target", "class", "diagnosis", "y")
FEATURE_NAMES = ("X", "x", "data", "features")


class InputError(Exception):
    """Bad input; the message is one line that says what to do."""


class Data(NamedTuple):
    """A table of examples of two classes.

    Attributes:
        X: [n, D], standardized features.
        labels: [n], the labels as given.
        Y: [n], the labels as ±1.
        name: the name of the data.
        left_out: a note on an omitted column; empty if there is none.
    """

    X: Float[np.ndarray, "n D"]
    labels: np.ndarray
    Y: Float[np.ndarray, " n"]
    name: str
    left_out: str = ""


def load(path: Path | None, label: str | None) -> Data:
    """Load a file or, if `path` is None, the breast-cancer data (569 × 30, benign = -1).

    Every column is standardized to mean 0 and variance 1 (a constant column becomes 0).

    Raises:
        InputError: anything that is wrong with the file.
    """
    if path is None:
        if label is not None:
            raise InputError("--label names a column of --data FILE, and no file was given")
        bunch = load_breast_cancer()
        return _finished(bunch.data, np.asarray(bunch.target_names)[bunch.target], "breast cancer (scikit-learn)")
    try:
        if not path.exists():
            raise InputError(f"{path}: no such file")
        if not path.is_file():
            raise InputError(f"{path}: not a file")
        if path.stat().st_size == 0:
            raise InputError(f"{path}: the file is empty")
        readers = {".csv": _read_csv, ".npz": _read_npz}
        if path.suffix.lower() not in readers:
            raise InputError(f"{path}: expected a .csv or .npz file")
        X, labels, left_out = readers[path.suffix.lower()](path, label)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    return _finished(X, labels, path.name, path)._replace(left_out=left_out)


def _read_csv(path: Path, label: str | None) -> tuple[np.ndarray, np.ndarray, str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            header = pd.read_csv(
                path, encoding="utf-8-sig", header=None, nrows=1, dtype=str, keep_default_na=False
            ).iloc[0]
            table = pd.read_csv(path, encoding="utf-8-sig", index_col=False, low_memory=False)
    except pd.errors.EmptyDataError as error:
        raise InputError(f"{path}: the file is empty") from error
    except (pd.errors.ParserError, pd.errors.ParserWarning, UnicodeDecodeError, ValueError) as error:
        raise InputError(f"{path}: not a table with a header: {_one_line(error)}") from error
    columns = [str(column) for column in table.columns]
    table.columns = pd.Index(columns)
    if all(_is_number(column) for column in columns):
        raise InputError(f"{path}: the first line has to name the columns; it holds numbers: {_listed(columns)}")
    twice = header[header.duplicated() & (header != "")]  # pandas would rename the second
    if len(twice):
        raise InputError(f"{path}: several columns have the same name: {_listed(list(twice.unique()))}")
    name = _choose(path, columns, label, LABEL_NAMES, "label column", "--label COLUMN")
    if table.empty:
        raise InputError(f"{path}: there are no rows below the header")
    missing = table[name].isna().to_numpy()
    if missing.any():
        raise InputError(f"{path}: missing label: column '{name}' is empty or NA in {_row(missing.argmax())}")
    features, left_out = table.drop(columns=name), ""
    if header.iloc[0] == "" and columns[0] != name and _counts_rows(table.iloc[:, 0]):  # pandas writes its index so
        features, left_out = features.drop(columns=columns[0]), "without the first column, which counts the rows"
    if features.shape[1] == 0:
        raise InputError(f"{path}: there is no column besides the label '{name}'")
    X = np.empty(features.shape)
    for j, column in enumerate(features.columns):
        values = _numbers(features[column])
        not_numeric = (values.isna() & features[column].notna()).to_numpy()
        if not_numeric.any():
            row = int(not_numeric.argmax())
            cell = reprlib.repr(features[column].iloc[row])
            raise InputError(f"{path}: column '{column}' is not numeric: {_row(row)} holds {cell}")
        X[:, j] = values.to_numpy(dtype=float)
    _refuse_non_finite(path, X, list(features.columns), _row)
    return X, table[name].to_numpy(), left_out


def _counts_rows(column: "pd.Series[Any]") -> bool:
    """Whether the column numbers the rows: its integers are consecutive in any order, or ascending with gaps."""
    if column.dtype.kind not in "iu":
        return False
    steps, sorted_steps = np.diff(column.to_numpy()), np.diff(np.sort(column.to_numpy()))
    return bool((steps > 0).all() or (sorted_steps == 1).all())


def _numbers(cells: "pd.Series[Any]") -> "pd.Series[Any]":
    """Convert cells to numbers: a cell that is not a number becomes NaN, one too large for float64 infinite."""
    try:
        return pd.to_numeric(cells, errors="coerce")
    except OverflowError:  # a Python integer of hundreds of digits; its text is read as infinite
        return pd.to_numeric(cells.astype(str), errors="coerce")


def _row(index: Any) -> str:
    return f"data row {int(index) + 1} (blank lines not counted)"


def _read_npz(path: Path, label: str | None) -> tuple[np.ndarray, np.ndarray, str]:
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):  # one array, as np.save writes it
            raise InputError(f"{path}: not an NPZ file but a single array; write it with np.savez(file, X=..., y=...)")
        with archive:
            arrays = {name: np.asarray(archive[name]) for name in archive.files}
    except (ValueError, RuntimeError, zipfile.BadZipFile, zlib.error, EOFError, KeyError, MemoryError) as error:
        raise InputError(f"{path}: not an NPZ file of plain arrays: {_one_line(error)}") from error
    key = _choose(path, list(arrays), label, LABEL_NAMES, "label array", "--label NAME")
    rest = [name for name in arrays if name != key]
    name = rest[0] if len(rest) == 1 else _choose(path, rest, None, FEATURE_NAMES, "feature array", "the name X")
    X, labels = arrays[name], arrays[key]
    if X.ndim != 2 or labels.shape != X.shape[:1]:
        raise InputError(
            f"{path}: expected {name} of shape [n, D] and {key} of shape [n], got {X.shape} and {labels.shape}"
        )
    if X.dtype.kind not in "biuf":
        raise InputError(f"{path}: {name} is not numeric: its dtype is {X.dtype}")
    if X.size == 0:
        raise InputError(f"{path}: {name} is empty: its shape is {X.shape}")
    if labels.dtype.kind == "f" and np.isnan(labels).any():
        raise InputError(f"{path}: missing label: {key} is NaN in row {int(np.isnan(labels).argmax()) + 1}")
    X = X.astype(float)
    _refuse_non_finite(path, X, [str(j + 1) for j in range(X.shape[1])], lambda i: f"row {int(i) + 1}")
    return X, labels, ""


def _choose(path: Path, names: list[str], chosen: str | None, usual: tuple[str, ...], what: str, option: str) -> str:
    """Return the user's choice among names or, without one, the only name that is usual."""
    if chosen is not None:
        if chosen not in names:
            raise InputError(f"{path}: there is no {what} '{chosen}'; there are {_listed(names)}")
        return chosen
    candidates = [name for name in names if name in usual or name.lower() in usual]
    if len(candidates) != 1:
        have = f"several could be it: {_listed(candidates)}" if candidates else f"there are {_listed(names)}"
        raise InputError(f"{path}: which is the {what}? {have}; say so with {option}")
    return candidates[0]


def _refuse_non_finite(path: Path, X: np.ndarray, columns: list[Any], named: Callable[[Any], str]) -> None:
    bad = ~np.isfinite(X)
    if bad.any():
        row, column = np.argwhere(bad)[0]
        what = "NaN or an empty cell" if np.isnan(X[row, column]) else "infinite or too large"
        more = f" ({int(bad.sum()) - 1} more such cells)" if bad.sum() > 1 else ""
        raise InputError(f"{path}: {what} in column '{columns[column]}', {named(row)}{more}")


def _finished(X: np.ndarray, labels: np.ndarray, name: str, path: Path | None = None) -> Data:
    try:
        Y = np.asarray(signs(labels))
    except ValueError as error:
        what = _one_line(error).removeprefix("signs: ").rpartition(". ")[0]  # the last sentence is for Python callers
        raise InputError(
            f"{path}: the label: {what}; keep the rows of two classes or choose another --label"
        ) from error
    if len(np.unique(Y)) < 2:  # all labels are the same boolean
        raise InputError(f"{path}: the label is constant: {labels[0]}")
    constant = X.min(0) == X.max(0)
    with np.errstate(all="ignore"):
        scaled = StandardScaler().fit_transform(np.where(constant, 0.0, X))
    # With mean 0 and variance 1 no number exceeds √n; if one does, something has overflowed.
    if not (np.abs(scaled) <= 1 + math.sqrt(len(X))).all():
        raise InputError(f"{path}: the numbers are too large to standardize; scale them first")
    return Data(scaled, labels, Y, name)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _listed(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f", … ({len(names)} in all)" if len(names) > 8 else "") or "none"


def _one_line(error: Exception | Warning) -> str:
    return " ".join(str(error).split())
