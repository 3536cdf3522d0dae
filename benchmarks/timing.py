"""Time functions side by side: interleaved, medians, ready results."""

import argparse
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np


def medians(functions: Mapping[str, Callable[[], Any]], seconds: float = 3.0, least: int = 7) -> dict[str, float]:
    """Median seconds of each, all called in turn for about `seconds`, each turn starting with another one."""
    for function in functions.values():
        jax.block_until_ready(function())
    start = time.perf_counter()
    taken: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    turn = 0
    while turn < least or time.perf_counter() - start < seconds:
        for k in range(len(names)):
            name = names[(k + turn) % len(names)]
            before = time.perf_counter()
            jax.block_until_ready(functions[name]())
            taken[name].append(time.perf_counter() - before)
        turn += 1
    return {name: float(np.median(t)) for name, t in taken.items()}


def environment() -> str:
    """The device, the versions and the threads: one line."""
    device = jax.devices()[0]
    return (
        f"{device.platform} ({device.device_kind}), {len(os.sched_getaffinity(0))} threads, jax {jax.__version__}, "
        f"Python {platform.python_version()}"
    )


def command_line(doc: str | None, title: str, module: str, run: Callable[..., str], note: str = "") -> None:
    """The options that every benchmark has: how long, what, and a file for the table."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each row")
    parser.add_argument("--only", default="", help="rows whose name holds this word")
    parser.add_argument("--write", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    table = run(options.seconds, options.only)
    if options.write:
        command = f"`python -m {module} --write {options.write}`"
        options.write.write_text(f"# {title}\n\nWritten by {command}.\n\n{table}{note}")
