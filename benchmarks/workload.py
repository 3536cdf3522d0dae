"""The types that a theme is declared with: its table and its rows, each a few functions that compute the same thing."""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import chex


def same(result: Any) -> Any:
    """The result itself: all of it is comparable."""
    return result


def close(ours: Any, theirs: Any) -> None:
    """Compare number by number, with tolerances for float32."""
    chex.assert_trees_all_close(ours, theirs, rtol=2e-3, atol=1e-4)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings from the command line.

    Attributes:
        seconds: time for each row.
        only: a theme's name, or a word in a row's name.
        small: whether to use sizes that fit on any machine.
        largest: how many bytes of gradients one function may materialize.
        row_seconds, deadline: the time limit of a row and the end of the run; what has not begun by then is skipped.
        torch_python: the interpreter that runs the peers.
    """

    seconds: float = 3.0
    only: str = ""
    small: bool = False
    largest: int = 2**31
    row_seconds: float = float("inf")
    deadline: float = float("inf")
    torch_python: str = sys.executable

    def wants(self, theme: str, row: str) -> bool:
        """Whether a row is to be measured. Themes with rows that are costly to build ask first."""
        return self.only == theme or self.only in row

    def time_left(self, row_began: float | None = None) -> bool:
        """Whether there is time for one more function of the row that began at `row_began`."""
        now = time.monotonic()
        return now < self.deadline and (row_began is None or now - row_began < self.row_seconds)


@dataclasses.dataclass(frozen=True)
class Workload:
    """One row of a table.

    Attributes:
        name: the name, with the shapes.
        functions: by column, called with `arguments`; or a word that says why there is none ("not installed").
        arguments: the arguments of all functions.
        agree: the columns that must agree before anything is timed, each with a function that takes the comparable part
            of its result.
        compare: a function (reference, other) that raises AssertionError if they differ.
        goal: the goal for the ratio of the column that the theme is about.
        unit: the column that is 1.00.
        sample: smaller arguments, to compare the columns that do not fit on `arguments`.
        writes: a lower bound on the bytes that a column materializes; more than `Settings.largest` does not fit.
        apart: columns that are timed after the others, because their time and memory would disturb the others.
        section: the heading of the table that the row is in; rows of one section are in one table.
        labels: further words for the table.
    """

    name: str
    functions: Mapping[str, Callable[..., Any] | str]
    arguments: tuple[Any, ...]
    agree: Mapping[str, Callable[[Any], Any]] | Sequence[str] = ()
    compare: Callable[[Any, Any], None] = close
    goal: float | None = None
    unit: str = "plain"
    sample: tuple[Any, ...] | None = None
    writes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    apart: Sequence[str] = ()
    section: str = ""
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def comparable(self) -> dict[str, Callable[[Any], Any]]:
        """`agree`, with the whole result for a column that names no part."""
        return dict(self.agree) if isinstance(self.agree, Mapping) else dict.fromkeys(self.agree, same)


@dataclasses.dataclass
class Row:
    """The measurements of a workload, by column; or the word that replaces them."""

    name: str
    section: str = ""
    goal: float | None = None
    unit: str = "plain"
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    shapes: str = ""
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    bytes: dict[str, int] = dataclasses.field(default_factory=dict)  # peak temporary memory
    compiling: dict[str, float] = dataclasses.field(default_factory=dict)
    costs: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)  # operations, bytes, the roofline
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    lines: list[str] = dataclasses.field(default_factory=list)  # what the theme's note says about this row
    failed: str = ""  # why this row is wrong, if it is; the command fails with it at the end

    def best(self, name: str) -> str:
        """The column with this name, or the fastest of the columns whose names start with it."""
        several = [column for column in self.seconds if column.startswith(f"{name} ")]
        return min(several, key=self.seconds.__getitem__, default=name) if name not in self.seconds else name


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of a table: its heading, and the function that gives a row's cell."""

    title: str
    cell: Callable[[Row], str]


@dataclasses.dataclass(frozen=True)
class Theme:
    """One table, or several sections of one.

    Attributes:
        name: its name for `--only` and for its file.
        title: the heading of the file.
        about: what is measured, and how to read it.
        columns: the columns of the table.
        workloads: a function of the settings that gives its rows.
        measure: a function (workload, settings) that returns the rows to print; None for `benchmarks.measure.measure`.
        note: the text below the table, or a function that makes it from the rows.
        timed: whether functions are called and timed.
    """

    name: str
    title: str
    about: str
    columns: Sequence[Column]
    workloads: Callable[[Settings], Iterable[Workload]]
    measure: Callable[[Workload, Settings], Iterable[Row]] | None = None
    note: str | Callable[[Sequence[Row]], str] = ""
    timed: bool = True
