"""An index of a million examples on disk: written, searched and checked in a process of its own, with its memory."""

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.report import number
from benchmarks.workload import Column, Row, Settings, Theme, Workload
from jaxgrad import streams

NAME = "index"
SIZES = ((1_000_000, 1024),)
SMALL = ((20_000, 64),)
BLOCK, QUERIES, TOP = 8192, 16, 10
LABELS = ("written", "searched", "all scores", "checked")


def main(folder: Path, N: int, S: int) -> dict[str, float]:
    """Write N rows of S synthetic numbers, and read them in every way: seconds, bytes on disk, and peak memory."""
    rng = np.random.default_rng(0)
    numbers = rng.standard_normal((BLOCK, S), dtype=np.float32).astype(np.float16)

    def rows(_: Any, examples: np.ndarray) -> streams.Part:
        return streams.Part({"projections": np.roll(numbers, int(examples[0]) // BLOCK, 1)[: len(examples)]}, {})

    seconds: dict[str, float] = {}

    def clock(label: str, function: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = jax.block_until_ready(function())
        seconds[label] = time.perf_counter() - start
        return result

    batches = streams.Batches(np.arange(N), size=BLOCK)
    clock("written", lambda: streams.run(rows, jit=False, every=4)(None, batches, folder).examples)
    stored = streams.load(folder).rows["projections"]
    chosen = rng.choice(N, QUERIES, replace=False)
    queries = np.array(stored[chosen], np.float32)
    found = clock("searched", lambda: streams.search(TOP)(queries, stored))
    norms = (queries**2).sum(1)
    assert np.all(np.asarray(found.values)[:, 0] >= 0.999 * norms)
    every = clock("all scores", lambda: streams.scores()(queries, stored))
    np.testing.assert_allclose(every[np.arange(QUERIES), chosen], norms, rtol=1e-3)
    clock("checked", lambda: streams.load(folder, check=True).examples)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return seconds | {"disk": sum(path.stat().st_size for path in folder.iterdir()), "peak": peak}


def workloads(settings: Settings) -> Iterator[Workload]:
    for N, S in SMALL if settings.small else SIZES:
        if settings.wants(NAME, name := f"{N:,} rows × {S:,} numbers, float16"):
            yield Workload(name, {}, (N, S))


def measured(workload: Workload, settings: Settings) -> Iterable[Row]:
    """Run `main` in a process of its own, in a folder that is deleted afterwards."""
    row = Row(workload.name)
    with tempfile.TemporaryDirectory() as folder:
        arguments = [folder, *map(str, workload.arguments)]
        command = [sys.executable, "-m", "benchmarks.index", *arguments]
        result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    row.seconds = {label: result[label] for label in LABELS}
    row.bytes = {"disk": int(result["disk"]), "peak": int(result["peak"])}
    return [row]


def seconds(label: str) -> Column:
    return Column(f"{label}, s", lambda row: number(row.seconds[label]))


THEME = Theme(
    NAME,
    "An index on disk",
    """
Synthetic rows are written by `streams.run` in batches of 8,192, four to a commit, and opened by `streams.load`.
*Searched* is the time of `streams.search` for the ten best rows of each of 16 queries, *all scores* that of
`streams.scores` for all of them, and *checked* that of reading every row to compare its block's checksum. *Peak* is the
most memory that the process has had, Python, JAX and mapped files included.""",
    (
        Column("on disk, GiB", lambda row: number(row.bytes["disk"] / 2**30)),
        *map(seconds, LABELS),
        Column("peak, MiB", lambda row: number(row.bytes["peak"] / 2**20)),
    ),
    workloads,
    measured,
)

if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
