"""The program of a model's process: python -m benchmarks.third_party.run FAMILY MODEL FOLDER SECONDS

It writes FOLDER/out.json: the measurements, or the reason why there are none.
"""

import dataclasses
import importlib
import importlib.metadata
import json
import math
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxgrad as jg
from benchmarks.functions import factored, in_axes, materialized, max_norm, plain
from benchmarks.measure import measure
from benchmarks.models import Model
from benchmarks.third_party.built import Built, cast
from benchmarks.timing import keep_memory
from benchmarks.workload import Settings, Workload

EXACT, ROUNDED = 1e-9, 1e-4  # allowed relative difference in float64, and if the package computes in float32
SINGLE = 1e-3  # allowed relative difference in float32
SHARES = ("factored", "smaller", "vector", "unused", "direct")
ROOT = Path(__file__).parents[2]
SMALL = 0.01  # a direct parameter below this share of the model's bytes is not listed


def main(family: str, name: str, folder: Path, seconds: float) -> None:
    outcome = try_step(lambda: build(family, name, jnp.float32), "skipped") or try_step(
        lambda: measure_model(family, name, seconds), "failed"
    )
    (folder / "out.json").write_text(json.dumps(outcome), encoding="utf-8")


def try_step(step: Callable[[], Any], key: str) -> dict[str, Any]:
    """Run a step and return its dict, or its error under `key`; empty if the step returns something else."""
    try:
        outcome = step()
        return outcome if isinstance(outcome, dict) else {}
    except ModuleNotFoundError as error:
        return {key: f"not installed: {error.name}", "trace": traceback.format_exc()}
    except Exception as error:  # any error is the result of this model
        first = str(error).strip().split("\n")[0]
        return {key: f"{type(error).__name__}: {first}", "trace": traceback.format_exc()}


def build(family: str, name: str, dtype: Any) -> Model:
    """Build the model in the dtype. Noise is added to its parameters, since initial zeros can make gradients vanish."""
    built: Built = getattr(importlib.import_module(f"benchmarks.third_party.{family}"), name)(dtype)
    leaves, tree = jax.tree.flatten(built.params)
    rng = np.random.default_rng(1)
    params = jax.tree.unflatten(
        tree, [jnp.asarray(a + 0.01 * rng.normal(size=a.shape)).astype(a.dtype) for a in leaves]
    )
    return Model(name, built.loss, cast(params, dtype), cast(built.batch, dtype), 1.0)


def measure_model(family: str, name: str, seconds: float) -> dict[str, Any]:
    """Check agreement in float64, explain how each parameter is held, and measure time and memory in float32."""
    with jax.enable_x64(True):
        exact = build(family, name, jnp.float64)
        difference = max_difference(exact)
        tolerance = EXACT if is_exact(exact) else ROUNDED
    if not difference <= tolerance:
        raise AssertionError(f"jaxgrad and vmap(grad) differ by {difference:.1e} of their size")
    jax.clear_caches()
    model = build(family, name, jnp.float32)
    explanation = jg.explain(model.loss)(model.params, *model.batch)
    bound = max_norm(model)
    (row,) = measure(
        Workload(
            name,
            {"plain": plain(model), "jaxgrad": factored(model, bound), "vmap(grad)": materialized(model, bound)},
            (model.params, *model.batch),
            agree=("jaxgrad", "vmap(grad)"),
            compare=close,
            timed_last=("vmap(grad)",),
        ),
        Settings(seconds),
    )
    row.labels = {
        "difference": f"{difference:.0e}" + (" (float32 inside)" if difference > EXACT else ""),
        **labels(explanation),
    }
    return {"row": dataclasses.asdict(row), "direct": direct_parameters(explanation)}


def nbytes(row: Any) -> int:
    """The bytes of a parameter, from its row in `explain`."""
    return math.prod(row.shape) * row.dtype.itemsize


def label(row: Any) -> str:
    """The column of the table that counts a parameter."""
    if row.how != "materialized":
        return str(row.how)
    return "direct" if row.primitive else str(row.why)


def labels(explanation: Any) -> dict[str, str]:
    """The number of parameters, the shares of their bytes by how they are held, and the size of the factors."""
    size = sum(map(nbytes, explanation.rows))
    share = {how: sum(nbytes(r) for r in explanation.rows if label(r) == how) / size for how in SHARES}
    return {
        "parameters": f"{sum(math.prod(r.shape) for r in explanation.rows):,}",
        **{how: f"{x:.1%}" for how, x in share.items()},
        "held": f"{explanation.nbytes / explanation.materialized_nbytes:.2f}",
    }


def direct_parameters(explanation: Any) -> list[dict[str, Any]]:
    """The parameters that take the direct route and are not small."""
    size = sum(map(nbytes, explanation.rows))
    return [
        {
            "path": r.path,
            "shape": list(r.shape),
            "share": nbytes(r) / size,
            "primitive": r.primitive,
            "source": r.source.rpartition("site-packages/")[2].removeprefix(f"{ROOT}/"),
            "why": r.why,
        }
        for r in explanation.direct
        if nbytes(r) > SMALL * size
    ]


def max_difference(model: Model) -> float:
    """The largest relative difference of norms, clipped sum and Gram matrix from those by vmap(jax.grad)."""
    arguments = (model.params, *model.batch)

    def by_vmap(params: Any, *batch: Any) -> Any:
        G = jax.vmap(jax.grad(model.loss), in_axes(model))(params, *batch)
        rows = [a.reshape(len(a), -1) for a in jax.tree.leaves(G)]
        gram = sum((a.conj() @ a.T).real for a in rows)
        norms = jnp.sqrt(jnp.diagonal(gram))
        bound = jnp.median(norms)
        c = bound / jnp.maximum(bound, norms)
        return bound, norms, gram, jax.tree.map(lambda a: jnp.tensordot(c, a, 1), G)

    def from_factors(bound: Any, params: Any, *batch: Any) -> Any:
        g = jg.per_example_grad(model.loss)(params, *batch)
        return g.norms(), g.gram(), g.clip(bound).sum()

    bound, *expected = jax.jit(by_vmap)(*arguments)
    return max(map(relative_distance, jax.jit(from_factors)(bound, *arguments), expected))


def relative_distance(tree: Any, reference: Any) -> float:
    """The Euclidean distance of two trees, relative to the norm of the second. Two infinities count as equal."""
    norm = lambda leaves: math.sqrt(sum(float(jnp.sum(jnp.abs(a) ** 2)) for a in leaves))  # noqa: E731
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(reference), strict=True)
    return norm([jnp.where(a == b, 0, a - b) for a, b in pairs]) / norm(jax.tree.leaves(reference))


def close(reference: Any, other: Any) -> None:
    """Compare the mean losses, then the sums."""
    for a, b in zip(reference, other, strict=True):
        assert relative_distance(a, b) <= SINGLE, f"off by {relative_distance(a, b):.1e}, more than {SINGLE}"


def is_exact(model: Model) -> bool:
    """Whether the loss computes nothing in float32."""
    example = jax.tree.map(lambda a: a[0], model.batch)
    return "f32[" not in str(jax.make_jaxpr(model.loss)(model.params, *example))


if __name__ == "__main__":
    keep_memory()
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), float(sys.argv[4]))
