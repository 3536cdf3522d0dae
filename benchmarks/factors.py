"""Operations on the exercise's per-example gradients, factored and materialized."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp

from benchmarks import report
from benchmarks.exercise import SIZES, plain, problem
from benchmarks.workload import Settings, Theme, Workload
from jaxgrad.network import Params, closed_form, loss

Operation = Callable[[Params, jax.Array, jax.Array], Any]
MAX_NORM = 0.1
GROWTH = "Norms + clipped sum from (64, 256, 256) on, as B or H doubles:"


def gradient_matrix(params: Params, X: jax.Array, Y: jax.Array) -> jax.Array:
    """G [B, parameters], from the gradients that vmap(jax.grad) materializes."""
    G = jax.vmap(jax.grad(loss), in_axes=(None, 0, 0))(params, X, Y)
    return jnp.concatenate([leaf.reshape(len(X), -1) for leaf in G], axis=1)


def flat(result: Any) -> jax.Array:
    return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(result)])


def dense_clipped_sum(G: jax.Array) -> jax.Array:
    norms = jnp.linalg.norm(G, axis=1)
    return (MAX_NORM / jnp.maximum(MAX_NORM, norms)) @ G


def one_product(params: Params, X: jax.Array, Y: jax.Array) -> Any:
    return params.W @ X.T


def two_products(params: Params, X: jax.Array, Y: jax.Array) -> Any:
    Z = params.W @ X.T
    return Z @ X


def gram_products(params: Params, X: jax.Array, Y: jax.Array) -> Any:
    Z = params.W @ X.T
    return Z.T @ Z, X @ X.T


# By name: (on factors, on materialized gradients, the matrix products that the operation needs).
OPERATIONS: dict[str, tuple[Operation, Callable[[jax.Array], jax.Array], Operation]] = {
    "norms": (
        lambda p, X, Y: closed_form.factored_grads(p, X, Y).norms(),
        lambda G: jnp.linalg.norm(G, axis=1),
        one_product,
    ),
    "norms + clipped sum": (
        lambda p, X, Y: closed_form.factored_grads(p, X, Y).clip(MAX_NORM).sum(),
        dense_clipped_sum,
        two_products,
    ),
    "second moment": (
        lambda p, X, Y: closed_form.factored_grads(p, X, Y).second_moment(),
        lambda G: (G**2).mean(0),
        two_products,
    ),
    "Gram matrix": (
        lambda p, X, Y: closed_form.factored_grads(p, X, Y).gram(),
        lambda G: G @ G.T,
        gram_products,
    ),
}
GOALS = {"norms": 0.6, "norms + clipped sum": 1.0, "second moment": 1.0, "Gram matrix": 1.0}


def functions(name: str) -> dict[str, Any]:
    on_factors, on_matrix, products = OPERATIONS[name]
    return {
        "plain": plain,
        "jaxgrad": on_factors,
        "products": products,
        "vmap(grad)": lambda p, X, Y: on_matrix(gradient_matrix(p, X, Y)),
    }


def workload(size: tuple[int, int, int], name: str, section: str = "") -> Workload:
    B, D, H = size
    small = name in ("norms", "Gram matrix") and B * D * H < 2**26  # the goal is for the two large sizes
    return Workload(
        f"{size} {name}",
        functions(name),
        problem(*size),
        agree=dict.fromkeys(("jaxgrad", "vmap(grad)"), flat),
        compare=functools.partial(chex.assert_trees_all_close, rtol=1e-3, atol=1e-4),
        goal=None if small or section else GOALS[name],
        materialized_bytes={"vmap(grad)": B * (D + 2) * H * 4},
        timed_last=("vmap(grad)",),
        section=section,
    )


def workloads(settings: Settings) -> Iterator[Workload]:
    for size in SIZES:
        for name in OPERATIONS:
            if name != "Gram matrix" or size[0] <= 1024:  # at the other sizes, B × B is larger than all other arrays
                yield workload(size, name)
    for k in range(6):
        for size in sorted({(64 * 2**k, 256, 256), (64, 256, 256 * 2**k)}):
            yield workload(size, "norms + clipped sum", GROWTH)


THEME = Theme(
    "factors",
    "Per-example gradients: factored and materialized",
    """
Each row has the sizes (B, D, H) and an operation on the exercise's per-example gradients. `plain` is
`jit(value_and_grad(mean loss))`; the columns *time* and *memory* are multiples of it. `jaxgrad` computes the operation
from factors, and `vmap(grad)` from the gradients that `vmap(jax.grad)` materializes. `products` computes only the
matrix products that the operation needs. All arrays are float32. Memory is the temporary memory of the compiled
program; its goal is 1.25.""",
    (
        report.milliseconds("plain"),
        report.ratio("jaxgrad"),
        report.goal(),
        report.ratio("products"),
        report.ratio("vmap(grad)"),
        report.mebibytes("plain"),
        report.memory("jaxgrad"),
        report.memory("vmap(grad)"),
    ),
    workloads,
    note="""
What limits the ratios:

- *Norms + clipped sum* takes two matrix products, Z = W Xᵀ and (c ⊙ δ)ᵀ X. Between these products it computes δ from
  Z, the norms of δ and x, and a scaled copy of the smaller of δ and x. A plain gradient needs neither the norms nor the
  copy. The copy takes B·min(D, H) numbers of memory more than a plain gradient. The norms also hold the squares of δ or
  of x.
- *Second moment* is the product of δ ⊙ δ and x ⊙ x. These squares are operands of a matrix product, so they must be
  materialized: B·(D + H) numbers.
- *Gram matrix* takes two products with B × B results. If B is larger than D and H, these take more time and memory than
  everything else.
""",
)
