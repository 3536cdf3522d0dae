"""A step with clipped gradients against a plain one: python -m benchmarks.private [--write FILE.md] [--only WORD]

Plain, `jit(value_and_grad(mean loss))`, is 1.00; clipped is `jaxgrad.clipped_grad`, with a mask, the loss's values and
the norms. Both end in the same update of the parameters, without noise. jax-privacy's clipped_grad is timed at the
microbatch size that is fastest of those named (None: the whole batch), where its gradients fit into memory. The sums
agree before anything is timed. Memory is the compiled program's temporary memory.
"""

import functools
import warnings
from typing import Any

import chex
import jax
import jax.numpy as jnp

import jaxgrad as jg
from benchmarks.factors import mebibytes
from benchmarks.models import Model
from benchmarks.timing import command_line, medians
from benchmarks.transform import max_norm, plain, table_of_models

LARGEST = 2**31  # bytes of gradients that jax-privacy may write out at once
MICROBATCHES = (None, 64, 16, 4, 1)
RATE = 1e-3


def step(gradient: Any) -> Any:
    """gradient → one step of plain descent: (new parameters, mean loss)."""

    def run(params: Any, *batch: Any) -> Any:
        value, total = gradient(params, *batch)
        return jax.tree.map(lambda p, t: p - RATE * t.astype(p.dtype), params, total), value

    return jax.jit(run)


def functions_of(model: Model) -> dict[str, Any]:
    bound, B = max_norm(model), len(jax.tree.leaves(model.batch)[0])
    ours = jg.clipped_grad(model.loss, bound)

    def clipped(params: Any, *batch: Any) -> Any:
        total, info = ours(params, *batch, mask=jnp.ones(B, bool))
        return info.values.mean(), total

    return {"plain": step(plain(model)), "clipped": step(clipped)} | theirs(model, bound, B)


def theirs(model: Model, bound: float, B: int) -> dict[str, Any]:
    """jax-privacy's at every microbatch size whose gradients fit into memory, if it is installed."""
    try:
        import jax_privacy
    except ImportError:
        return {}
    warnings.filterwarnings("ignore", message="optax.global_norm is deprecated")
    size = sum(leaf.size for leaf in jax.tree.leaves(model.params)) * 4

    def of(microbatch: int | None) -> Any:
        gradient = jax_privacy.clipped_grad(
            model.loss,
            l2_clip_norm=bound,
            batch_argnums=tuple(range(1, 1 + len(model.batch))),
            keep_batch_dim=False,
            return_values=True,
            microbatch_size=microbatch,
        )

        def clipped(params: Any, *batch: Any) -> Any:
            total, aux = gradient(params, *batch)
            return aux.values.mean(), total

        return step(clipped)

    sizes = [m for m in MICROBATCHES if (m or B) * size < LARGEST and (m is None or (m < B and B % m == 0))]
    return {f"jax-privacy {m}": of(m) for m in sizes}


def row(model: Model, seconds: float) -> str:
    functions, arguments = functions_of(model), (model.params, *model.batch)
    peers = [name for name in functions if "jax-privacy" in name]
    if peers:
        chex.assert_trees_all_close(
            functions["clipped"](*arguments), functions[peers[0]](*arguments), rtol=2e-3, atol=1e-4
        )
    calls = {name: functools.partial(f, *arguments) for name, f in functions.items()}
    t = medians({name: calls[name] for name in ("plain", "clipped")}, seconds)
    t |= medians({name: calls[name] for name in peers}, seconds, least=3) if peers else {}
    best = min(peers, key=t.__getitem__, default=None)
    memory = {name: mebibytes(functions[name], *arguments) for name in ("plain", "clipped", *([best] if best else []))}
    cells = [model.name, f"{t['plain'] * 1e3:.2f}", f"{t['clipped'] / t['plain']:.2f}"]
    cells += (
        [f"{t[best] / t['plain']:.1f} ({best.split()[1]})", f"{t[best] / t['clipped']:.1f}"] if best else ["-", "-"]
    )
    cells += [f"{memory['plain']:.1f}", f"{memory['clipped'] / memory['plain']:.2f}"]
    cells += [f"{memory[best] / memory['plain']:.1f}" if best else "-"]
    return "| " + " | ".join(cells) + " |"


COLUMNS = "model | plain, ms | clipped | jax-privacy (microbatch) | theirs/ours | plain, MiB | clipped | jax-privacy"


def run(seconds: float, only: str = "") -> str:
    return "\n".join(table_of_models(COLUMNS, row, seconds, only)) + "\n"


if __name__ == "__main__":
    command_line(__doc__, "a clipped step against a plain one", "benchmarks.private", run)
