"""The types that describe a theme: its table, and its rows with the functions that each row compares."""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import chex


def identity(result: Any) -> Any:
    """The result itself, for functions whose whole result is compared."""
    return result


def close(reference: Any, other: Any) -> None:
    """Compare number by number, with tolerances for float32."""
    chex.assert_trees_all_close(reference, other, rtol=2e-3, atol=1e-4)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings from the command line.

    Attributes:
        seconds: how long each row is timed.
        only: the name of a theme, or a word in the names of rows.
        small: whether to use sizes that fit on any machine.
        largest: how many bytes of gradients one function may materialize.
        row_seconds, deadline: the time limit of a row and the end of the run. Functions that have not started by then
            are skipped.
        torch_python: the Python interpreter that runs the peers.
    """

    seconds: float = 3.0
    only: str = ""
    small: bool = False
    largest: int = 2**31
    row_seconds: float = float("inf")
    deadline: float = float("inf")
    torch_python: str = sys.executable

    def wants(self, theme: str, row: str) -> bool:
        """Whether to measure a row. Themes whose rows are costly to build call this first."""
        return self.only == theme or self.only in row

    def time_left(self, row_start: float | None = None) -> bool:
        """Whether there is time for one more function of the row that started at `row_start`."""
        now = time.monotonic()
        return now < self.deadline and (row_start is None or now - row_start < self.row_seconds)


@dataclasses.dataclass(frozen=True)
class Workload:
    """One row of a table.

    Attributes:
        name: the name, with the shapes.
        functions: by column, called with `arguments`. A string in place of a function says why there is none
            ("not installed").
        arguments: the arguments of all functions.
        agree: the columns whose results must agree before anything is timed, each with a function that extracts the
            part of the result to compare.
        compare: a function (reference, other) that raises AssertionError if they differ.
        goal: the goal for the ratio of the column that the theme is about.
        unit: the column that the others are divided by.
        sample: smaller arguments, on which the columns that do not fit on `arguments` are compared.
        materialized_bytes: a lower bound on the bytes of gradients that a column materializes. Columns with more than
            `Settings.largest` are skipped.
        timed_last: the columns that are timed after the others because their time and memory would disturb the others.
        section: the heading of the table that contains the row. Rows of one section are in one table.
        labels: further text for the table.
    """

    name: str
    functions: Mapping[str, Callable[..., Any] | str]
    arguments: tuple[Any, ...]
    agree: Mapping[str, Callable[[Any], Any]] | Sequence[str] = ()
    compare: Callable[[Any, Any], None] = close
    goal: float | None = None
    unit: str = "plain"
    sample: tuple[Any, ...] | None = None
    materialized_bytes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    timed_last: Sequence[str] = ()
    section: str = ""
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def comparable(self) -> dict[str, Callable[[Any], Any]]:
        """`agree` as a dict. The whole result is compared for columns that name no part."""
        return dict(self.agree) if isinstance(self.agree, Mapping) else dict.fromkeys(self.agree, identity)


@dataclasses.dataclass
class Row:
    """The measurements of a workload, by column."""

    name: str
    section: str = ""
    goal: float | None = None
    unit: str = "plain"
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    shapes: str = ""
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    bytes: dict[str, int] = dataclasses.field(default_factory=dict)  # peak temporary memory
    compiling: dict[str, float] = dataclasses.field(default_factory=dict)  # seconds
    costs: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)  # operations, bytes, the roofline
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)  # why a column has no measurement
    lines: list[str] = dataclasses.field(default_factory=list)  # this row's lines in the theme's note
    failed: str = ""  # why this row is wrong, if it is; the command then fails at its end

    def best(self, name: str) -> str:
        """The column with this name, or the fastest of the columns whose names start with it."""
        columns = [column for column in self.seconds if column.startswith(f"{name} ")]
        return min(columns, key=self.seconds.__getitem__, default=name) if name not in self.seconds else name


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of a table: its heading, and the function that returns a row's cell."""

    title: str
    cell: Callable[[Row], str]


@dataclasses.dataclass(frozen=True)
class Theme:
    """One table, or one table for each section.

    Attributes:
        name: the name for `--only` and of the theme's file.
        title: the heading of the file.
        about: what is measured, and how to read the table.
        columns: the columns of the table.
        workloads: a function of the settings that returns the rows.
        measure: a function (workload, settings) that returns the rows to print; None for `benchmarks.measure.measure`.
        note: the text below the table, or a function of the rows that returns it.
        timed: whether the functions are called and timed.
    """

    name: str
    title: str
    about: str
    columns: Sequence[Column]
    workloads: Callable[[Settings], Iterable[Workload]]
    measure: Callable[[Workload, Settings], Iterable[Row]] | None = None
    note: str | Callable[[Sequence[Row]], str] = ""
    timed: bool = True
