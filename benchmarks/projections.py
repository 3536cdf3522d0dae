"""Two-sided projections: against a dense one on factors, and inside the loops of a deep model compiled for an H100."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax

import jaxgrad as jg
from benchmarks import report
from benchmarks.compiled.program import Program
from benchmarks.compiled.targets import H100, NotInstalledError, compile_for, memory
from benchmarks.compiled.theme import GPT_2_SMALL, shape_structs
from benchmarks.functions import plain
from benchmarks.measure import measure
from benchmarks.models import deep_language_model, mlp
from benchmarks.workload import Column, Row, Settings, Theme, Workload
from jaxgrad import attribution

NAME = "projections"
NUMBERS = 4096
SOME = 64  # of them, for which the dense projection is timed: it is a loop over its numbers
SIZE = 35  # rows of each matrix: 4,140 numbers for the MLP
DEEP_SIZE = 16
STACKED = {"E": 0, "out": 0, "layers": 1, "scale": 0}
TWO_SIDED, DENSE, INSIDE, PLAIN = "two-sided", "random_projection", "inside the loop", "plain"


def on_factors() -> Workload:
    """The projections of gradients that are held, by two small matrices for each weight and by one large matrix."""
    model, key = mlp(B=64), jax.random.key(0)
    g = jax.jit(jg.per_example_grad(model.loss))(model.params, *model.batch)
    sides = attribution.random_sides(model.params, key, SIZE)
    functions: dict[str, Callable[..., Any]] = {
        DENSE: lambda g, sides: attribution.random_projection(g, key, NUMBERS),
        TWO_SIDED: attribution.project,
    }
    count = jax.eval_shape(attribution.project, g, sides).shape[1]
    assert count >= NUMBERS
    name = f"{model.name}, {count} numbers"
    return Workload(name, functions, (g, sides), unit=DENSE, labels={"compared with": DENSE})


def deep(T: int) -> Workload:
    """The projections of a language model's gradients, next to a plain gradient of it."""
    model = deep_language_model(T=T, **GPT_2_SMALL)

    def inside(params: Any, *batch: Any) -> Any:
        sides = attribution.random_sides(params, jax.random.key(0), DEEP_SIZE, stacked=STACKED)
        values, numbers = attribution.per_example_projection(model.loss, sides)(params, *batch)
        return values.mean(), numbers

    arguments = shape_structs((model.params, *model.batch), "bfloat16")
    labels = {"compared with": PLAIN, "target": H100.name}
    return Workload(f"{model.name}, bfloat16, H100", {PLAIN: plain(model), INSIDE: inside}, arguments, labels=labels)


def workloads(settings: Settings) -> Iterator[Workload]:
    makers = {"MLP": on_factors} | {f"language model T={T}": functools.partial(deep, T) for T in (128, 1024)}
    for name, make in makers.items():
        if settings.wants(NAME, name):
            yield make()


def measured(workload: Workload, settings: Settings) -> Iterable[Row]:
    """Count the operations of compiled programs: timed on this machine, or modeled for a target."""
    if "target" not in workload.labels:
        return [timed(workload, settings)]
    row = Row(workload.name, unit=PLAIN, labels=workload.labels)
    try:
        device = H100.device()
    except NotInstalledError:
        row.skipped = dict.fromkeys(workload.functions, f"pip install 'jaxgrad[{H100.extra}]'")
        return [row]
    for name, function in functions_of(workload):
        jax.clear_caches()
        program = compile_for(function, workload.arguments, device)
        text = Program(program.as_text())
        row.bytes[name], row.seconds[name] = memory(program), text.counts(H100.peak).seconds
        row.costs[name] = {"operations": operations(text)}
    return [row]


def timed(workload: Workload, settings: Settings) -> Row:
    """Time our projection as in the other tables; of the dense one, one call for SOME of its numbers."""
    (row,) = measure(dataclasses.replace(workload, functions={TWO_SIDED: workload.functions[TWO_SIDED]}), settings)
    for name, function in functions_of(workload):
        program = jax.jit(function).lower(*workload.arguments).compile()
        sizes: Any = program.memory_analysis()
        row.bytes[name] = int(sizes.temp_size_in_bytes)
        row.costs[name] = {"operations": operations(Program(program.as_text() or ""))}
    some = jax.jit(lambda g: attribution.random_projection(g, jax.random.key(0), SOME)).lower(workload.arguments[0])
    call = some.compile()
    start = time.perf_counter()
    jax.block_until_ready(call(workload.arguments[0]))
    row.seconds[DENSE] = (time.perf_counter() - start) * NUMBERS / SOME
    return row


def functions_of(workload: Workload) -> list[tuple[str, Callable[..., Any]]]:
    return [(name, function) for name, function in workload.functions.items() if not isinstance(function, str)]


def operations(program: Program) -> float:
    """The operations of all products of a program."""
    return float(sum(program.counts().products.values()))


def ours(row: Row) -> str:
    return INSIDE if row.unit == PLAIN else TWO_SIDED


def of_unit(title: str, value: Callable[[Row, str], float], scale: float = 1.0) -> Column:
    def cell(row: Row) -> str:
        return report.skip_reason(row, row.unit) or report.number(value(row, row.unit) * scale)

    return Column(title, cell)


def of_ours(title: str, value: Callable[[Row, str], float]) -> Column:
    def cell(row: Row) -> str:
        return "" if row.skipped else f"{value(row, ours(row)) / value(row, row.unit):.3g}"

    return Column(title, cell)


def costs(row: Row, name: str) -> float:
    return row.costs[name]["operations"]


def seconds(row: Row, name: str) -> float:
    return row.seconds[name]


def held(row: Row, name: str) -> float:
    return float(row.bytes[name])


THEME = Theme(
    NAME,
    "Projections",
    """
The first row takes held factors to numbers: `attribution.project` with two matrices of 35 random rows for each weight,
next to `attribution.random_projection` onto as many numbers. *Operations* are those of all matrix products in the
compiled program, and of its loops times their iterations. The dense projection is a loop over its numbers: it is timed
for 64 of them, and the time is multiplied.

The other rows compile `attribution.per_example_projection` for an H100, on the shapes of GPT-2 small with `lax.scan`
over the layers and `jax.checkpoint` in the loop: 16 × 16 numbers for each weight of each layer. They are compared with
`jit(value_and_grad(mean loss))`. Nothing is run: memory is that of temporary arrays and results, and times are modeled
from the bytes that each kernel moves and the operations of its products (`benchmarks/compiled/program.py`).""",
    (
        report.label("compared with"),
        of_unit("operations, 10⁹", costs, 1e-9),
        of_ours("projection, operations", costs),
        of_unit("ms", seconds, 1e3),
        of_ours("projection, time", seconds),
        of_unit("MiB", held, 2.0**-20),
        of_ours("projection, memory", held),
    ),
    workloads,
    measured,
)
