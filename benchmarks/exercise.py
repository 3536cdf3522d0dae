"""The exercise's closed form against `jax.grad`: python -m benchmarks.exercise [--seconds S] [--write FILE.md]

Every pair is held to agree before it is timed. Each row is one interleaved run; the ratio is of medians, closed form
to jax.grad. Goals: value_and_grad 1.00, batched_grad 1.05, hessian_vector_product 0.90.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from benchmarks.timing import command_line, environment, medians
from jaxgrad.network import Params, closed_form, init_params, loss

SIZES = ((256, 784, 1024), (1024, 784, 512), (4096, 64, 64), (4096, 30, 16))  # B, D, H


NOTE = """
The limits: a gradient is two matrix products either way, a Hessian product three, and on the large sizes nearly all of
the time is theirs. jax.jvp of jax.grad computes the gradient too; where that is discarded and compiled away, both do
the same three products, and what is left to gain is elementwise. batched_grad writes B·H·D numbers: that is its time.
"""


def mean_loss(params: Params, X: jax.Array, Y: jax.Array) -> jax.Array:
    return jax.vmap(loss, in_axes=(None, 0, 0))(params, X, Y).mean()


plain = jax.jit(jax.value_and_grad(mean_loss))
per_example = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0, 0)))


@jax.jit
def jvp_of_grad(params: Params, V: Params, X: jax.Array, Y: jax.Array) -> tuple[Params, Params]:
    return jax.jvp(lambda p: jax.grad(mean_loss)(p, X, Y), (params,), (V,))


@jax.jit
def tangent_only(params: Params, V: Params, X: jax.Array, Y: jax.Array) -> Params:
    return jax.jvp(lambda p: jax.grad(mean_loss)(p, X, Y), (params,), (V,))[1]


def rows(
    B: int, D: int, H: int
) -> list[tuple[str, str, float, Callable[[], Any], Callable[[], Any], Callable[[], Any]]]:
    """(what, against, goal, ours, theirs, theirs as comparable with ours)."""
    kp, kv, kx, ky = jax.random.split(jax.random.key(0), 4)
    params, V = init_params(kp, D, H), init_params(kv, D, H)
    X = jax.random.normal(kx, (B, D), jnp.float32)
    Y = jnp.where(jax.random.bernoulli(ky, shape=(B,)), 1, -1).astype(X.dtype)

    def product() -> Params:
        return closed_form.hessian_vector_product(params, V, X, Y)

    return [
        (
            "value_and_grad",
            "jit(value_and_grad(mean loss))",
            1.00,
            lambda: closed_form.value_and_grad(params, X, Y),
            lambda: plain(params, X, Y),
            lambda: plain(params, X, Y),
        ),
        (
            "batched_grad",
            "jit(vmap(grad))",
            1.05,
            lambda: closed_form.batched_grad(params, X, Y),
            lambda: per_example(params, X, Y),
            lambda: per_example(params, X, Y),
        ),
        (
            "hessian_vector_product",
            "jit(jvp of grad): gradient and product",
            0.90,
            product,
            lambda: jvp_of_grad(params, V, X, Y),
            lambda: jvp_of_grad(params, V, X, Y)[1],
        ),
        (
            "hessian_vector_product",
            "the same, the gradient discarded",
            float("nan"),
            product,
            lambda: tangent_only(params, V, X, Y),
            lambda: tangent_only(params, V, X, Y),
        ),
    ]


def run(seconds: float, only: str = "") -> str:
    """The whole table, as Markdown."""
    lines = [
        f"Medians of interleaved calls, float32, {environment()}.",
        "",
        "| (B, D, H) | closed form | against | closed form, ms | jax.grad, ms | ratio | goal |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for size in SIZES:
        for what, against, goal, ours, theirs, comparable in rows(*size):
            if only not in what:
                continue
            chex.assert_trees_all_close(ours(), comparable(), rtol=1e-3, atol=1e-5)
            t = medians({"ours": ours, "theirs": theirs}, seconds)
            ratio = t["ours"] / t["theirs"]
            shown = "" if goal != goal else f"{goal:.2f}"
            lines.append(
                f"| {size} | {what} | {against} | {t['ours'] * 1e3:.3f} | {t['theirs'] * 1e3:.3f} "
                f"| {ratio:.2f} | {shown} |"
            )
            print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    command_line(__doc__, "The exercise: closed form against jax.grad", "benchmarks.exercise", run, NOTE)
