"""The program of a peer's process: python -m benchmarks.peers.run PEER MODEL FOLDER SECONDS

It reads FOLDER/in.npz. It writes FOLDER/out.json (the medians, the memory and the versions, or why there are none) and
FOLDER/out.npz (the peer's results). It also times torch's own gradient of the mean loss.
"""

import importlib
import importlib.metadata
import json
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.timing import keep_memory, medians, threads

MAX_BYTES = 2**31  # bytes that a peer may materialize at once


def main(peer: str, model: str, folder: Path, seconds: float) -> None:
    try:
        report, arrays = measure_peer(peer, model, folder, seconds)
    except ModuleNotFoundError:
        report, arrays = {"skipped": "not installed"}, {}
    except Exception as error:  # any error is this peer's result
        first = str(error).strip().split("\n")[0]
        report, arrays = {"failed": f"{type(error).__name__}: {first}", "trace": traceback.format_exc()}, {}
    np.savez(folder / "out.npz", **arrays)  # type: ignore[arg-type]
    (folder / "out.json").write_text(json.dumps(report), encoding="utf-8")


def measure_peer(peer: str, kind: str, folder: Path, seconds: float) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    module = importlib.import_module(f"benchmarks.peers.{peer}")
    import torch

    from benchmarks.peers import torch_models

    torch.set_num_threads(threads())
    torch.manual_seed(0)
    with np.load(folder / "in.npz") as arrays:
        problems = [
            torch_models.problem(kind, arrays) for _ in range(2)
        ]  # a peer's hooks must not affect the plain gradient
    plain_problem, peer_problem = problems
    size = 4 * len(plain_problem.inputs) * sum(p.numel() for p in plain_problem.parameters.values())
    if module.MATERIALIZES and size > MAX_BYTES:
        return {"skipped": "does not fit"}, {}
    calls: dict[str, Callable[[], Any]] = {"plain": plain(plain_problem)}
    calls["peer"], results = module.prepare(peer_problem)
    calls["peer"]()
    arrays = to_jax(peer_problem, results())
    report = {
        "seconds": medians(calls, seconds, 5),
        "bytes": {name: peak_bytes(call) for name, call in calls.items()},
        "versions": {name: importlib.metadata.version(name) for name in ("torch", *module.PACKAGES)},
    }
    return report, arrays


def plain(problem: Any) -> Callable[[], Any]:
    """torch's gradient of the mean loss."""
    import torch

    parameters = list(problem.parameters.values())

    def call() -> Any:
        loss = problem.losses(problem.model(problem.inputs), problem.targets).mean()
        return torch.autograd.grad(loss, parameters)

    return call


def to_jax(problem: Any, results: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The norms unchanged, and the sums over the batch by the names of their parameters in JAX."""
    arrays = {"norms": results["norms"].detach().numpy()} if "norms" in results else {}
    if "sum" in results:
        arrays |= {f"sum {path}": a for path, a in problem.to_jax(results["sum"]).items()}
    return arrays


def peak_bytes(call: Callable[[], Any]) -> int:
    """The peak of the memory that a call allocates."""
    from torch.profiler import ProfilerActivity, profile

    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    del result
    allocated = peak = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak


if __name__ == "__main__":
    keep_memory()
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), float(sys.argv[4]))
