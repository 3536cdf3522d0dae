"""Operations on per-example gradients, as factors and written out: python -m benchmarks.factors [--write FILE.md]

Plain, `jit(value_and_grad(mean loss))`, is 1.00. Each row is one interleaved run of plain, the operation on factors,
the matrix products it cannot do without, and the operation after `jit(vmap(jax.grad))`; the two results agree before
anything is timed. Memory is the compiled program's temporary memory. Goals: norms 0.60 and Gram matrix 1.00 on the two
large sizes, norms + clipped sum and second moment 1.00; memory 1.25 × plain.
"""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from benchmarks.exercise import SIZES, mean_loss
from benchmarks.timing import command_line, environment, medians
from jaxgrad.network import Params, closed_form, init_params, loss

NOTE = """
Where the floor is. `products` is the time of the matrix products alone. Norms + clipped sum needs two, Z = W Xᵀ and
(c δ)ᵀ X, and between them what makes δ from Z, the norms of δ and of x, and one scaled copy of the smaller of δ and x;
plain needs the same but for the norms and the copy. That copy is the memory beyond plain: B·min(D, H) numbers, to which
the norms add their squares of one side. The second moment is the product of both sides squared, which have to be
written as they are operands: B·(D + H) numbers. A Gram matrix has two products of B × B numbers each; where B is larger
than D and H that is more than everything else, time and memory.
"""

Operation = Callable[[Params, jax.Array, jax.Array], Any]
MAX_NORM = 0.1


def written_out(params: Params, X: jax.Array, Y: jax.Array) -> jax.Array:
    """G [B, parameters], as vmap(jax.grad) returns it."""
    G = jax.vmap(jax.grad(loss), in_axes=(None, 0, 0))(params, X, Y)
    return jnp.concatenate([leaf.reshape(len(X), -1) for leaf in G], axis=1)


def flat(result: Any) -> jax.Array:
    return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(result)])


def clipped_sum_of(G: jax.Array) -> jax.Array:
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


# name: on factors, written out, the products it cannot do without
OPERATIONS: dict[str, tuple[Operation, Callable[[jax.Array], jax.Array], Operation]] = {
    "norms": (
        lambda p, X, Y: closed_form.per_example_grads(p, X, Y).norms(),
        lambda G: jnp.linalg.norm(G, axis=1),
        one_product,
    ),
    "norms + clipped sum": (
        lambda p, X, Y: closed_form.per_example_grads(p, X, Y).clip(MAX_NORM).sum(),
        clipped_sum_of,
        two_products,
    ),
    "second moment": (
        lambda p, X, Y: closed_form.per_example_grads(p, X, Y).second_moment(),
        lambda G: (G**2).mean(0),
        two_products,
    ),
    "Gram matrix": (
        lambda p, X, Y: closed_form.per_example_grads(p, X, Y).gram(),
        lambda G: G @ G.T,
        gram_products,
    ),
}


def problem(B: int, D: int, H: int) -> tuple[Params, jax.Array, jax.Array]:
    kp, kx, ky = jax.random.split(jax.random.key(0), 3)
    X = jax.random.normal(kx, (B, D), jnp.float32)
    return init_params(kp, D, H), X, jnp.where(jax.random.bernoulli(ky, shape=(B,)), 1, -1).astype(X.dtype)


def mebibytes(function: Any, *arguments: Any) -> float:
    return float(function.lower(*arguments).compile().memory_analysis().temp_size_in_bytes) / 2**20


def row(size: tuple[int, int, int], name: str, seconds: float, peers: bool) -> str:
    arguments = problem(*size)
    on_factors, on_matrix, products = OPERATIONS[name]
    functions = {
        "plain": jax.jit(jax.value_and_grad(mean_loss)),
        "factors": jax.jit(on_factors),
        "floor": jax.jit(products),
        "written out": jax.jit(lambda p, X, Y: on_matrix(written_out(p, X, Y))),
    }
    if not peers:
        del functions["written out"]
    else:
        chex.assert_trees_all_close(
            flat(functions["factors"](*arguments)), flat(functions["written out"](*arguments)), rtol=1e-3, atol=1e-4
        )
    calls = {key: functools.partial(f, *arguments) for key, f in functions.items()}
    fast = {key: call for key, call in calls.items() if key != "written out"}
    t = medians(fast, seconds)
    if peers:
        t |= medians({"written out": calls["written out"]}, seconds / 2, least=3)
    memory = {key: mebibytes(f, *arguments) for key, f in functions.items()}
    cells = [f"{size}", name, f"{t['plain'] * 1e3:.2f}"]
    cells += [f"{t[key] / t['plain']:.2f}" for key in ("factors", "floor")]
    cells += [f"{t['written out'] / t['plain']:.1f}"] if peers else ["-"]
    cells += [f"{memory['plain']:.2f}", f"{memory['factors'] / max(memory['plain'], 1e-9):.2f}"]
    cells += [f"{memory['written out'] / max(memory['plain'], 1e-9):.0f}"] if peers else ["-"]
    return "| " + " | ".join(cells) + " |"


def run(seconds: float, only: str = "") -> str:
    header = [
        "| (B, D, H) | operation | plain, ms | factors | products | vmap(grad) | plain, MiB | factors | vmap(grad) |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines = [f"Medians of interleaved calls, float32, {environment()}. Ratios are to plain.", "", *header]
    for size in SIZES:
        for name in OPERATIONS:
            if only not in name or (name == "Gram matrix" and size[0] > 1024):
                continue  # B × B is larger than anything else there
            lines.append(row(size, name, seconds, peers=True))
            print(lines[-1], flush=True)
    lines += ["", "Growth of norms + clipped sum, from (64, 256, 256), as B and as H double:", "", *header]
    for k in range(6):
        sizes = {(64 * 2**k, 256, 256), (64, 256, 256 * 2**k)}
        for size in sorted(sizes):
            lines.append(row(size, "norms + clipped sum", seconds / 2, peers=size[0] * size[2] <= 64 * 256 * 8))
            print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    command_line(__doc__, "Per-example gradients as factors, and written out", "benchmarks.factors", run, NOTE)
