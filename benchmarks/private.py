"""A step of gradient descent with clipped gradients compared with a plain step."""

from collections.abc import Iterator
from typing import Any

import jax

from benchmarks import report
from benchmarks.functions import clipped, jax_privacy, materialized_bytes, max_norm, optax, plain
from benchmarks.models import Model, models
from benchmarks.workload import Settings, Theme, Workload

NAME = "private"
RATE = 1e-3


def step(gradient: Any) -> Any:
    """A step of gradient descent with a gradient function. The step returns (new parameters, mean loss)."""
    if isinstance(gradient, str):
        return gradient

    def run(params: Any, *batch: Any) -> Any:
        value, total = gradient(params, *batch)
        return jax.tree.map(lambda p, t: p - RATE * t.astype(p.dtype), params, total), value

    return run


def workload(model: Model) -> Workload:
    bound = max_norm(model)
    libraries = jax_privacy(model, bound) | {"optax": optax(model, bound)}
    functions = {"plain": plain(model), "clipped": clipped(model, bound)} | libraries
    return Workload(
        model.name,
        {name: step(gradient) for name, gradient in functions.items()},
        (model.params, *model.batch),
        agree=("clipped", *libraries),
        sample=model.first(4),
        materialized_bytes=materialized_bytes(model, libraries),
        timed_last=tuple(libraries),
    )


def workloads(settings: Settings) -> Iterator[Workload]:
    for model in models():
        if settings.wants(NAME, model.name):
            yield workload(model)


THEME = Theme(
    NAME,
    "A clipped step and a plain step",
    """
`plain` is a step with `jit(value_and_grad(mean loss))`; the columns *time* and *memory* are multiples of it. `clipped`
is `jaxgrad.clipped_grad` with a mask; it also returns the losses and the norms. `jax-privacy` is that library's
`clipped_grad` at its fastest microbatch size: 64, 16, 4, 1 or None, which is the whole batch. Sizes that do not divide
the batch, or whose gradients do not fit in memory, are left out. `optax` is `vmap(jax.grad)` and
`per_example_global_norm_clip`. All steps end with the same update of the parameters, without noise. All arrays are
float32. Memory is the temporary memory of the compiled program.""",
    (
        report.milliseconds("plain"),
        report.ratio("clipped"),
        report.ratio("jax-privacy", title="jax-privacy, time (microbatch)"),
        report.ratio("jax-privacy", unit="clipped", title="jax-privacy/clipped, time"),
        report.ratio("optax"),
        report.mebibytes("plain"),
        report.memory("clipped"),
        report.memory("jax-privacy"),
        report.memory("optax"),
    ),
    workloads,
    note="""
A clipped step does more than norms and a clipped sum: an example that is masked, or whose gradient is not finite, adds
exactly zero. Since 0 · NaN is NaN, a clipped step sets such examples to zero in both arrays of every factor, and
writes these arrays once more even if there are no such examples. With many positions and few examples, materialized
gradients (`optax`) take little more time but much more memory.
""",
)
