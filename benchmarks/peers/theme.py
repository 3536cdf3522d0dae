"""Compare with peers on the same inputs: all methods in JAX run in one process, each torch library in its own."""

import dataclasses
import functools
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import benchmarks
from benchmarks import functions, models, report
from benchmarks.measure import OUT_OF_TIME, measure
from benchmarks.models import Model
from benchmarks.peers.quantities import (
    CLIPPED,
    FISHER,
    GAUSS_NEWTON,
    MOMENT,
    NORMS,
    implementations,
    leaves_by_path,
    materialized_bytes,
    random_direction,
    reference_results,
)
from benchmarks.workload import Row, Settings, Theme, Workload

NAME = "peers"
TOLERANCE = 1e-3  # of norms relative to the largest norm, of each parameter's sum relative to its Euclidean norm
MINUTES = 10.0  # the time limit of one peer on one model


class Peer(NamedTuple):
    """A peer, which has a file in this folder.

    Attributes:
        name: the name in the table.
        module: the file's name.
        unsupported: the models on which it is known to fail or to be wrong. On any other model, this is an error.
    """

    name: str
    module: str
    unsupported: tuple[str, ...] = ()


PEERS = {
    CLIPPED: (
        Peer("Opacus, hooks", "opacus_hooks"),
        Peer("Opacus, ghost clipping", "opacus_ghost", ("gru", "language_model")),  # weights are tied or used in a loop
        Peer("torch.func", "torch_func"),
    ),
    NORMS: (Peer("BackPACK, BatchL2Grad", "backpack_norms", ("transformer", "gru", "language_model")),),
    MOMENT: (Peer("BackPACK, SumGradSquared", "backpack_moment"),),
    FISHER: (Peer("curvlinops, EFLinearOperator", "curvlinops_fisher"),),
    GAUSS_NEWTON: (Peer("curvlinops, GGNLinearOperator", "curvlinops_gauss_newton"),),
}
MODELS: dict[str, tuple[Callable[[], Model], tuple[str, ...]]] = {
    "mlp": (models.mlp, (CLIPPED, NORMS, MOMENT, FISHER, GAUSS_NEWTON)),
    "conv_net": (models.conv_net, (CLIPPED, NORMS, MOMENT)),
    "transformer": (functools.partial(models.transformer, 512, 16, 64), (CLIPPED, NORMS)),
    "gru": (models.gru, (CLIPPED, NORMS)),
    "embedding": (models.embedding, (CLIPPED, NORMS)),
    "language_model": (models.language_model, (CLIPPED, NORMS)),
}


@dataclasses.dataclass(frozen=True)
class PeerWorkload(Workload):
    """A workload in JAX, with the inputs of the peers."""

    kind: str = ""
    quantity: str = ""
    model: Model | None = None
    bound: float = 1.0


def workloads(settings: Settings) -> Iterator[Workload]:
    for kind, (make, quantities) in MODELS.items():
        model = make()
        for quantity in quantities:
            name = f"{model.name}: {quantity}"
            if settings.wants(NAME, name):
                yield workload(kind, model, quantity, name)


def workload(kind: str, model: Model, quantity: str, name: str) -> PeerWorkload:
    bound = functions.max_norm(model)
    jax_functions = implementations(model, quantity, bound)
    agree = tuple(column for column in jax_functions if column != "plain")
    return PeerWorkload(
        name,
        jax_functions,
        (model.params, *model.batch),
        agree=agree,
        sample=model.first(4),
        materialized_bytes=materialized_bytes(model, quantity, jax_functions),
        timed_last=agree[1:],
        section=name,
        kind=kind,
        quantity=quantity,
        model=model,
        bound=bound,
    )


def measure_rows(workload: Workload, settings: Settings) -> Iterator[Row]:
    """Measure one row for each method, first those in JAX, then those in torch."""
    assert isinstance(workload, PeerWorkload)
    assert workload.model is not None
    (jax_results,) = measure(workload, settings)
    for column in ("plain", "jaxgrad", "vmap(grad)", "jax-privacy", "optax"):
        if any(name.split()[0] == column for name in workload.functions):
            yield jax_row(jax_results, column, workload.quantity)
    reference = reference_results(workload.model, workload.quantity, workload.bound)
    with tempfile.TemporaryDirectory() as folder:
        write_problem(Path(folder), workload.model, workload.bound)
        for peer in PEERS[workload.quantity]:
            outcome = run_peer(peer, workload.kind, Path(folder), settings)
            yield torch_row(jax_results, workload, peer, outcome, reference, Path(folder))


def jax_row(jax_results: Row, column: str, quantity: str) -> Row:
    best = jax_results.best(column)
    suffix = f", microbatches of {best.split()[1]}" if best.startswith("jax-privacy ") else ""
    names = {"plain": "plain gradient, JAX", "vmap(grad)": "jit(vmap(jax.grad))"}
    names |= {"vmap(grad)": "jit(vmap(jax.jacrev))"} if quantity == GAUSS_NEWTON else {}
    row = Row(names.get(column, column) + suffix.replace("microbatches of None", "whole batch"), jax_results.section)
    row.shapes, row.labels = jax_results.shapes, {"versions": f"jax {jax.__version__}"}
    if best in jax_results.seconds:
        row.seconds = {"method": jax_results.seconds[best], "plain": jax_results.seconds["plain"]}
        row.seconds |= {"jaxgrad": jax_results.seconds["jaxgrad"]}
        row.bytes = {"method": jax_results.bytes[best]}
    else:
        row.skipped = {"method": report.skip_reason(jax_results, column)}
    return row


def write_problem(folder: Path, model: Model, bound: float) -> None:
    """Write the weights, the batch, a direction and the bound to FOLDER/in.npz."""
    arrays = {f"params {path}": a for path, a in leaves_by_path(model.params).items()}
    arrays |= {f"direction {path}": a for path, a in leaves_by_path(random_direction(model)).items()}
    arrays |= {f"batch {k}": np.asarray(a) for k, a in enumerate(model.batch)}
    np.savez(folder / "in.npz", bound=np.asarray(bound), **arrays)  # type: ignore[arg-type]


def run_peer(peer: Peer, kind: str, folder: Path, settings: Settings) -> dict[str, Any]:
    """Run the peer's process and return its report."""
    root = str(Path(benchmarks.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    arguments = ["-m", "benchmarks.peers.run", peer.module, kind, str(folder), str(settings.seconds)]
    try:
        command = [settings.torch_python, *arguments]
        process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60 * MINUTES)
    except subprocess.TimeoutExpired:
        return {"skipped": OUT_OF_TIME}
    if process.returncode:
        return {"failed": f"ended with status {process.returncode}", "trace": process.stderr}
    return json.loads((folder / "out.json").read_text(encoding="utf-8"))


def torch_row(
    jax_results: Row,
    workload: PeerWorkload,
    peer: Peer,
    outcome: dict[str, Any],
    reference: dict[str, Any],
    folder: Path,
) -> Row:
    row = Row(peer.name, jax_results.section, shapes=jax_results.shapes)
    row.labels = {"versions": ", ".join(f"{name} {version}" for name, version in outcome.get("versions", {}).items())}
    skipped, error = outcome.get("skipped", ""), outcome.get("failed", "")
    if not skipped and not error:
        with np.load(folder / "out.npz") as arrays:
            error = difference(reference, arrays)
    if error and workload.kind not in peer.unsupported:
        raise AssertionError(f"{workload.name}: {peer.name}: {error}\n{outcome.get('trace', '')}")
    if skipped or error:
        row.skipped = {"method": skipped or error}
        return row
    seconds = outcome["seconds"]
    row.seconds = {"method": seconds["peer"], "plain": seconds["plain"], "jaxgrad": jax_results.seconds["jaxgrad"]}
    row.bytes = {"method": outcome["bytes"]["peer"], "plain": outcome["bytes"]["plain"]}
    return row


def difference(reference: dict[str, np.ndarray], results: Any) -> str:
    """Describe how a peer's results differ from jaxgrad's; empty if they agree within the tolerance."""
    if set(reference) != set(results):
        return f"wrong: expected {sorted(reference)}, got {sorted(results)}"
    for name, a in reference.items():
        b = results[name]
        scale = np.abs(a).max() if name == "norms" else np.linalg.norm(a)
        error = np.abs(a - b).max() if name == "norms" else np.linalg.norm(a - b)
        if not error <= TOLERANCE * scale:
            return f"wrong: {name} off by {error / scale:.1%}"
    return ""


THEME = Theme(
    NAME,
    "Other libraries",
    f"""
Each section is a model and a quantity, and each row a method that computes it. The methods in JAX are timed in one
process. Each method in torch is timed in its own process, with the same weights, batch and number of threads,
interleaved with torch's own gradient of the mean loss.

The column *relative to plain* is the time divided by that of a plain gradient in the same framework; *relative to
jaxgrad* is the time divided by jaxgrad's. *MiB* is the peak of temporary memory: of the compiled program in JAX, and
of the allocator in torch.

A method must agree with jaxgrad to a relative error of {TOLERANCE}: norms relative to the largest norm, and each
parameter's sum in the Euclidean norm. The row of a method that fails or does not agree shows the error in place of a
time. A method does not fit if it materializes more than 2 GiB. All arrays are float32, on a CPU.""",
    (
        report.milliseconds("method", "ms"),
        report.blank_if_skipped(report.ratio("method", "plain", "relative to plain")),
        report.blank_if_skipped(report.ratio("method", "jaxgrad", "relative to jaxgrad")),
        report.blank_if_skipped(report.mebibytes("method", "MiB")),
        report.label("versions"),
    ),
    workloads,
    measure_rows,
)
