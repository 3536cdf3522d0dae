"""The table of compiled programs: the bytes, memory and products on an H100 and a TPU, relative to a plain gradient."""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import functions, models, report
from benchmarks.compiled.program import Counts, Program
from benchmarks.compiled.targets import TARGETS, V5E, NotInstalledError, Target, compile_for, memory
from benchmarks.models import Model
from benchmarks.workload import Column, Row, Settings, Theme, Workload

NAME = "compiled"
DTYPES = ("float32", "bfloat16")
GPT_2_SMALL = {"L": 12, "V": 50304, "D": 768, "B": 8}
UNIT, ONE, TWO, BY_LAYER = "plain", "one pass", "two passes", "by layer"


def select_models(
    target: Target, small: bool
) -> Iterator[tuple[Callable[[], Model], tuple[str, ...], tuple[str, ...]]]:
    """(model, dtypes, columns). A TPU has only two models, because its compiler takes minutes for each."""
    one_pass = (UNIT, ONE)
    if small:
        yield lambda: models.mlp((64, 64, 10), 32), DTYPES, one_pass
        return
    yield lambda: models.mlp((1024, 4096, 4096, 4096, 10), 4096), DTYPES, one_pass
    yield lambda: models.transformer(1024, 128, 64), DTYPES, one_pass
    if target is V5E:
        return
    yield lambda: models.transformer(1024, 1024, 8), DTYPES, one_pass
    yield lambda: models.language_model(50_000, 1024, 128, 16), DTYPES, one_pass
    yield lambda: models.conv_net(1024), DTYPES, one_pass
    yield lambda: models.gru(1024, 64, 256), DTYPES, one_pass
    for T in (128, 320, 1024, 4096):
        deep = functools.partial(models.deep_language_model, T=T, **GPT_2_SMALL)
        yield deep, DTYPES, (UNIT, ONE, TWO, BY_LAYER)


def shape_structs(tree: Any, dtype: str) -> Any:
    """The shapes of the arrays in a tree, with this dtype for floating-point arrays."""

    def struct(a: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(a.shape, dtype if jnp.issubdtype(a.dtype, jnp.floating) else a.dtype)

    return jax.tree.map(struct, tree)


def gradient(model: Model, name: str) -> functions.Function:
    if name == UNIT:
        return functions.plain(model)
    if name == BY_LAYER:
        return functions.clipped_by_layer(model, 1.0)
    return functions.factored(model, 1.0) if name == ONE else functions.clipped(model, 1.0, passes=2)


def workloads(settings: Settings) -> Iterator[Workload]:
    for target in TARGETS:
        for make, dtypes, names in select_models(target, settings.small):
            model = make()
            arguments = (model.params, *model.batch)
            for dtype in dtypes:
                name = f"{model.name}, {dtype}, {target.name}"
                if settings.wants(NAME, name):
                    columns = {column: gradient(model, column) for column in names}
                    labels = {"dtype": dtype, "target": target.name}
                    yield Workload(name, columns, shape_structs(arguments, dtype), section=target.name, labels=labels)


def measure_row(workload: Workload, settings: Settings) -> list[Row]:
    """Compile the programs of one model, dtype and target, and count what they do."""
    (target,) = (t for t in TARGETS if t.name == workload.labels["target"])
    row = Row(workload.name, workload.section, unit=UNIT, labels=workload.labels)
    try:
        device = target.device()
    except NotInstalledError:
        row.skipped = dict.fromkeys(workload.functions, f"pip install 'jaxgrad[{target.extra}]'")
        return [row]
    for name, function in workload.functions.items():
        jax.clear_caches()
        start = time.perf_counter()
        program = compile_for(function, workload.arguments, device)
        row.compiling[name] = time.perf_counter() - start
        row.bytes[name] = memory(program)
        row.costs[name] = costs(Program(program.as_text()).counts(target.peak), target)
    return [row]


def costs(counts: Counts, target: Target) -> dict[str, float]:
    products = {f"products in {dtype}": float(n) for dtype, n in counts.products.items()}
    return {"bytes moved": counts.bytes, "kernels": counts.kernels, "modeled seconds": counts.seconds} | products


def cost(name: str, key: str, scale: float, title: str) -> Column:
    def cell(row: Row) -> str:
        return report.number(row.costs[name][key] * scale) if name in row.costs else report.skip_reason(row, name)

    return Column(title, cell)


def cost_ratio(name: str, key: str, title: str) -> Column:
    def cell(row: Row) -> str:
        return report.number(row.costs[name][key] / row.costs[row.unit][key]) if name in row.costs else ""

    return Column(title, cell)


def memory_ratio(name: str) -> Column:
    def cell(row: Row) -> str:
        return report.number(row.bytes[name] / row.bytes[row.unit]) if name in row.bytes else ""

    return Column(f"{name}, memory", cell)


def float32_share(name: str) -> Column:
    """The share of operations that are in products of float32, for models of a narrower dtype."""

    def cell(row: Row) -> str:
        if name not in row.costs or row.labels["dtype"] == "float32":
            return ""
        products = {k: n for k, n in row.costs[name].items() if k.startswith("products")}
        return f"{sum(n for k, n in products.items() if 'f32' in k) / sum(products.values()):.0%}"

    return Column(f"{name}, in float32", cell)


LIMITS = """
What limits the ratios (`python -m benchmarks.compiled.kernels MODEL DTYPE DEVICE` lists the kernels of a row):

- A side that is multiplied with itself, for the norm over T positions, is first divided by a power of two, so that no
  square overflows or underflows. XLA does not join this division to the product, because the power is neither a
  constant nor a parameter of the computation, and writes a copy of the side: 2 × 128 MiB for each of the larger sides
  of the transformer block in float32, and 786 MiB for the cotangents of the logits. A plain gradient has neither these
  copies nor the products. With more positions, where the gradient itself is smaller than its sides, it is materialized
  for the norm without a copy: that is why the ratios of two passes fall as T grows.
- Two passes end with an operation on every sum, which makes a sum without examples exactly zero. It moves 0.09 of a
  plain gradient's bytes for the language model with layers at T = 128, 0.04 at T = 320, and 0.01 at T = 1024.
- Sums are in float32 and are rounded to the parameters' dtype once. In the language model in bfloat16, that is a
  float32 array of the vocabulary's size, which is written, read and cast: 0.4 GiB.
- The convolutional network materializes the gradients of its first two layers for each example, from windows that XLA
  writes before it multiplies them: 0.3 GiB in float32 for the second layer.
- The cotangents of a recurrent network's gates are held for all steps, because its weights are used in every step.
- On a TPU, XLA rounds the cotangents of a plain gradient to bfloat16 as it writes them, because products read nothing
  else. Norms read them too, and keep them in float32.
- Bounds by layer are sums in float32 also for models in bfloat16, whose plain gradient is in bfloat16.
""".strip()


def note(rows: Sequence[Row]) -> str:
    rates = [
        f"{t.name}: {t.peak.bytes / 1e12:.2f} TB/s; "
        + ", ".join(f"{dtype} {rate / 1e12:.0f} TFLOP/s" for dtype, rate in t.peak.operations.items())
        for t in TARGETS
    ]
    return LIMITS + "\n\nThe modeled times use the rates on the data sheets. " + ". ".join(rates) + "."


THEME = Theme(
    NAME,
    "Compiled for accelerators",
    """
This table needs no device. The compilers of an H100 (through `jax-cuda12-plugin`) and of a TPU v5e (through `libtpu`)
compile the programs ahead of time, and the numbers come from the compiled programs. `plain` is
`jit(value_and_grad(mean loss))`. `one pass` is the mean loss, the norms and the clipped sum from
`per_example_value_and_grad`. `two passes` is `clipped_grad(passes=2)`. `by layer` is `clipped_grad` in one pass, with a
bound for each layer and for each parameter outside the layers.

The columns *moved*, *memory*, *time* and *compile time* are multiples of those of `plain`. *Moved* counts the bytes
that the kernels read and write; `benchmarks/compiled/program.py` says how kernels and bytes are counted. *Memory*
counts temporary arrays and results. *Time* is modeled, not measured: each kernel takes the time for its bytes or the
time for the operations of its products, whichever is longer, at the rates of the device. *In float32* is, for models in
bfloat16, the share of the products' operations whose operands are in float32.""",
    (
        cost(UNIT, "bytes moved", 2.0**-30, "plain, GiB moved"),
        cost_ratio(ONE, "bytes moved", "one pass, moved"),
        cost_ratio(TWO, "bytes moved", "two passes, moved"),
        cost_ratio(BY_LAYER, "bytes moved", "by layer, moved"),
        report.mebibytes(UNIT),
        memory_ratio(ONE),
        memory_ratio(TWO),
        memory_ratio(BY_LAYER),
        cost(UNIT, "kernels", 1, "plain, kernels"),
        cost(ONE, "kernels", 1, "one pass, kernels"),
        float32_share(ONE),
        cost(UNIT, "modeled seconds", 1e3, "plain, modeled ms"),
        cost_ratio(ONE, "modeled seconds", "one pass, time"),
        cost_ratio(TWO, "modeled seconds", "two passes, time"),
        cost_ratio(BY_LAYER, "modeled seconds", "by layer, time"),
        report.compile_time(ONE),
    ),
    workloads,
    measure_row,
    note,
    timed=False,
)
