"""The measurements on one GPU: sizes that fill it, two dtypes, and how far each row is from the roofline."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from benchmarks import exercise, factors, models, report, roofline
from benchmarks.functions import factored, jax_privacy, max_norm, optax, plain, writes, materialized
from benchmarks.measure import OUT_OF_TIME, measure
from benchmarks.models import Model
from benchmarks.workload import Column, Row, Settings, Theme, Workload

NAME = "card"
DTYPES = ("float32", "bfloat16")
TOLERANCE = {"float32": 1e-2, "bfloat16": 5e-2}  # on a GPU, float32 products round to 10 bits, bfloat16 ones to 7
CEILINGS = "Measured ceilings"
CLIPPED = "Mean loss, norms and clipped sum"
OPERATIONS = "Operations on the exercise's gradients"
EXAMPLES = 8  # for the check of agreement, if vmap(grad) does not fit
LIMITED = ("plain", "jaxgrad")


def chosen(small: bool) -> Iterator[Model]:
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
    """Compare each array by its norm, relative to its own norm or to a thousandth of the norm of all, if larger."""

    def compare(ours: Any, theirs: Any) -> None:
        ours, theirs = ([np.asarray(a, np.float32).ravel() for a in jax.tree.leaves(r)] for r in (ours, theirs))
        whole = np.linalg.norm([np.linalg.norm(a) for a in ours])
        for k, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            off, size = np.linalg.norm(a - b), max(np.linalg.norm(a), 1e-3 * whole)
            assert off <= tolerance * size, f"leaf {k}: off by {off / size:.1%}, more than {tolerance:.1%}"

    return compare


def of_model(name: str, model: Model, bound: float, dtype: str) -> Workload:
    model = model.astype(dtype)
    theirs = jax_privacy(model, bound, (None, 64, 16)) | {"optax": optax(model, bound)}
    columns = {"plain": plain(model), "jaxgrad": factored(model, bound), "vmap(grad)": materialized(model, bound)}
    return Workload(
        name,
        columns | theirs,
        (model.params, *model.batch),
        agree=("jaxgrad", "vmap(grad)"),
        compare=by_norm(TOLERANCE[dtype]),
        goal=model.goal,
        sample=model.first(EXAMPLES),
        materialized_bytes=materialized_bytes(model, theirs),
        timed_last=("vmap(grad)", *theirs),
        section=CLIPPED,
        labels={"dtype": dtype},
    )


def of_exercise(name: str, operation: str, size: tuple[int, int, int], dtype: str) -> Workload:
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
    for model in chosen(settings.small):
        names = {f"{model.name}, {dtype}": dtype for dtype in DTYPES}
        wanted = {name: dtype for name, dtype in names.items() if settings.wants(NAME, name)}
        in_time = settings.time_left()
        bound = max_norm(model, EXAMPLES) if wanted and in_time else 1.0
        for name, dtype in wanted.items():
            yield of_model(name, model, bound, dtype) if in_time else too_late(name, CLIPPED)
    size = (64, 30, 16) if settings.small else (4096, 4096, 8192)
    for operation in factors.OPERATIONS:
        for dtype in DTYPES:
            name = f"exercise {size} {operation}, {dtype}"
            if settings.wants(NAME, name):
                yield of_exercise(name, operation, size, dtype) if settings.time_left() else too_late(name, OPERATIONS)


def too_late(name: str, section: str) -> Workload:
    """A row that is skipped because there is no time, not even to prepare it."""
    return Workload(name, dict.fromkeys(("plain", "jaxgrad", "vmap(grad)"), OUT_OF_TIME), (), section=section)


def rates(dtype: str, small: bool) -> tuple[float, float]:
    """(operations per second, bytes per second)."""
    return roofline.product_rate(dtype, 512 if small else 8192), roofline.memory_rate(2**22 if small else 2**28)


def measured(workload: Workload, settings: Settings) -> list[Row]:
    """The usual row, with the roofline limits of plain and of jaxgrad."""
    dtype = workload.labels.get("dtype", DTYPES[0])
    both = rates(dtype, settings.small)
    if workload.section == CEILINGS:
        rate = f"{both[0] / 1e12:.3g} TFLOP/s" if "product" in workload.name else f"{both[1] / 1e9:.4g} GB/s"
        return [Row(workload.name, CEILINGS, labels={"reached": rate})]
    (row,) = measure(workload, settings)
    for name in LIMITED:
        if name in row.seconds:
            roofline.limit_into(row, name, workload.functions[name], workload.arguments, both)
    if "jaxgrad" in row.seconds:
        reached = row.costs["jaxgrad"]["operations"] / row.seconds["jaxgrad"]
        row.labels = dict(workload.labels) | {"reached": f"{reached / 1e12:.3g} TFLOP/s"}
    return [row]


def limit(name: str) -> Column:
    def cell(row: Row) -> str:
        known = row.costs.get(name, {}).get("limit")
        return "" if known is None else f"{known * 1e3:.3f}"

    return Column(f"{name} limit, ms", cell)


THEME = Theme(
    NAME,
    "On a card",
    """
Plain, `jit(value_and_grad(mean loss))`, is 1.00; `jaxgrad` is the mean loss, the norms and the clipped sum of the
per-example gradients as factors, `vmap(grad)` and `optax` are the same with the gradients written out. The columns of
clipped sums are held to agree, on 8 examples where `vmap(grad)` does not fit. The limit is the roofline: the operations
of the matrix products, or the bytes the compiled program accesses, over the measured ceilings, whichever takes longer;
`reached` is jaxgrad's operations over its time. Memory is the compiled program's temporary memory.""",
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
    measured,
)
