"""per_example_grad compared with a plain gradient, on eight models and on the exercise."""

from collections.abc import Iterator
from typing import Any

from benchmarks import exercise, report
from benchmarks.functions import factored, max_norm, norms, plain, weighted, materialized
from benchmarks.models import Model, models
from benchmarks.workload import Settings, Theme, Workload, same
from jaxgrad import per_example_grad
from jaxgrad.network import closed_form, loss

NAME = "transform"
MAX_NORM = 0.1


def workload(model: Model) -> Workload:
    bound = max_norm(model)
    return Workload(
        model.name,
        {
            "plain": plain(model),
            "jaxgrad": factored(model, bound),
            "norms": norms(model),
            "sum": weighted(model),
            "vmap(grad)": materialized(model, bound),
        },
        (model.params, *model.batch),
        agree=("jaxgrad", "vmap(grad)"),
        goal=model.goal,
        sample=model.first(4),
        materialized_bytes={"vmap(grad)": model.gradient_bytes},
        timed_last=("vmap(grad)",),
    )


def the_exercise(size: tuple[int, int, int] = (256, 784, 1024)) -> Workload:
    params, X, Y = exercise.problem(*size)
    model = Model("exercise", loss, params, (X, Y), 1.0)

    def by_hand(params: Any, X: Any, Y: Any) -> Any:
        return closed_form.factored_grads(params, X, Y).clip(MAX_NORM).sum()

    def found(params: Any, X: Any, Y: Any) -> Any:
        return per_example_grad(loss)(params, X, Y).clip(MAX_NORM).sum()

    functions = {"plain": plain(model), "jaxgrad": found, "norms": norms(model), "sum": weighted(model)}
    functions["by hand"] = by_hand
    return Workload(
        f"the exercise's own loss, (B, D, H) = {size}",
        functions | {"vmap(grad)": materialized(model, MAX_NORM)},
        (params, X, Y),
        agree={"jaxgrad": same, "by hand": same, "vmap(grad)": lambda both: both[1]},
        goal=1.0,
        timed_last=("vmap(grad)",),
    )


def workloads(settings: Settings) -> Iterator[Workload]:
    for model in models():
        if settings.wants(NAME, model.name):
            yield workload(model)
    yield the_exercise()


THEME = Theme(
    NAME,
    "per_example_grad against a plain gradient",
    """
Plain, `jit(value_and_grad(mean loss))`, is 1.00. `jaxgrad` is the mean loss, the norms and the clipped sum of the
per-example gradients as factors; `norms` has no sum, and `sum` has weights that are known beforehand and no norms.
`vmap(grad)` is the first after `vmap(jax.grad)`; `by hand` starts from hand-written factors. float32. Memory is the
compiled program's temporary memory; compiling is tracing and compiling together.""",
    (
        report.milliseconds("plain"),
        report.ratio("jaxgrad"),
        report.goal(),
        report.ratio("norms"),
        report.ratio("sum"),
        report.ratio("by hand"),
        report.ratio("vmap(grad)"),
        report.mebibytes("plain"),
        report.memory("jaxgrad"),
        report.memory("vmap(grad)"),
        report.compiling("jaxgrad"),
    ),
    workloads,
    note="""
Where the floor is. `sum` does the plain gradient's matrix products and scales one side of every matrix: where it is
above 1.00, so is `jaxgrad`, which has the norms besides. In the MLP those read both sides of every matrix twice, for
the power of two by which they are scaled and for the squares. The products for the weights have to wait for the norms,
and so cannot run beside the elementwise parts of the backward pass, as they do in a plain gradient. With T positions
the norm of a D × D matrix takes 2·T²·D multiplications, of 3·T·D² for a plain gradient 2T/3D: 17 % at T = 128 and
D = 512, or T = 64 and D = 256; what `sum` saves on the plain gradient, which turns its operands, pays for them or not.
In the embedding, plain writes 49 MiB of zeros and little else. To compile the conv net is to compile three loops over
blocks of unfolded images as well, which bound its memory.

Freed memory is kept because glibc by itself returns blocks above 32 MiB to the kernel after every call, and to fault
them in again can take longer than the gradient: 28 MiB and 36 MiB are then far apart. In a program of your own that
runs on a CPU, `MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=2147483647` in its environment does the same.
""",
)
