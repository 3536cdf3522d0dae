"""Measurements on one GPU: sizes that fill it, two dtypes, and the distance of each row from the roofline."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from benchmarks import exercise, factors, models, report, roofline
from benchmarks.functions import factored, jax_privacy, materialized, materialized_bytes, max_norm, optax, plain
from benchmarks.measure import OUT_OF_TIME, measure
from benchmarks.models import Model
from benchmarks.workload import Column, Row, Settings, Theme, Workload

NAME = "card"
DTYPES = ("float32", "bfloat16")
TOLERANCE = {"float32": 1e-2, "bfloat16": 5e-2}  # a GPU rounds products of float32 to 10 bits, of bfloat16 to 7
CEILINGS = "Measured ceilings"
CLIPPED = "Mean loss, norms and clipped sum"
OPERATIONS = "Operations on the exercise's gradients"
EXAMPLES = 8  # on which the columns are compared if vmap(grad) does not fit
LIMITED = ("plain", "jaxgrad")  # the columns with a roofline limit


def select_models(small: bool) -> Iterator[Model]:
    if small:
        yield models.mlp((64, 64, 64, 10), 32)
        yield models.transformer(64, 16, 8)
        yield models.language_model(128, 32, 8, 8)
        yield models.conv_net(8)
        yield models.gru(32, 8, 8)
        yield models.embedding(512, 32, 8, 16)
        return
    yield models.mlp((1024, 4096, 4096, 4096, 10), 4096)
    yield models.transformer(1024, 128, 64)
    yield models.language_model(50_000, 1024, 128, 16)
    yield models.conv_net(4096)
    yield models.gru(1024, 64, 256)
    yield models.embedding(50_000, 1024, 128, 1024)


def by_norm(tolerance: float) -> Any:
    """Compare arrays by the norm of their difference, relative to their norm or to 1/1000 of the norm of all arrays."""

    def compare(reference: Any, other: Any) -> None:
        pair = ([np.asarray(a, np.float32).ravel() for a in jax.tree.leaves(tree)] for tree in (reference, other))
        leaves = list(zip(*pair, strict=True))
        total_norm = np.linalg.norm([np.linalg.norm(a) for a, _ in leaves])
        for k, (a, b) in enumerate(leaves):
            error, scale = np.linalg.norm(a - b), max(np.linalg.norm(a), 1e-3 * total_norm)
            assert error <= tolerance * scale, f"leaf {k}: off by {error / scale:.1%}, more than {tolerance:.1%}"

    return compare


def model_workload(name: str, model: Model, bound: float, dtype: str) -> Workload:
    model = model.astype(dtype)
    libraries = jax_privacy(model, bound, (None, 64, 16)) | {"optax": optax(model, bound)}
    columns = {"plain": plain(model), "jaxgrad": factored(model, bound), "vmap(grad)": materialized(model, bound)}
    return Workload(
        name,
        columns | libraries,
        (model.params, *model.batch),
        agree=("jaxgrad", "vmap(grad)"),
        compare=by_norm(TOLERANCE[dtype]),
        goal=model.goal,
        sample=model.first(EXAMPLES),
        materialized_bytes=materialized_bytes(model, libraries),
        timed_last=("vmap(grad)", *libraries),
        section=CLIPPED,
        labels={"dtype": dtype},
    )


def exercise_workload(name: str, operation: str, size: tuple[int, int, int], dtype: str) -> Workload:
    B, D, H = size
    params, X, Y = exercise.problem(B, D, H, dtype)
    return Workload(
        name,
        factors.functions(operation),
        (params, X, Y),
        agree=dict.fromkeys(("jaxgrad", "vmap(grad)"), factors.flat),
        compare=by_norm(TOLERANCE[dtype]),
        goal=factors.GOALS[operation],
        sample=(params, X[:EXAMPLES], Y[:EXAMPLES]),
        materialized_bytes={"vmap(grad)": B * D * H * X.dtype.itemsize},
        timed_last=("vmap(grad)",),
        section=OPERATIONS,
        labels={"dtype": dtype},
    )


def workloads(settings: Settings) -> Iterator[Workload]:
    for dtype in DTYPES:
        yield Workload(f"matrix product, {dtype}", {}, (), section=CEILINGS, labels={"dtype": dtype})
    yield Workload("2x + y, float32", {}, (), section=CEILINGS)
    for model in select_models(settings.small):
        names = {f"{model.name}, {dtype}": dtype for dtype in DTYPES}
        wanted = {name: dtype for name, dtype in names.items() if settings.wants(NAME, name)}
        has_time = settings.time_left()
        bound = max_norm(model, EXAMPLES) if wanted and has_time else 1.0
        for name, dtype in wanted.items():
            yield model_workload(name, model, bound, dtype) if has_time else out_of_time(name, CLIPPED)
    size = (64, 30, 16) if settings.small else (4096, 4096, 8192)
    for operation in factors.OPERATIONS:
        for dtype in DTYPES:
            name = f"exercise {size} {operation}, {dtype}"
            if settings.wants(NAME, name):
                yield (
                    exercise_workload(name, operation, size, dtype)
                    if settings.time_left()
                    else out_of_time(name, OPERATIONS)
                )


def out_of_time(name: str, section: str) -> Workload:
    """A row that is skipped because there is no time left, not even to prepare it."""
    return Workload(name, dict.fromkeys(("plain", "jaxgrad", "vmap(grad)"), OUT_OF_TIME), (), section=section)


def rates(dtype: str, small: bool) -> tuple[float, float]:
    """(operations per second, bytes per second)."""
    return roofline.product_rate(dtype, 512 if small else 8192), roofline.memory_rate(2**22 if small else 2**28)


def measure_row(workload: Workload, settings: Settings) -> list[Row]:
    """Measure the row as usual, and add the roofline limits of plain and of jaxgrad."""
    dtype = workload.labels.get("dtype", DTYPES[0])
    product_rate, memory_rate = rates(dtype, settings.small)
    if workload.section == CEILINGS:
        rate = f"{product_rate / 1e12:.3g} TFLOP/s" if "product" in workload.name else f"{memory_rate / 1e9:.4g} GB/s"
        return [Row(workload.name, CEILINGS, labels={"reached": rate})]
    (row,) = measure(workload, settings)
    for name in LIMITED:
        if name in row.seconds:
            roofline.add_limit(row, name, workload.functions[name], workload.arguments, (product_rate, memory_rate))
    if "jaxgrad" in row.seconds:
        reached = row.costs["jaxgrad"]["operations"] / row.seconds["jaxgrad"]
        row.labels = dict(workload.labels) | {"reached": f"{reached / 1e12:.3g} TFLOP/s"}
    return [row]


def limit(name: str) -> Column:
    def cell(row: Row) -> str:
        seconds = row.costs.get(name, {}).get("limit")
        return "" if seconds is None else f"{seconds * 1e3:.3f}"

    return Column(f"{name} limit, ms", cell)


THEME = Theme(
    NAME,
    "On a GPU",
    """
`plain` is `jit(value_and_grad(mean loss))`; the columns *time* and *memory* are multiples of it. `jaxgrad` computes
the mean loss, the norms and the clipped sum of the per-example gradients from factors. `vmap(grad)`, `jax-privacy` and
`optax` compute them from materialized gradients. `jaxgrad` and `vmap(grad)` must agree, on 8 examples where
`vmap(grad)` does not fit.

The limit is the roofline. It is the longer of two times: that of the matrix products' operations at the measured
product rate, and that of the bytes that the compiled program accesses at the measured memory rate. `reached` is
jaxgrad's operations divided by its time. Memory is the temporary memory of the compiled program.""",
    (
        report.milliseconds("plain"),
        report.ratio("jaxgrad"),
        report.goal(),
        report.ratio("vmap(grad)"),
        report.ratio("jax-privacy"),
        report.ratio("optax"),
        limit("plain"),
        limit("jaxgrad"),
        report.label("reached"),
        report.mebibytes("plain"),
        report.memory("jaxgrad"),
        report.memory("vmap(grad)"),
    ),
    workloads,
    measure_row,
)
