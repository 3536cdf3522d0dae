"""Measure every claim about speed with one command: python -m benchmarks

Functions that are compared must first return the same results. Then they are timed interleaved, in one process if
possible. `--only` takes the name of a theme, for all of its rows, or a word in the names of rows. `--device gpu`
runs the theme `card`, whose sizes fill a GPU; `--small` runs it at sizes that fit on any machine.
"""

import argparse
import importlib
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax

from benchmarks import report
from benchmarks.measure import environment, measure
from benchmarks.timing import keep_memory
from benchmarks.workload import Row, Settings, Theme

THEMES = {  # the name of a theme: its module, which defines THEME
    "exercise": "benchmarks.exercise",
    "factors": "benchmarks.factors",
    "transform": "benchmarks.transform",
    "private": "benchmarks.private",
    "deep": "benchmarks.deep",
    "curvature": "benchmarks.curvature",
    "projections": "benchmarks.projections",
    "attribution": "benchmarks.attribution",
    "index": "benchmarks.index",
    "peers": "benchmarks.peers.theme",
    "growth": "benchmarks.growth",
    "third_party": "benchmarks.third_party.theme",
    "reconfiguration": "benchmarks.third_party.reconfiguration",
    "card": "benchmarks.card",
    "compiled": "benchmarks.compiled.theme",
    "sharded": "benchmarks.compiled.sharded",
}
ROW_SECONDS = 60.0  # the time limit of one row on a GPU
THIRD_PARTY = ("third_party", "reconfiguration")  # they need environments of their own, so they run only if named
COMPILED = ("compiled", "sharded")  # they need the compilers of accelerators, so they run only if they are named
CARD = "card"  # runs on a GPU, or with --small on any machine


def load(name: str) -> Theme:
    return importlib.import_module(THEMES[name]).THEME


def run(theme: Theme, settings: Settings) -> list[Row]:
    """Measure the rows of a theme and print each one when it is done."""
    rows: list[Row] = []
    for workload in theme.workloads(settings):
        if not settings.wants(theme.name, workload.name):
            continue
        for row in (theme.measure or measure)(workload, settings):
            if not rows or row.section != rows[-1].section:
                heading = [row.section, ""] if row.section else []
                print("\n" + "\n".join([*heading, *report.header(theme.columns, theme.name)]))
            rows.append(row)
            print(report.row_line(theme.columns, row), flush=True)
    return rows


def main(argv: Sequence[str] | None = None, themes: Iterable[Theme] | None = None) -> list[Row]:
    """Run the themes that the arguments select, and write the files that they request."""
    options = command_line().parse_args(argv)
    settings = make_settings(options)
    names = select_themes(options)
    command = command_text(options)
    all_rows: list[Row] = []
    for theme in map(load, names) if themes is None else themes:
        rows = run(theme, settings)
        if rows and options.write:
            report.write(options.write, theme, rows, environment(), command)
        all_rows += rows
    failed = [f"{row.name}: {row.failed}" for row in all_rows if row.failed]
    if failed:
        raise SystemExit("\n\n".join(["python -m benchmarks: error: these rows are wrong", *failed]))
    return all_rows


def select_themes(options: argparse.Namespace) -> list[str]:
    if options.only in THEMES:
        return [options.only]
    if options.small or options.device == "gpu":
        return [CARD]
    return [name for name in THEMES if name not in (CARD, *THIRD_PARTY, *COMPILED)]


def command_text(options: argparse.Namespace) -> str:
    """The command that gives these results, without the options that depend on this machine."""
    words = ["python", "-m", "benchmarks"]
    for name, default in (("only", ""), ("seconds", None), ("device", "cpu"), ("write", None)):
        value = getattr(options, name)
        words += [] if value == default else [f"--{name}", str(value)]
    return shlex.join(words + (["--small"] if options.small else []))


def make_settings(options: argparse.Namespace) -> Settings:
    """The settings for the chosen device. Only this function chooses a device."""
    if options.device == "cpu":
        jax.config.update("jax_platforms", "cpu")
        seconds = 3.0 if options.seconds is None else options.seconds
        return Settings(seconds, options.only, options.small, torch_python=options.torch_python)
    try:
        device = jax.devices("gpu")[0]
    except RuntimeError as error:
        raise SystemExit(f"python -m benchmarks: error: --device gpu: {error}") from None
    memory = (device.memory_stats() or {}).get("bytes_limit", 2**34)
    deadline = time.monotonic() + 60 * options.minutes
    seconds = 1.0 if options.seconds is None else options.seconds
    return Settings(seconds, options.only, options.small, memory // 3, ROW_SECONDS, deadline, options.torch_python)


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", metavar="WORD", help=f"{', '.join(THEMES)}; or a word in row names")
    parser.add_argument("--seconds", type=float, metavar="S", help="time for each row; by default 3, on a GPU 1")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--small", action="store_true", help="the theme card at sizes that fit on any machine")
    parser.add_argument(
        "--minutes", type=float, default=7.0, metavar="M", help="on a GPU: start nothing later than this"
    )
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="write a file for each theme, and results.json")
    parser.add_argument(
        "--torch-python", default=sys.executable, metavar="PATH", help="the Python that runs the peers in torch"
    )
    return parser


if __name__ == "__main__":
    keep_memory()
    main()
