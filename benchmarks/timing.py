"""Time functions side by side: interleaved, with medians. Nothing here needs JAX, so the peers can use it too."""

import ctypes
import os
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any


def medians(
    functions: Mapping[str, Callable[[], Any]],
    seconds: float = 3.0,
    min_rounds: int = 7,
    wait: Callable[[Any], Any] = lambda result: result,
) -> dict[str, float]:
    """Median seconds of each function. Each round calls every function once and starts with a different one.

    Args:
        functions: by name.
        seconds: the time for all of them together.
        min_rounds: the minimum number of rounds.
        wait: a function that waits for a result; `jax.block_until_ready` if functions return before they are done.
    """
    for function in functions.values():
        wait(function())
    start = time.perf_counter()
    durations: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    rounds = 0
    while names and (rounds < min_rounds or time.perf_counter() - start < seconds):
        for k in range(len(names)):
            name = names[(k + rounds) % len(names)]
            call_start = time.perf_counter()
            wait(functions[name]())
            durations[name].append(time.perf_counter() - call_start)
        rounds += 1
    return {name: median(t) for name, t in durations.items()}


def keep_memory() -> None:
    """Make glibc keep freed memory for later calls, as accelerators do.

    By default glibc returns blocks above 32 MiB to the kernel after every call. The page faults of allocating them
    again would take longer than much of what is timed here. Without glibc this function does nothing.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    for option, value in ((-3, 2**30), (-1, 2**31 - 1)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
        mallopt(option, value)


def threads() -> int:
    """The number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
