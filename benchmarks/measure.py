"""Measure a workload: compile its functions, check that they agree, and time them interleaved."""

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
    """The device, the number of threads and the versions."""
    device = jax.devices()[0]
    return {
        "device": f"{device.platform} ({device.device_kind})",
        "threads": threads(),
        "jax": jax.__version__,
        "Python": platform.python_version(),
    }


def measure(workload: Workload, settings: Settings) -> Iterable[Row]:
    """Measure a workload and return its one row."""
    start = time.monotonic()
    row = Row(workload.name, workload.section, workload.goal, workload.unit, workload.labels)
    row.shapes = describe_arrays(workload.arguments)
    calls: dict[str, Callable[[], Any]] = {}
    results: dict[str, Any] = {}
    for name, function in workload.functions.items():
        reason = function if isinstance(function, str) else skip_reason(workload, name, settings, start)
        if not reason:
            compiled = compile_column(row, name, function, workload.arguments)
            if compiled is not None:
                calls[name] = functools.partial(compiled, *workload.arguments)
            fits = compiled is not None and run_once(calls[name], name, workload.comparable, results)
            reason = "" if fits else DOES_NOT_FIT
        if reason:
            row.skipped[name] = reason
            calls.pop(name, None)
    check_agreement(workload, results, row)
    results.clear()
    time_columns(row, workload, calls, settings, start)
    return [row]


def skip_reason(workload: Workload, name: str, settings: Settings, start: float) -> str:
    """Why a function is not compiled; empty if it is compiled."""
    if workload.materialized_bytes.get(name, 0) > settings.largest:
        return DOES_NOT_FIT
    return "" if settings.time_left(start) else OUT_OF_TIME


def compile_column(row: Row, name: str, function: Any, arguments: tuple[Any, ...]) -> Any:
    """Compile a function, and store the time, the memory and the costs in the row. Return None if it does not fit."""
    jax.clear_caches()
    start = time.perf_counter()
    try:
        compiled = jax.jit(function).lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        return raise_unless_out_of_memory(error)
    row.compiling[name] = time.perf_counter() - start
    memory: Any = compiled.memory_analysis()
    cost: Any = compiled.cost_analysis() or {}
    row.bytes[name] = int(memory.temp_size_in_bytes)
    row.costs[name] = {
        "operations": float(cost.get("flops", 0.0)),
        "bytes accessed": float(cost.get("bytes accessed", 0.0)),
        "bytes in and out": float(memory.argument_size_in_bytes + memory.output_size_in_bytes),
    }
    return compiled


def raise_unless_out_of_memory(error: Exception) -> None:
    """Raise the error again unless it says that the device ran out of memory."""
    if "RESOURCE_EXHAUSTED" not in str(error):
        raise error


def run_once(call: Callable[[], Any], name: str, comparable: Mapping[str, Any], results: dict[str, Any]) -> bool:
    """Call a function once and return whether it fits in memory. Store its result if the result is compared."""
    try:
        result = jax.block_until_ready(call())
    except jax.errors.JaxRuntimeError as error:
        raise_unless_out_of_memory(error)
        return False
    if name in comparable:
        results[name] = comparable[name](result)
    return True


def check_agreement(workload: Workload, results: Mapping[str, Any], row: Row) -> None:
    """Compare every column of `agree` with the first one. Columns that do not fit are compared on the sample.

    Raises:
        AssertionError: a column differs.
    """
    names = [name for name in workload.comparable if not isinstance(workload.functions[name], str)]
    finished = [name for name in names if name in results]
    for name in finished[1:]:
        compare_columns(workload, finished[0], name, results)
    too_large = [name for name in names if row.skipped.get(name) == DOES_NOT_FIT]
    if workload.sample is None or not too_large or not finished:
        return
    # The sample has few examples, so its materialized gradients fit.
    sample_results = {
        name: workload.comparable[name](jax.jit(workload.functions[name])(*workload.sample))  # type: ignore[arg-type]
        for name in (finished[0], *too_large)
    }
    for name in too_large:
        compare_columns(workload, finished[0], name, sample_results)


def compare_columns(workload: Workload, reference: str, other: str, results: Mapping[str, Any]) -> None:
    """Compare two columns, and name them in the error if they differ."""
    try:
        workload.compare(results[reference], results[other])
    except AssertionError as error:
        raise AssertionError(f"{workload.name}: {reference} and {other} disagree.\n{error}") from error


def time_columns(
    row: Row, workload: Workload, calls: Mapping[str, Callable[[], Any]], settings: Settings, start: float
) -> None:
    """Time the columns, those in `timed_last` after the others and for half as long."""
    clock = functools.partial(medians, wait=jax.block_until_ready)
    row.seconds |= clock({k: call for k, call in calls.items() if k not in workload.timed_last}, settings.seconds)
    last = {k: call for k, call in calls.items() if k in workload.timed_last}
    if settings.time_left(start):
        row.seconds |= clock(last, settings.seconds / 2, 3)
    else:
        row.skipped |= dict.fromkeys(last, OUT_OF_TIME)


def describe_arrays(arguments: Any) -> str:
    """The leaves of the arguments, each as dtype[shape]."""
    return ", ".join(f"{a.dtype}{list(a.shape)}" for a in jax.tree.leaves(arguments) if hasattr(a, "shape"))
