"""The files that the main job writes: per-example results and a plot. A file appears complete or not at all."""

import contextlib
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd

from jaxgrad.agreement import AgreementReport
from jaxgrad.exercise.job.data import Data, InputError
from jaxgrad.exercise.job.evaluation import PerExample

TABLE_SUFFIXES = (".csv", ".npz")
PLOT_SUFFIXES = (".png",)


def check_writable(path: Path | None, suffixes: tuple[str, ...], option: str) -> None:
    """Refuse a path that cannot be written, before any work is done for it."""
    if path is None:
        return
    if path.suffix.lower() not in suffixes:
        raise InputError(f"{option} {path}: expected a file name ending in {' or '.join(suffixes)}")
    target = Path(os.path.realpath(path))
    try:
        if not target.parent.is_dir():
            raise InputError(f"{option} {path}: there is no folder {target.parent}")
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG(target.stat().st_mode):
                raise InputError(f"{option} {path}: cannot be written: it exists and is not a file")
    except OSError as error:  # such as a name that is too long
        raise InputError(f"{option} {path}: cannot be written: {error.strerror or error}") from error
    if not os.access(target.parent, os.W_OK):
        raise InputError(f"{option} {path}: cannot be written")


def check_distinct(paths: dict[str, Path | None]) -> None:
    """Refuse to write an output over the input or over the other output; `paths` maps options to paths."""
    options: dict[str, str] = {}
    for option, path in paths.items():
        if path is None:
            continue
        other = options.setdefault(os.path.realpath(path), option)
        if other != option:
            raise InputError(f"{option} {path}: the same file as {other}")


def save(path: Path, data: Data, results: PerExample) -> None:
    """Write one row per example: its label, y, margin, loss, gradient norms and their difference."""
    columns = {"example": np.arange(len(data.Y)), "label": data.labels, "y": data.Y, **results._asdict()}
    if columns["label"].dtype == object:
        columns["label"] = columns["label"].astype(str)

    def write(file: IO[bytes]) -> None:
        if path.suffix.lower() == ".csv":
            pd.DataFrame(columns).to_csv(file, index=False)
        else:
            np.savez(file, **columns)

    _write_whole(path, write)


def plot(path: Path, losses: np.ndarray, results: PerExample, report: AgreementReport) -> None:
    """Plot three panels: the loss curve, the distribution of gradient norms, and agreement by leaf."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3)

    axes[0].plot(losses)
    axes[0].set(title="Training", xlabel="step", ylabel="mean loss", yscale="log")

    norms = results.grad_norm[results.grad_norm > 0]
    if len(norms):
        low, high = np.log10(norms.min()), np.log10(norms.max())
        axes[1].hist(norms, bins=np.logspace(low - 0.1, high + 0.1, 40))
    zero = len(results.grad_norm) - len(norms)
    axes[1].set(
        title="Per-example gradients" + (f" ({zero} zero)" if zero else ""),
        xlabel="norm",
        ylabel="examples",
        xscale="log",
    )

    leaves = [leaf for leaf in report.leaves if np.isfinite(leaf.max_rel)]
    axes[2].bar([leaf.path for leaf in leaves], [max(leaf.max_rel, 1e-18) for leaf in leaves])
    if leaves:
        axes[2].axhline(leaves[0].rtol, color="0.4", linestyle="--", label="tolerance")
        axes[2].legend()
    axes[2].set(title=f"Closed form against {report.reference}", ylabel="largest relative difference", yscale="log")

    _write_whole(path, lambda file: figure.savefig(file, format="png", dpi=150))


def _write_whole(path: Path, write: Callable[[Any], None]) -> None:
    """Write a file beside `path` and rename it, so that a crash or a full disk never leaves half a file at `path`."""
    target = Path(os.path.realpath(path))  # a link stays a link
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=".jaxgrad-")
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp makes it private
        os.replace(name, target)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        Path(name).unlink(missing_ok=True)
