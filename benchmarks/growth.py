"""Time and memory as the batch and the model grow. `benchmarks.picture` draws the results."""

from collections.abc import Iterator

import jax

from benchmarks import models, report
from benchmarks.functions import factored, materialized, max_norm, plain
from benchmarks.workload import Settings, Theme, Workload

NAME = "growth"
SIZES = ((32, 32), (64, 64), (128, 128), (256, 256), (512, 512), (1024, 1024), (2048, 1024))  # width, B


def workloads(settings: Settings) -> Iterator[Workload]:
    for width, B in SIZES:
        model = models.mlp((width, width, width, width, 10), B)
        if not settings.wants(NAME, model.name):
            continue
        bound = max_norm(model)
        parameters = sum(leaf.size for leaf in jax.tree.leaves(model.params))
        yield Workload(
            model.name,
            {"plain": plain(model), "jaxgrad": factored(model, bound), "vmap(grad)": materialized(model, bound)},
            (model.params, *model.batch),
            agree=("jaxgrad", "vmap(grad)"),
            sample=model.first(4),
            materialized_bytes={"vmap(grad)": model.gradient_bytes},
            timed_last=("vmap(grad)",),
            labels={"B × parameters": f"{B * parameters}"},
        )


THEME = Theme(
    NAME,
    "Growth",
    """
Norms and clipped sum of the per-example gradients of MLPs: `jaxgrad` computes them from factors, `vmap(grad)` from the
gradients that `vmap(jax.grad)` materializes. `plain` is `jit(value_and_grad(mean loss))`. All arrays are float32.
Memory is the temporary memory of the compiled program.""",
    (
        report.label("B × parameters"),
        report.milliseconds("plain"),
        report.milliseconds("jaxgrad"),
        report.milliseconds("vmap(grad)"),
        report.mebibytes("plain"),
        report.mebibytes("jaxgrad"),
        report.mebibytes("vmap(grad)"),
    ),
    workloads,
)
