"""Clipped sums of deep models with scanned, checkpointed layers: one pass and two against a plain gradient."""

from collections.abc import Iterator

from benchmarks import report
from benchmarks.functions import clipped, max_norm, plain
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
            }
            arguments = (model.params, *model.batch)
            yield Workload(model.name, functions, arguments, agree=("one pass", "two passes"), sample=model.first(2))


THEME = Theme(
    NAME,
    "Deep models: one pass or two",
    """
Plain is `jit(value_and_grad(mean loss))` with `lax.scan` over the layers and `jax.checkpoint` in the loop, 1.00. One
pass is `jaxgrad.clipped_grad`, which holds the factors of all layers at once. Two passes is `clipped_grad(passes=2)`,
which takes each layer's norm inside the loop and then computes an ordinary gradient of the weighted losses. float32.
Memory is the compiled program's temporary memory.""",
    (
        report.milliseconds("plain"),
        report.ratio("one pass"),
        report.ratio("two passes"),
        report.mebibytes("plain"),
        report.memory("one pass"),
        report.memory("two passes"),
    ),
    workloads,
)
