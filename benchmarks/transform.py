"""per_example_grad against a plain gradient: python -m benchmarks.transform [--write FILE.md] [--only WORD]

Plain, `jit(value_and_grad(mean loss))`, is 1.00. Each row is one interleaved run of plain, the norms and the clipped
sum of the per-example gradients as factors, and the same after `vmap(jax.grad)`, where that fits into memory; the
clipped sums agree before anything is timed. Memory is the compiled program's temporary memory; compiling is tracing and
compiling together. The last row is the exercise: the transformation against the hand-written factors.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from benchmarks.factors import mebibytes, problem
from benchmarks.models import Model, models
from benchmarks.timing import command_line, environment, medians
from jaxgrad import per_example_grad, per_example_value_and_grad
from jaxgrad.network import closed_form, loss

LARGEST = 2**31  # bytes that vmap(jax.grad) may write out


def max_norm(model: Model) -> float:
    """About the median norm, so that some examples are clipped and some are not."""
    return float(
        jnp.median(jax.jit(lambda p, *b: per_example_grad(model.loss)(p, *b).norms())(model.params, *model.batch))
    )


def plain(model: Model) -> Any:
    """The mean loss and its gradient."""
    in_axes = (None, *[0] * len(model.batch))
    return lambda params, *batch: jax.value_and_grad(lambda p: jax.vmap(model.loss, in_axes)(p, *batch).mean())(params)


def functions_of(model: Model) -> dict[str, Any]:
    bound, in_axes = max_norm(model), (None, *[0] * len(model.batch))

    def factors(params: Any, *batch: Any) -> Any:
        values, g = per_example_value_and_grad(model.loss)(params, *batch)
        return values.mean(), g.clip(bound).sum()

    def written_out(params: Any, *batch: Any) -> Any:
        values, G = jax.vmap(jax.value_and_grad(model.loss), in_axes)(params, *batch)
        squares = sum(jnp.sum(leaf.reshape(len(leaf), -1) ** 2, 1) for leaf in jax.tree.leaves(G))
        c = bound / jnp.maximum(bound, jnp.sqrt(squares))
        return values.mean(), jax.tree.map(lambda leaf: jnp.tensordot(c, leaf, 1), G)

    size = sum(leaf.size for leaf in jax.tree.leaves(model.params)) * len(jax.tree.leaves(model.batch)[0]) * 4
    chosen = {"plain": plain(model), "factors": factors} | ({"vmap(grad)": written_out} if size < LARGEST else {})
    return {name: jax.jit(f) for name, f in chosen.items()}


def seconds_to_compile(function: Any, arguments: tuple[Any, ...]) -> float:
    jax.clear_caches()
    before = time.perf_counter()
    function.lower(*arguments).compile()
    return time.perf_counter() - before


def table_of_models(columns: str, row: Callable[[Model, float], str], seconds: float, only: str) -> list[str]:
    """The lines of a table with a row for each model, printed as they come."""
    lines = [f"Medians of interleaved calls, float32, {environment()}. Ratios are to plain.", ""]
    lines += [f"| {columns} |", "|---" + "|---:" * columns.count("|") + "|"]
    for model in models():
        if only in model.name:
            lines.append(row(model, seconds))
            print(lines[-1], flush=True)
    return lines


def row(model: Model, seconds: float) -> str:
    functions, arguments = functions_of(model), (model.params, *model.batch)
    if "vmap(grad)" in functions:
        ours, theirs = functions["factors"](*arguments), functions["vmap(grad)"](*arguments)
        chex.assert_trees_all_close(ours, theirs, rtol=2e-3, atol=1e-4)
    compiling = {name: seconds_to_compile(functions[name], arguments) for name in ("plain", "factors")}
    calls = {name: functools.partial(f, *arguments) for name, f in functions.items()}
    t = medians({name: calls[name] for name in ("plain", "factors")}, seconds)
    if "vmap(grad)" in calls:
        t |= medians({"vmap(grad)": calls["vmap(grad)"]}, seconds / 2, least=3)
    memory = {name: mebibytes(f, *arguments) for name, f in functions.items()}
    cells = [model.name, f"{t['plain'] * 1e3:.2f}", f"{t['factors'] / t['plain']:.2f}", f"{model.goal:.2f}"]
    cells += [f"{t['vmap(grad)'] / t['plain']:.1f}" if "vmap(grad)" in t else "-", f"{memory['plain']:.1f}"]
    cells += [f"{memory['factors'] / memory['plain']:.2f}"]
    cells += [f"{memory['vmap(grad)'] / memory['plain']:.1f}" if "vmap(grad)" in t else "-"]
    cells += [f"{compiling['factors'] / compiling['plain']:.2f}"]
    return "| " + " | ".join(cells) + " |"


def exercise(seconds: float) -> str:
    arguments = problem(256, 784, 1024)
    by_hand = jax.jit(lambda p, X, Y: closed_form.per_example_grads(p, X, Y).clip(0.1).sum())
    found = jax.jit(lambda p, X, Y: per_example_grad(loss)(p, X, Y).clip(0.1).sum())
    chex.assert_trees_all_close(by_hand(*arguments), found(*arguments), rtol=1e-3, atol=1e-5)
    t = medians({"by hand": lambda: by_hand(*arguments), "found": lambda: found(*arguments)}, seconds)
    return (
        f"The exercise's own loss, (B, D, H) = (256, 784, 1024), norms + clipped sum: by hand "
        f"{t['by hand'] * 1e3:.2f} ms, by per_example_grad {t['found'] / t['by hand']:.2f} × that."
    )


COLUMNS = "model | plain, ms | factors | goal | vmap(grad) | plain, MiB | factors | vmap(grad) | compiling, factors"


def run(seconds: float, only: str = "") -> str:
    lines = table_of_models(COLUMNS, row, seconds, only)
    if not only:
        lines += ["", exercise(seconds)]
        print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    command_line(__doc__, "per_example_grad against a plain gradient", "benchmarks.transform", run)
