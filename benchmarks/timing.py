"""Time functions side by side: interleaved, with medians. Nothing here needs JAX, so that the peers can use it."""

import ctypes
import os
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any


def medians(
    functions: Mapping[str, Callable[[], Any]],
    seconds: float = 3.0,
    min_turns: int = 7,
    wait: Callable[[Any], Any] = lambda result: result,
) -> dict[str, float]:
    """Median seconds of each function. They are called in turn for about `seconds`; each turn starts with another one.

    Args:
        functions: by name.
        seconds: the time for all of them together.
        min_turns: the minimum number of turns.
        wait: a function that waits for a result; `jax.block_until_ready` if functions return before they are done.
    """
    for function in functions.values():
        wait(function())
    start = time.perf_counter()
    durations: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    turn = 0
    while names and (turn < min_turns or time.perf_counter() - start < seconds):
        for k in range(len(names)):
            name = names[(k + turn) % len(names)]
            before = time.perf_counter()
            wait(functions[name]())
            durations[name].append(time.perf_counter() - before)
        turn += 1
    return {name: median(t) for name, t in durations.items()}


def keep_memory() -> None:
    """Make glibc keep freed memory, as accelerators do; by default it returns blocks above 32 MiB after every call.

    Faulting 33 MiB in again takes longer than much of what is timed here. Without glibc this does nothing.
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
