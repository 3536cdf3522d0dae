"""The columns of the tables, and the files: a Markdown file for each theme and one JSON file for all."""

import dataclasses
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.workload import Column, Row, Theme

RESULTS = "results.json"


def number(x: float) -> str:
    return f"{x:.2f}" if x < 10 else f"{x:.1f}" if x < 1000 else f"{x:.0f}"


def word(row: Row, name: str) -> str:
    """The word that replaces a missing number; empty if the row does not have this column."""
    return row.skipped.get(name) or next((w for k, w in row.skipped.items() if k.startswith(f"{name} ")), "")


def milliseconds(name: str, title: str = "") -> Column:
    def cell(row: Row) -> str:
        t = row.seconds.get(row.best(name))
        return word(row, name) if t is None else f"{t * 1e3:.3f}" if t < 1e-3 else number(t * 1e3)

    return Column(title or f"{name}, ms", cell)


def ratio(name: str, to: str = "", title: str = "") -> Column:
    """Ratio of times to the row's unit or another column. If several columns have this name, it takes the fastest."""

    def cell(row: Row) -> str:
        best, unit = row.best(name), row.best(to or row.unit)
        if best not in row.seconds or unit not in row.seconds:
            return word(row, name)
        which = f" ({best[len(name) + 1 :]})" if best != name and not to else ""
        return number(row.seconds[best] / row.seconds[unit]) + which

    return Column(title or name, cell)


def mebibytes(name: str, title: str = "") -> Column:
    def cell(row: Row) -> str:
        return number(row.bytes[name] / 2**20) if name in row.bytes else word(row, name)

    return Column(title or f"{name}, MiB", cell)


def memory(name: str, title: str = "") -> Column:
    """Ratio of temporary memory, to the row's unit."""

    def cell(row: Row) -> str:
        best = row.best(name)
        unit = row.bytes.get(row.unit, 0)
        return number(row.bytes[best] / unit) if best in row.seconds and best in row.bytes and unit else word(row, name)

    return Column(title or name, cell)


def compiling(name: str) -> Column:
    def cell(row: Row) -> str:
        known = name in row.compiling and row.unit in row.compiling
        return number(row.compiling[name] / row.compiling[row.unit]) if known else word(row, name)

    return Column(f"compiling, {name}", cell)


def label(key: str) -> Column:
    return Column(key, lambda row: row.labels.get(key, ""))


def goal() -> Column:
    return Column("goal", lambda row: "" if row.goal is None else f"{row.goal:.2f}")


def wordless(column: Column) -> Column:
    """A column that is empty in a row where another column shows a word in place of a number."""
    return Column(column.title, lambda row: "" if row.skipped else column.cell(row))


def header(columns: Sequence[Column], first: str) -> list[str]:
    return [line([first, *(c.title for c in columns)]), "|---" + "|---:" * len(columns) + "|"]


def line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def row_line(columns: Sequence[Column], row: Row) -> str:
    return line([row.name, *(c.cell(row) for c in columns)])


def in_words(environment: dict[str, Any]) -> str:
    named = [f"{k} {v}" for k, v in environment.items() if k not in ("device", "threads")]
    return f"{environment['device']}, {environment['threads']} threads, {', '.join(named)}"


def markdown(theme: Theme, rows: Sequence[Row], environment: dict[str, Any], command: str) -> str:
    """The text of the theme's Markdown file."""
    lines = [f"# {theme.title}", "", f"Written by `{command}`.", "", theme.about.strip(), ""]
    how = f"Medians of interleaved calls, {in_words(environment)}. Freed memory is kept (`benchmarks/timing.py`)."
    lines += [how if theme.timed else f"jax {environment['jax']}, Python {environment['Python']}."]
    for section, of_section in itertools.groupby(rows, key=lambda row: row.section):
        lines += ["", *([section, ""] if section else []), *header(theme.columns, " ")]
        lines += [row_line(theme.columns, row) for row in of_section]
    note = theme.note if isinstance(theme.note, str) else theme.note(rows)
    return "\n".join(lines) + "\n" + (f"\n{note.strip()}\n" if note else "")


def write(folder: Path, theme: Theme, rows: Sequence[Row], environment: dict[str, Any], command: str) -> None:
    """Write the theme's Markdown file and its part of the JSON file; the other themes' parts stay unchanged."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{theme.name}.md").write_text(markdown(theme, rows, environment, command), encoding="utf-8")
    path = folder / RESULTS
    everything = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    everything[theme.name] = {
        "command": command,
        "environment": environment,
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    path.write_text(json.dumps(everything, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
