"""Quantities that a Gram matrix or the factors make cheap: neural tangent kernels, natural gradients, and others."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

import jaxgrad as jg
from benchmarks import report
from benchmarks.functions import plain
from benchmarks.models import Model, mlp
from benchmarks.workload import Settings, Theme, Workload
from jaxgrad import attribution, curvature

DAMPING = 1e-2
RATE = 0.1
Function = Callable[..., Any]


def rows(model: Model, params: Any, batch: Any) -> jax.Array:
    """G [B, parameters], from the gradients that vmap(jax.grad) returns."""
    G = jax.vmap(jax.grad(model.loss), (None, *[0] * len(batch)))(params, *batch)
    return jnp.concatenate([leaf.reshape(len(leaf), -1) for leaf in jax.tree.leaves(G)], 1)


def step(params: Any, direction: Any) -> Any:
    return jax.tree.map(lambda p, d: p - RATE * d, params, direction)


def on_gradients(model: Model) -> dict[str, tuple[Function, Function]]:
    """name: (function of params and factors, function of params and the materialized matrix)."""

    def dense_step(params: Any, G: jax.Array) -> Any:
        _, unravel = ravel_pytree(params)
        weights = curvature.damped_solve(G @ G.T, jnp.ones(len(G)), DAMPING * len(G))
        return step(params, unravel(weights @ G))

    def dense_leverage(_: Any, G: jax.Array) -> Any:
        K = G @ G.T
        return len(G) * jnp.diagonal(curvature.damped_solve(K, K, DAMPING * len(G)))

    def dense_noise(_: Any, G: jax.Array) -> Any:
        trace = G.var(0, ddof=1).sum()
        return trace, (G.mean(0) ** 2).sum() - trace / len(G)

    return {
        "natural gradient step": (lambda p, g: step(p, jg.curvature.natural_gradient(g, DAMPING)), dense_step),
        "self-influence, damped": (lambda p, g: jg.attribution.self_influence(g, DAMPING), dense_leverage),
        "Fisher product": (
            lambda p, g: jg.curvature.fisher_vector_product(g, p),
            lambda p, G: ravel_pytree(p)[1](G.T @ (G @ ravel_pytree(p)[0]) / len(G)),
        ),
        "noise scale": (lambda p, g: attribution.noise_scale(g)[:2], dense_noise),
    }


GOALS = {"natural gradient step": 3.0}


def of_gradients(model: Model, name: str) -> Workload:
    ours, dense = on_gradients(model)[name]

    def factored(params: Any, *batch: Any) -> Any:
        values, g = jg.per_example_value_and_grad(model.loss)(params, *batch)
        return values.mean(), ours(params, g)

    def written(params: Any, *batch: Any) -> Any:
        return plain_value(model, params, batch), dense(params, rows(model, params, batch))

    return workload(model, name, factored, written, GOALS.get(name))


def plain_value(model: Model, params: Any, batch: Any) -> jax.Array:
    return jax.vmap(model.loss, (None, *[0] * len(batch)))(params, *batch).mean()


def kernel(model: Model) -> Workload:
    """The kernel of a scalar model, which is passed in place of a loss."""

    def written(params: Any, *batch: Any) -> Any:
        J = rows(model, params, batch)
        return J @ J.T

    one = lambda params, example: model.loss(params, *example)  # noqa: E731
    return workload(model, "NTK", lambda params, *batch: jg.attribution.ntk(one)(params, batch), written, 1.2)


def kronecker(model: Model) -> Workload:
    """Without a column to compare with: KFAC factors cannot be computed from materialized gradients."""

    def factored(params: Any, *batch: Any) -> Any:
        values, g = jg.per_example_value_and_grad(model.loss)(params, *batch)
        return values.mean(), curvature.kfac_factors(g)

    return workload(model, "KFAC factors", factored, "no factors", 1.3)


def workload(model: Model, name: str, ours: Function, written: Function | str, goal: float | None) -> Workload:
    return Workload(
        f"{name}: {model.name}",
        {"plain": plain(model), "jaxgrad": ours, "vmap(grad)": written},
        (model.params, *model.batch),
        agree=("jaxgrad", "vmap(grad)"),
        compare=functools.partial(chex.assert_trees_all_close, rtol=5e-3, atol=1e-3),
        goal=goal,
        materialized_bytes={"vmap(grad)": model.gradient_bytes},
        timed_last=("vmap(grad)",),
    )


def scalar(model: Model) -> Model:
    """The model with its output in place of a loss."""

    def output(params: Any, x: jax.Array) -> jax.Array:
        for layer in params[:-1]:
            x = jax.nn.relu(x @ layer["W"] + layer["b"])
        return (x @ params[-1]["W"] + params[-1]["b"])[0]

    return model._replace(loss=output, batch=model.batch[:1])


def workloads(settings: Settings) -> Iterator[Workload]:
    yield kernel(scalar(mlp((256, 512, 512, 512, 1))))
    yield kronecker(mlp())
    for name in ("natural gradient step", "self-influence, damped", "Fisher product", "noise scale"):
        yield of_gradients(mlp(), name)


THEME = Theme(
    "curvature",
    "Curvature and attribution",
    """
Plain, `jit(value_and_grad(mean loss))` (for the kernel: of the mean output), is 1.00; `vmap(grad)` is the same quantity
from the matrix that `vmap(jax.grad)` writes out. float32. Memory is the compiled program's temporary memory.""",
    (
        report.milliseconds("plain"),
        report.ratio("jaxgrad"),
        report.goal(),
        report.ratio("vmap(grad)"),
        report.mebibytes("plain"),
        report.memory("jaxgrad"),
        report.memory("vmap(grad)"),
    ),
    workloads,
    note="""
Where the floor of the KFAC factors is. A plain gradient of this MLP takes 1.85 million multiplications an example:
forward, back, and for the weights. With the product of each side with itself in place of the last of these it is 2.82
million, 1.52 of that: the goal of 1.30 is out of reach for separate products, unless half of a symmetric one could be
had for half the time.

Solves are by one thread of OpenBLAS (`OPENBLAS_NUM_THREADS=1`): JAX's Cholesky decomposition on a CPU calls it, and
where its threads wait beside XLA's, a step takes 20 times as long.
""",
)
