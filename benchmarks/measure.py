"""Measure a workload: compile, check agreement, time interleaved. The compiler reports memory and costs."""

import functools
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from benchmarks.timing import medians, threads
from benchmarks.workload import Row, Settings, Workload

DOES_NOT_FIT, OUT_OF_TIME = "does not fit", "out of time"


def environment() -> dict[str, Any]:
    """The device, the versions and the threads."""
    device = jax.devices()[0]
    return {
        "device": f"{device.platform} ({device.device_kind})",
        "threads": threads(),
        "jax": jax.__version__,
        "Python": platform.python_version(),
    }


def measure(workload: Workload, settings: Settings) -> Iterable[Row]:
    """The one row of a workload."""
    began = time.monotonic()
    row = Row(workload.name, workload.section, workload.goal, workload.unit, workload.labels)
    row.shapes = shapes(workload.arguments)
    calls: dict[str, Callable[[], Any]] = {}
    results: dict[str, Any] = {}
    for name, function in workload.functions.items():
        word = function if isinstance(function, str) else reason(workload, name, settings, began)
        if not word:
            compiled = compile_into(row, name, function, workload.arguments)
            if compiled is not None:
                calls[name] = functools.partial(compiled, *workload.arguments)
            word = DOES_NOT_FIT if compiled is None or not runs(calls[name], name, workload.comparable, results) else ""
        if word:
            row.skipped[name] = word
            calls.pop(name, None)
    hold_to_agree(workload, results, row)
    results.clear()
    time_into(row, workload, calls, settings, began)
    return [row]


def reason(workload: Workload, name: str, settings: Settings, began: float) -> str:
    """The word that says why a function is not compiled; empty if it is compiled."""
    if workload.materialized_bytes.get(name, 0) > settings.largest:
        return DOES_NOT_FIT
    return "" if settings.time_left(began) else OUT_OF_TIME


def compile_into(row: Row, name: str, function: Any, arguments: tuple[Any, ...]) -> Any:
    """The compiled function, or None if it does not fit. The row gets the compile time, the memory and the costs."""
    jax.clear_caches()
    before = time.perf_counter()
    try:
        compiled = jax.jit(function).lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        return out_of_memory(error)
    row.compiling[name] = time.perf_counter() - before
    memory: Any = compiled.memory_analysis()
    cost: Any = compiled.cost_analysis() or {}
    row.bytes[name] = int(memory.temp_size_in_bytes)
    row.costs[name] = {
        "operations": float(cost.get("flops", 0.0)),
        "bytes accessed": float(cost.get("bytes accessed", 0.0)),
        "bytes in and out": float(memory.argument_size_in_bytes + memory.output_size_in_bytes),
    }
    return compiled


def out_of_memory(error: Exception) -> None:
    """Raise the error again unless it says that memory ran out."""
    if "RESOURCE_EXHAUSTED" not in str(error):
        raise error


def runs(call: Callable[[], Any], name: str, comparable: Mapping[str, Any], results: dict[str, Any]) -> bool:
    """Call once and return whether the memory was enough; store the result if it is to be compared."""
    try:
        result = jax.block_until_ready(call())
    except jax.errors.JaxRuntimeError as error:
        out_of_memory(error)
        return False
    if name in comparable:
        results[name] = comparable[name](result)
    return True


def hold_to_agree(workload: Workload, results: Mapping[str, Any], row: Row) -> None:
    """Compare all columns of `agree` with the first one, and those that did not fit on the sample.

    Raises:
        AssertionError: a column differs.
    """
    names = [name for name in workload.comparable if not isinstance(workload.functions[name], str)]
    here = [name for name in names if name in results]
    for name in here[1:]:
        named(workload, here[0], name, results)
    absent = [name for name in names if row.skipped.get(name) == DOES_NOT_FIT]
    if workload.sample is None or not absent or not here:
        return
    # The example axis of the sample is short, so the materialized gradients are small.
    on_sample = {
        name: workload.comparable[name](jax.jit(workload.functions[name])(*workload.sample))  # type: ignore[arg-type]
        for name in (here[0], *absent)
    }
    for name in absent:
        named(workload, here[0], name, on_sample)


def named(workload: Workload, reference: str, other: str, results: Mapping[str, Any]) -> None:
    try:
        workload.compare(results[reference], results[other])
    except AssertionError as error:
        raise AssertionError(f"{workload.name}: {reference} and {other} disagree.\n{error}") from error


def time_into(
    row: Row, workload: Workload, calls: Mapping[str, Callable[[], Any]], settings: Settings, began: float
) -> None:
    """Time the columns that are not in `apart` first, then those in `apart`, in half the time."""
    clock = functools.partial(medians, ready=jax.block_until_ready)
    row.seconds |= clock({k: call for k, call in calls.items() if k not in workload.timed_last}, settings.seconds)
    apart = {k: call for k, call in calls.items() if k in workload.timed_last}
    if settings.time_left(began):
        row.seconds |= clock(apart, settings.seconds / 2, 3)
    else:
        row.skipped |= dict.fromkeys(apart, OUT_OF_TIME)


def shapes(arguments: Any) -> str:
    """The leaves of the arguments, each as dtype[shape]."""
    return ", ".join(f"{a.dtype}{list(a.shape)}" for a in jax.tree.leaves(arguments) if hasattr(a, "shape"))
