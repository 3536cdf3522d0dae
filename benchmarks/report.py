"""The columns of the tables, and the files: a Markdown file for each theme and one JSON file for all themes."""

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


def skip_reason(row: Row, name: str) -> str:
    """Why a number is missing; empty if the row does not have this column."""
    return row.skipped.get(name) or next((reason for k, reason in row.skipped.items() if k.startswith(f"{name} ")), "")


def milliseconds(name: str, title: str = "") -> Column:
    def cell(row: Row) -> str:
        t = row.seconds.get(row.best(name))
        return skip_reason(row, name) if t is None else f"{t * 1e3:.3f}" if t < 1e-3 else number(t * 1e3)

    return Column(title or f"{name}, ms", cell)


def ratio(name: str, unit: str = "", title: str = "") -> Column:
    """Time as a multiple of another column's; by default of the row's unit. The fastest column of a name counts."""

    def cell(row: Row) -> str:
        best, reference = row.best(name), row.best(unit or row.unit)
        if best not in row.seconds or reference not in row.seconds:
            return skip_reason(row, name)
        variant = f" ({best[len(name) + 1 :]})" if best != name and not unit else ""
        return number(row.seconds[best] / row.seconds[reference]) + variant

    return Column(title or f"{name}, time", cell)


def mebibytes(name: str, title: str = "") -> Column:
    def cell(row: Row) -> str:
        return number(row.bytes[name] / 2**20) if name in row.bytes else skip_reason(row, name)

    return Column(title or f"{name}, MiB", cell)


def memory(name: str) -> Column:
    """Temporary memory as a multiple of that of the row's unit."""

    def cell(row: Row) -> str:
        best, reference = row.best(name), row.bytes.get(row.unit, 0)
        if best not in row.seconds or best not in row.bytes or not reference:
            return skip_reason(row, name)
        return number(row.bytes[best] / reference)

    return Column(f"{name}, memory", cell)


def compile_time(name: str) -> Column:
    """Time to trace and compile as a multiple of that of the row's unit."""

    def cell(row: Row) -> str:
        known = name in row.compiling and row.unit in row.compiling
        return number(row.compiling[name] / row.compiling[row.unit]) if known else skip_reason(row, name)

    return Column(f"{name}, compile time", cell)


def label(key: str) -> Column:
    return Column(key, lambda row: row.labels.get(key, ""))


def goal() -> Column:
    return Column("goal", lambda row: "" if row.goal is None else f"{row.goal:.2f}")


def blank_if_skipped(column: Column) -> Column:
    """The column, left empty in rows where another column says why there is no measurement."""
    return Column(column.title, lambda row: "" if row.skipped else column.cell(row))


def header(columns: Sequence[Column], first: str) -> list[str]:
    return [line([first, *(c.title for c in columns)]), "|---" + "|---:" * len(columns) + "|"]


def line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def row_line(columns: Sequence[Column], row: Row) -> str:
    return line([row.name, *(c.cell(row) for c in columns)])


def describe(environment: dict[str, Any]) -> str:
    versions = [f"{k} {v}" for k, v in environment.items() if k not in ("device", "threads")]
    return f"{environment['device']}, {environment['threads']} threads, {', '.join(versions)}"


def markdown(theme: Theme, rows: Sequence[Row], environment: dict[str, Any], command: str) -> str:
    """The text of the theme's Markdown file."""
    lines = [f"# {theme.title}", "", f"Written by `{command}`.", "", theme.about.strip(), ""]
    timing = (
        f"Medians of interleaved calls, {describe(environment)}. glibc keeps freed memory (`benchmarks/timing.py`)."
    )
    lines += [timing if theme.timed else f"jax {environment['jax']}, Python {environment['Python']}."]
    for section, section_rows in itertools.groupby(rows, key=lambda row: row.section):
        lines += ["", *([section, ""] if section else []), *header(theme.columns, " ")]
        lines += [row_line(theme.columns, row) for row in section_rows]
    note = theme.note if isinstance(theme.note, str) else theme.note(rows)
    return "\n".join(lines) + "\n" + (f"\n{note.strip()}\n" if note else "")


def write(folder: Path, theme: Theme, rows: Sequence[Row], environment: dict[str, Any], command: str) -> None:
    """Write the theme's Markdown file and its part of the JSON file. The parts of other themes do not change."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{theme.name}.md").write_text(markdown(theme, rows, environment, command), encoding="utf-8")
    path = folder / RESULTS
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    results[theme.name] = {
        "command": command,
        "environment": environment,
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
