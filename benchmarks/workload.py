"""What a theme declares: its rows, each a few functions that compute the same thing, and its table."""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import chex


def same(result: Any) -> Any:
    """All of a result is comparable."""
    return result


def close(ours: Any, theirs: Any) -> None:
    """Number by number, in float32."""
    chex.assert_trees_all_close(ours, theirs, rtol=2e-3, atol=1e-4)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the command line says.

    Attributes:
        seconds: for each row.
        only: a theme's name, or a word in a row's name.
        small: sizes that any machine holds.
        largest: how many bytes one function may write out.
        row_seconds, deadline: when a row, and all of it, is to be over; what has not begun by then is skipped.
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
        """Whether a row is to be measured; rows that are costly to build ask first."""
        return self.only == theme or self.only in row

    def time_left(self, row_began: float | None = None) -> bool:
        """Whether there is time for one more function, of the row that began then."""
        now = time.monotonic()
        return now < self.deadline and (row_began is None or now - row_began < self.row_seconds)


@dataclasses.dataclass(frozen=True)
class Workload:
    """One row of a table.

    Attributes:
        name: with the shapes.
        functions: by column, called with `arguments`; or a word that says why there is none ("not installed").
        arguments: of all of them.
        agree: the columns that are held to agree before anything is timed, each with what is comparable of its result.
        compare: (reference, other) → AssertionError where they differ.
        goal: for the ratio of the column that the theme is about.
        unit: the column that is 1.00.
        sample: smaller arguments, to hold those columns to agree that do not fit on `arguments`.
        writes: the bytes that a column writes out at least; more than `Settings.largest` does not fit.
        apart: columns that are timed after the others: they take so long, and so much memory, that they disturb.
        section: rows of one section stand in one table, under this heading.
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
        """`agree`, with the whole result where nothing is said."""
        return dict(self.agree) if isinstance(self.agree, Mapping) else dict.fromkeys(self.agree, same)


@dataclasses.dataclass
class Row:
    """What was measured of a workload: by column, or the word that stands there instead."""

    name: str
    section: str = ""
    goal: float | None = None
    unit: str = "plain"
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    shapes: str = ""
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    bytes: dict[str, int] = dataclasses.field(default_factory=dict)  # temporary memory, at its peak
    compiling: dict[str, float] = dataclasses.field(default_factory=dict)
    costs: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)  # operations, bytes, the roofline
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    lines: list[str] = dataclasses.field(default_factory=list)  # what the theme's note says of this row
    failed: str = ""  # why this row is wrong, if it is: the command ends with it once the others are measured

    def best(self, name: str) -> str:
        """The column itself, or the fastest of those that are called so and something more."""
        several = [column for column in self.seconds if column.startswith(f"{name} ")]
        return min(several, key=self.seconds.__getitem__, default=name) if name not in self.seconds else name


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of a table: its heading, and a row's cell."""

    title: str
    cell: Callable[[Row], str]


@dataclasses.dataclass(frozen=True)
class Theme:
    """One table, or several sections of one.

    Attributes:
        name: what `--only` calls it, and its file.
        title: of the file.
        about: what is measured, and how to read it.
        columns: of the table.
        workloads: its rows.
        measure: (workload, settings) → the rows to print; None for the usual way, `benchmarks.measure.measure`.
        note: what stands below the table, or what makes it of the rows.
    """

    name: str
    title: str
    about: str
    columns: Sequence[Column]
    workloads: Callable[[Settings], Iterable[Workload]]
    measure: Callable[[Workload, Settings], Iterable[Row]] | None = None
    note: str | Callable[[Sequence[Row]], str] = ""
