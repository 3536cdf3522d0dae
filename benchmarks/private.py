"""A step of gradient descent with clipped gradients, compared with a plain step."""

from collections.abc import Iterator
from typing import Any

import jax

from benchmarks import report
from benchmarks.functions import clipped, jax_privacy, max_norm, optax, plain, writes
from benchmarks.models import Model, models
from benchmarks.workload import Settings, Theme, Workload

NAME = "private"
RATE = 1e-3


def step(gradient: Any) -> Any:
    """One step of plain gradient descent with a gradient function: it returns (new parameters, mean loss)."""
    if isinstance(gradient, str):
        return gradient

    def run(params: Any, *batch: Any) -> Any:
        value, total = gradient(params, *batch)
        return jax.tree.map(lambda p, t: p - RATE * t.astype(p.dtype), params, total), value

    return run


def workload(model: Model) -> Workload:
    bound = max_norm(model)
    theirs = jax_privacy(model, bound) | {"optax": optax(model, bound)}
    functions = {"plain": plain(model), "clipped": clipped(model, bound)} | theirs
    return Workload(
        model.name,
        {name: step(gradient) for name, gradient in functions.items()},
        (model.params, *model.batch),
        agree=("clipped", *theirs),
        sample=model.first(4),
        materialized_bytes=materialized_bytes(model, theirs),
        timed_last=tuple(theirs),
    )


def workloads(settings: Settings) -> Iterator[Workload]:
    for model in models():
        if settings.wants(NAME, model.name):
            yield workload(model)


THEME = Theme(
    NAME,
    "A clipped step against a plain one",
    """
Plain, a step with `jit(value_and_grad(mean loss))`, is 1.00; clipped is `jaxgrad.clipped_grad`, with a mask, the
loss's values and the norms. All end in the same update of the parameters, without noise. jax-privacy's clipped_grad is
timed at the microbatch size that is fastest of those that divide the batch (of None, the whole batch, 64, 16, 4 and 1),
where its gradients fit into memory; optax is `vmap(jax.grad)` and `per_example_global_norm_clip`. float32. Memory is
the compiled program's temporary memory.""",
    (
        report.milliseconds("plain"),
        report.ratio("clipped"),
        report.ratio("jax-privacy", title="jax-privacy (microbatch)"),
        report.ratio("jax-privacy", to="clipped", title="jax-privacy/clipped"),
        report.ratio("optax"),
        report.mebibytes("plain"),
        report.memory("clipped"),
        report.memory("jax-privacy"),
        report.memory("optax"),
    ),
    workloads,
    note="""
What a clipped step has beyond norms and a clipped sum: an example that is masked or whose gradient is not finite adds
exactly zero, and as 0 · NaN is NaN, both sides of every factor are written once more with such examples left out,
whether there are any or not. Where T positions are many and examples few, the gradients written out (optax) take little
more time; they take the memory.
""",
)
