"""Time functions side by side: interleaved, medians. Nothing here needs JAX: the peers' processes use it too."""

import ctypes
import os
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any


def medians(
    functions: Mapping[str, Callable[[], Any]],
    seconds: float = 3.0,
    least: int = 7,
    ready: Callable[[Any], Any] = lambda result: result,
) -> dict[str, float]:
    """Median seconds of each, all called in turn for about `seconds`, each turn starting with another one.

    Args:
        functions: by name.
        seconds: for all of them together.
        least: how many turns there are at least.
        ready: what waits for a result; `jax.block_until_ready` where functions return before they are done.
    """
    for function in functions.values():
        ready(function())
    start = time.perf_counter()
    taken: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    turn = 0
    while names and (turn < least or time.perf_counter() - start < seconds):
        for k in range(len(names)):
            name = names[(k + turn) % len(names)]
            before = time.perf_counter()
            ready(functions[name]())
            taken[name].append(time.perf_counter() - before)
        turn += 1
    return {name: median(t) for name, t in taken.items()}


def keep_memory() -> None:
    """Have glibc keep what is freed, as accelerators do; by itself it gives blocks above 32 MiB back after every call.

    To fault 33 MiB in again takes longer than much of what is timed here. Nothing is done where there is no glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    for option, value in ((-3, 2**30), (-1, 2**31 - 1)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
        mallopt(option, value)


def threads() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
