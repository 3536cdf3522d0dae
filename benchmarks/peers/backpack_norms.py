"""BackPACK's BatchL2Grad: the norms of every parameter's gradients, computed in the backward pass."""

from collections.abc import Callable
from typing import Any

import torch
from backpack import backpack, extend
from backpack.extensions import BatchL2Grad

from benchmarks.peers.torch_models import Problem

PACKAGES, MATERIALIZES = ("backpack-for-pytorch",), False


def prepare(problem: Problem) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """(the function that is timed, a function that returns its results)."""
    model = extend(problem.model)
    results: dict[str, Any] = {}

    def call() -> None:
        model.zero_grad()
        with backpack(BatchL2Grad()):
            problem.losses(model(problem.inputs), problem.targets).sum().backward()
        missing = [name for name, p in problem.parameters.items() if not hasattr(p, "batch_l2")]
        if missing:
            raise NotImplementedError(f"no result for {missing[0]}")
        results["norms"] = torch.sqrt(sum(p.batch_l2 for p in problem.parameters.values()))

    return call, lambda: results
