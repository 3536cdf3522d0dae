"""The printed output of the main job."""

from collections.abc import Iterable

import numpy as np
from rich import box
from rich.console import Console, RenderableType
from rich.table import Table

from jaxgrad.exercise.job.data import InputError
from jaxgrad.exercise.job.evaluation import PerExample, Timing

_LARGEST = 5


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise  # re-raises the BrokenPipeError; rich would exit with status 1, which means that gradients disagree


def console() -> Console:
    """Make a console that shows labels and file names unchanged, brackets and colons included."""
    return _Console(highlight=False, markup=False, emoji=False, soft_wrap=True)


def show(console: Console, parts: Iterable[RenderableType]) -> None:
    """Print all parts.

    Raises:
        InputError: standard output cannot be written.
    """
    try:
        for part in parts:
            console.print(part)
    except OSError as error:
        raise InputError(f"standard output: {error.strerror or error}") from error


def clock(times: dict[str, Timing]) -> Table:
    """Make a table of the time that each computation takes."""
    table = Table("all gradients by", "compile and first call", "later calls (median)", box=box.SIMPLE_HEAD)
    for name, timing in times.items():
        table.add_row(name, f"{timing.first * 1e3:.1f} ms", f"{timing.later * 1e3:.2f} ms")
    return table


def largest(labels: np.ndarray, results: PerExample) -> Table:
    """Make a table of the examples with the largest gradients."""
    table = Table("largest gradients", "label", "margin", "loss", "norm", box=box.SIMPLE_HEAD)
    for i in np.argsort(-results.grad_norm, kind="stable")[:_LARGEST]:
        numbers = (f"{v[i]:.4g}" for v in (results.margin, results.loss, results.grad_norm))
        table.add_row(f"example {i}", str(labels[i]), *numbers)
    return table
