"""The table of programs for slices of TPUs with sharded parameters: memory per chip, and bytes that a chip sends."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from benchmarks import functions, models, report
from benchmarks.compiled.communication import bytes_sent
from benchmarks.compiled.program import Program
from benchmarks.compiled.targets import V5E
from benchmarks.models import Model
from benchmarks.workload import Column, Row, Settings, Theme, Workload

NAME = "sharded"
AXIS = "chips"
PLAIN, ONE, TWO = "plain", "one pass", "two passes"


def select_models(small: bool) -> Iterator[tuple[str, str, Callable[[], Model]]]:
    """(slice, dtype, model)."""
    if small:
        yield "2x2", "float32", functools.partial(models.deep_transformer, 2, 256, 16, 16)
        yield "2x2", "float32", functools.partial(models.gpt_2_small, 16, 16, 2, 256, 64, 4)
        return
    yield "4x4", "float32", functools.partial(models.deep_transformer, 4, 512, 128, 64)
    yield "16x16", "float32", functools.partial(models.deep_transformer, 4, 512, 128, 1024)
    yield "4x4", "float32", functools.partial(models.gpt_2_small, 1024, 64)
    yield "16x16", "float32", functools.partial(models.gpt_2_small, 1024, 1024)


def workloads(settings: Settings) -> Iterator[Workload]:
    for topology, dtype, make in select_models(settings.small):
        model = make()
        name = f"{model.name}, {dtype}, v5e {topology}"
        if settings.wants(NAME, name):
            columns = {
                PLAIN: functions.plain(model, AXIS),
                ONE: functions.clipped(model, 1.0, axis=AXIS),
                TWO: functions.clipped(model, 1.0, passes=2, axis=AXIS),
            }
            labels = {"slice": topology, "dtype": dtype}
            yield Workload(name, columns, (model.params, *model.batch), labels=labels)


def fully_sharded(a: Any, mesh: Mesh) -> NamedSharding:
    """Shard a parameter over all chips along its longest axis that their number divides; a stack's first axis last."""
    axes = [k for k in range(a.ndim) if a.shape[k] % mesh.size == 0]
    axis = max(axes, key=lambda k: a.shape[k], default=None)
    return NamedSharding(mesh, PartitionSpec(*[None] * (axis or 0), *([] if axis is None else [AXIS])))


def measure_row(workload: Workload, settings: Settings) -> list[Row]:
    """Compile the programs of one model for one slice, and count what a chip holds and sends."""
    row = Row(workload.name, labels=workload.labels)
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=f"v5e:{workload.labels['slice']}")
    except Exception as error:  # plugins raise various errors; the table shows that the target is skipped
        row.skipped = dict.fromkeys(workload.functions, f"pip install 'jaxgrad[{V5E.extra}]' ({error})")
        return [row]
    mesh = Mesh(np.array(described.devices), (AXIS,), axis_types=(AxisType.Auto,))

    def struct(a: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        dtype = workload.labels["dtype"] if jnp.issubdtype(a.dtype, jnp.floating) else a.dtype
        return jax.ShapeDtypeStruct(a.shape, dtype, sharding=sharding)

    params, *batch = workload.arguments
    params = jax.tree.map(lambda a: struct(a, fully_sharded(a, mesh)), params)
    batch = [struct(a, NamedSharding(mesh, PartitionSpec(AXIS))) for a in batch]
    shardings = jax.tree.map(lambda a: a.sharding, params)
    for name, function in workload.functions.items():
        assert not isinstance(function, str)
        jax.clear_caches()
        with jax.set_mesh(mesh):
            program: Any = jax.jit(function, out_shardings=(None, shardings)).lower(params, *batch).compile()
        row.bytes[name] = program.memory_analysis().peak_memory_in_bytes
        row.costs[name] = {"sent": bytes_sent(Program(program.as_text()))}
    return [row]


def sent(name: str, over_plain: bool = False) -> Column:
    def cell(row: Row) -> str:
        if name not in row.costs:
            return report.skip_reason(row, name)
        return report.number(row.costs[name]["sent"] / (row.costs[PLAIN]["sent"] if over_plain else 2**20))

    return Column(f"{name}, sent" + ("" if over_plain else ", MiB"), cell)


def held(name: str) -> Column:
    def cell(row: Row) -> str:
        return report.number(row.bytes[name] / row.bytes[PLAIN]) if name in row.bytes else report.skip_reason(row, name)

    return Column(f"{name}, memory", cell)


THEME = Theme(
    NAME,
    "Sharded parameters",
    """
This table needs no device: the compiler of a TPU v5e (through `libtpu`) compiles the programs ahead of time for a slice
of 16 or 256 chips. The batch is sharded over all chips, and so is each parameter, along its longest axis (FSDP).
`plain` is `jit(value_and_grad(mean loss))`, with `lax.scan` over the layers and `jax.checkpoint` in the loop; `one
pass` and `two passes` are `clipped_grad`. Sums and gradients are sharded as the parameters are. The language model has
the sizes of GPT-2 small, and 4 examples on each chip; its parameters are in float32, and sharding constraints keep the
activations of an example on one chip.

*MiB* is the peak memory of one chip that the compiler reports, arguments and results included. *Sent* counts the bytes
that one chip sends with ring algorithms (`benchmarks/compiled/communication.py`). The other columns are multiples of
plain's.""",
    (
        report.mebibytes(PLAIN),
        held(ONE),
        held(TWO),
        sent(PLAIN),
        sent(ONE, over_plain=True),
        sent(TWO, over_plain=True),
    ),
    workloads,
    measure_row,
    timed=False,
)
