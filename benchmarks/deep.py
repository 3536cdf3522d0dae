"""Clipped sums of deep models with scanned, checkpointed layers, in one pass and in two."""

from collections.abc import Iterator

from benchmarks import report
from benchmarks.functions import clipped, clipped_by_layer, max_norm, plain
from benchmarks.models import deep_language_model
from benchmarks.workload import Settings, Theme, Workload

NAME = "deep"
SIZES = ((128, 16), (512, 4), (1024, 2))  # (T, B)


def workloads(settings: Settings) -> Iterator[Workload]:
    for T, B in SIZES:
        model = deep_language_model(T=T, B=B)
        if settings.wants(NAME, model.name):
            bound = max_norm(model)
            functions = {
                "plain": plain(model),
                "one pass": clipped(model, bound),
                "two passes": clipped(model, bound, passes=2),
                "by layer": clipped_by_layer(model, bound),
            }
            arguments = (model.params, *model.batch)
            yield Workload(model.name, functions, arguments, agree=("one pass", "two passes"), sample=model.first(2))


THEME = Theme(
    NAME,
    "Deep models: one pass or two",
    """
`plain` is `jit(value_and_grad(mean loss))`, with `lax.scan` over the layers and `jax.checkpoint` in the loop; the
columns *time* and *memory* are multiples of it. `one pass` is `jaxgrad.clipped_grad`, which holds the factors of all
layers at once. `two passes` is `clipped_grad(passes=2)`, which computes each layer's norms inside the loop and then an
ordinary gradient of the weighted losses. `by layer` is `clipped_grad` in one pass, with a bound for each layer and for
each parameter outside the layers: the layers are clipped and summed inside the loop. All arrays are float32. Memory is
the temporary memory of the compiled program.""",
    (
        report.milliseconds("plain"),
        report.ratio("one pass"),
        report.ratio("two passes"),
        report.ratio("by layer"),
        report.mebibytes("plain"),
        report.memory("one pass"),
        report.memory("two passes"),
        report.memory("by layer"),
    ),
    workloads,
)
