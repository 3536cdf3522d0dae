"""`per_example_grad` compared with a plain gradient, on eight models and on the exercise."""

from collections.abc import Iterator
from typing import Any

from benchmarks import exercise, report
from benchmarks.functions import factored, materialized, max_norm, norms, plain, weighted_sum
from benchmarks.models import Model, models
from benchmarks.workload import Settings, Theme, Workload, identity
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
            "sum": weighted_sum(model),
            "vmap(grad)": materialized(model, bound),
        },
        (model.params, *model.batch),
        agree=("jaxgrad", "vmap(grad)"),
        goal=model.goal,
        sample=model.first(4),
        materialized_bytes={"vmap(grad)": model.gradient_bytes},
        timed_last=("vmap(grad)",),
    )


def exercise_workload(size: tuple[int, int, int] = (256, 784, 1024)) -> Workload:
    params, X, Y = exercise.problem(*size)
    model = Model("exercise", loss, params, (X, Y), 1.0)

    def by_hand(params: Any, X: Any, Y: Any) -> Any:
        return closed_form.factored_grads(params, X, Y).clip(MAX_NORM).sum()

    def from_jaxpr(params: Any, X: Any, Y: Any) -> Any:
        return per_example_grad(loss)(params, X, Y).clip(MAX_NORM).sum()

    functions = {"plain": plain(model), "jaxgrad": from_jaxpr, "norms": norms(model), "sum": weighted_sum(model)}
    functions["by hand"] = by_hand
    return Workload(
        f"the exercise's own loss, (B, D, H) = {size}",
        functions | {"vmap(grad)": materialized(model, MAX_NORM)},
        (params, X, Y),
        agree={"jaxgrad": identity, "by hand": identity, "vmap(grad)": lambda pair: pair[1]},
        goal=1.0,
        timed_last=("vmap(grad)",),
    )


def workloads(settings: Settings) -> Iterator[Workload]:
    for model in models():
        if settings.wants(NAME, model.name):
            yield workload(model)
    yield exercise_workload()


THEME = Theme(
    NAME,
    "per_example_grad and a plain gradient",
    """
`plain` is `jit(value_and_grad(mean loss))`; the columns *time*, *memory* and *compile time* are multiples of it.
`jaxgrad` computes the mean loss, the norms and the clipped sum of the per-example gradients from factors. `norms`
computes only the norms; `sum` computes only a sum with weights that are known in advance. `vmap(grad)` computes the
same as `jaxgrad` from the gradients that `vmap(jax.grad)` materializes. `by hand` starts from factors that were derived
by hand. All arrays are float32. Memory is the temporary memory of the compiled program. Compile time includes
tracing.""",
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
        report.compile_time("jaxgrad"),
    ),
    workloads,
    note="""
What limits the ratios:

- `sum` computes the matrix products of a plain gradient and scales one array of every factor. `jaxgrad` also computes
  the norms, so it is above 1.00 wherever `sum` is.
- In the MLP, the norms read both arrays of every factor twice: once for the power of two that scales the array, and
  once for the squares. The products that make the weights' gradients depend on the norms, so these products cannot
  overlap with the elementwise operations of the backward pass, as they do in a plain gradient.
- With T positions, the norm of a D × D weight's gradient takes 2·T²·D multiplications. A plain gradient takes 3·T·D²,
  so the norm adds 2T/3D: 17 % at T = 128 and D = 512, or at T = 64 and D = 256. `sum` is cheaper than a plain
  gradient, which transposes its operands, and this may make up for the norms.
- In the embedding, a plain gradient mostly writes 49 MiB of zeros.
- The conv net compiles slowly because three loops over blocks of unfolded images are compiled with it. These loops
  bound its memory.

These benchmarks make glibc keep freed memory. By default it returns blocks above 32 MiB to the kernel after every
call, and the page faults of the next call can take longer than the gradient. Functions that need 28 MiB and 36 MiB
would then take very different times. To do the same in your own program on a CPU, set
`MALLOC_MMAP_THRESHOLD_=1073741824` and `MALLOC_TRIM_THRESHOLD_=2147483647` in its environment.
""",
)
