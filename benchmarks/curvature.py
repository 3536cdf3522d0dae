"""Quantities that are cheap to compute from factors: neural tangent kernels, natural gradients, and others."""

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


def gradient_matrix(model: Model, params: Any, batch: Any) -> jax.Array:
    """G [B, parameters], from the gradients that vmap(jax.grad) materializes."""
    G = jax.vmap(jax.grad(model.loss), (None, *[0] * len(batch)))(params, *batch)
    return jnp.concatenate([leaf.reshape(len(leaf), -1) for leaf in jax.tree.leaves(G)], 1)


def step(params: Any, direction: Any) -> Any:
    return jax.tree.map(lambda p, d: p - RATE * d, params, direction)


def quantities(model: Model) -> dict[str, tuple[Function, Function]]:
    """By name: (function of params and factors, function of params and the materialized matrix G)."""

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


def quantity_workload(model: Model, name: str) -> Workload:
    from_factors, dense = quantities(model)[name]

    def factored(params: Any, *batch: Any) -> Any:
        values, g = jg.per_example_value_and_grad(model.loss)(params, *batch)
        return values.mean(), from_factors(params, g)

    def materialized(params: Any, *batch: Any) -> Any:
        return mean_loss(model, params, batch), dense(params, gradient_matrix(model, params, batch))

    return workload(model, name, factored, materialized, GOALS.get(name))


def mean_loss(model: Model, params: Any, batch: Any) -> jax.Array:
    return jax.vmap(model.loss, (None, *[0] * len(batch)))(params, *batch).mean()


def tangent_kernel(model: Model) -> Workload:
    """The neural tangent kernel of a model with one output, which stands in for the loss."""

    def materialized(params: Any, *batch: Any) -> Any:
        J = gradient_matrix(model, params, batch)
        return J @ J.T

    output = lambda params, example: model.loss(params, *example)  # noqa: E731
    return workload(model, "NTK", lambda params, *batch: jg.attribution.ntk(output)(params, batch), materialized, 1.2)


def kfac(model: Model) -> Workload:
    """KFAC factors. No column compares with them, since they cannot be computed from materialized gradients."""

    def factored(params: Any, *batch: Any) -> Any:
        values, g = jg.per_example_value_and_grad(model.loss)(params, *batch)
        return values.mean(), curvature.kfac_factors(g)

    return workload(model, "KFAC factors", factored, "not applicable", 1.3)


def workload(model: Model, name: str, factored: Function, materialized: Function | str, goal: float | None) -> Workload:
    return Workload(
        f"{name}: {model.name}",
        {"plain": plain(model), "jaxgrad": factored, "vmap(grad)": materialized},
        (model.params, *model.batch),
        agree=("jaxgrad", "vmap(grad)"),
        compare=functools.partial(chex.assert_trees_all_close, rtol=5e-3, atol=1e-3),
        goal=goal,
        materialized_bytes={"vmap(grad)": model.gradient_bytes},
        timed_last=("vmap(grad)",),
    )


def first_output(model: Model) -> Model:
    """The model with its first output in place of the loss."""

    def output(params: Any, x: jax.Array) -> jax.Array:
        for layer in params[:-1]:
            x = jax.nn.relu(x @ layer["W"] + layer["b"])
        return (x @ params[-1]["W"] + params[-1]["b"])[0]

    return model._replace(loss=output, batch=model.batch[:1])


def workloads(settings: Settings) -> Iterator[Workload]:
    yield tangent_kernel(first_output(mlp((256, 512, 512, 512, 1))))
    yield kfac(mlp())
    for name in ("natural gradient step", "self-influence, damped", "Fisher product", "noise scale"):
        yield quantity_workload(mlp(), name)


THEME = Theme(
    "curvature",
    "Curvature and attribution",
    """
`plain` is `jit(value_and_grad(mean loss))`; for the neural tangent kernel (NTK) it is the gradient of the mean output.
The columns *time* and *memory* are multiples of it. `jaxgrad` computes the quantity from factors, `vmap(grad)` from
the matrix of gradients that `vmap(jax.grad)` materializes. All arrays are float32. Memory is the temporary memory of
the compiled program.""",
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
The KFAC factors cannot reach their goal of 1.30. A plain gradient of this MLP takes 1.85 million multiplications per
example: for the forward pass, the backward pass and the weights' gradients. The KFAC factors replace the weights'
gradients by the products δδᵀ and xxᵀ, which makes 2.82 million, or 1.52 times as many. They would be cheaper if XLA
computed only half of a symmetric product.

OpenBLAS runs on one thread (`OPENBLAS_NUM_THREADS=1`). JAX's Cholesky decomposition calls it on a CPU, and if its
threads compete with XLA's, a step takes 20 times as long.
""",
)
