"""The exercise's closed form compared with `jax.grad`."""

import functools
from collections.abc import Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp

from benchmarks import report
from benchmarks.workload import Settings, Theme, Workload, identity
from jaxgrad.network import Params, closed_form, init_params, loss

SIZES = ((256, 784, 1024), (1024, 784, 512), (4096, 64, 64), (4096, 30, 16))  # B, D, H


def mean_loss(params: Params, X: jax.Array, Y: jax.Array) -> jax.Array:
    return jax.vmap(loss, in_axes=(None, 0, 0))(params, X, Y).mean()


def problem(B: int, D: int, H: int, dtype: Any = jnp.float32) -> tuple[Params, jax.Array, jax.Array]:
    kp, kx, ky = jax.random.split(jax.random.key(0), 3)
    X = jax.random.normal(kx, (B, D), dtype)
    return init_params(kp, D, H, dtype=dtype), X, jnp.where(jax.random.bernoulli(ky, shape=(B,)), 1, -1).astype(dtype)


plain = jax.value_and_grad(mean_loss)
per_example = jax.vmap(jax.grad(loss), in_axes=(None, 0, 0))


def jvp_of_grad(params: Params, V: Params, X: jax.Array, Y: jax.Array) -> tuple[Params, Params]:
    return jax.jvp(lambda p: jax.grad(mean_loss)(p, X, Y), (params,), (V,))


def tangent_only(params: Params, V: Params, X: jax.Array, Y: jax.Array) -> Params:
    return jvp_of_grad(params, V, X, Y)[1]


# operation, baseline, goal, closed form, baseline function, the part of the baseline's result that is compared
ROWS: tuple[tuple[str, str, float | None, Any, Any, Any], ...] = (
    ("value_and_grad", "jit(value_and_grad(mean loss))", 1.00, closed_form.value_and_grad, plain, None),
    ("batched_grad", "jit(vmap(grad))", 1.05, closed_form.batched_grad, per_example, None),
    (
        "hessian_vector_product",
        "jit(jvp of grad): gradient and product",
        0.90,
        closed_form.hessian_vector_product,
        jvp_of_grad,
        lambda pair: pair[1],
    ),
    (
        "hessian_vector_product",
        "jit(jvp of grad): product only",
        None,
        closed_form.hessian_vector_product,
        tangent_only,
        None,
    ),
)


def workloads(settings: Settings) -> Iterator[Workload]:
    for size in SIZES:
        params, X, Y = problem(*size)
        V = init_params(jax.random.key(1), *size[1:])
        for operation, baseline, goal, closed, autodiff, comparable in ROWS:
            yield Workload(
                f"{size} {operation}",
                {"jax.grad": autodiff, "closed form": closed},
                (params, V, X, Y) if operation == "hessian_vector_product" else (params, X, Y),
                agree={"closed form": identity, "jax.grad": comparable or identity},
                compare=functools.partial(chex.assert_trees_all_close, rtol=1e-3, atol=1e-5),
                goal=goal,
                unit="jax.grad",
                labels={"baseline": baseline},
            )


THEME = Theme(
    "exercise",
    "The exercise: closed form and jax.grad",
    """
Each row shows the sizes (B, D, H) and a function of `jg.network.closed_form`, which is compared with the use of
`jax.grad` in the column `baseline`. `ratio` is the time of the closed form divided by that of the baseline;
`closed form, memory` is the same ratio for memory. All arrays are float32.""",
    (
        report.label("baseline"),
        report.milliseconds("closed form"),
        report.milliseconds("jax.grad"),
        report.ratio("closed form", title="ratio"),
        report.goal(),
        report.mebibytes("jax.grad"),
        report.memory("closed form"),
    ),
    workloads,
    note="""
Why the ratios are near 1: both ways take two matrix products for a gradient and three for a Hessian-vector product,
and on the large sizes these take nearly all of the time. `jax.jvp` of `jax.grad` computes the gradient too. If the
gradient is discarded, the compiler removes it, and both ways compute the same three products and differ only in
elementwise operations. `batched_grad` spends its time on writing B·H·D numbers.
""",
)
