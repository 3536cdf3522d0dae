"""BackPACK's SumGradSquared: the sum of every example's squared gradient, computed in the backward pass."""

from collections.abc import Callable
from typing import Any

from backpack import backpack, extend
from backpack.extensions import SumGradSquared

from benchmarks.peers.torch_models import Problem

PACKAGES, MATERIALIZES = ("backpack-for-pytorch",), False


def prepare(problem: Problem) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """(the function that is timed, a function that returns its results)."""
    model = extend(problem.model)

    def call() -> None:
        model.zero_grad()
        with backpack(SumGradSquared()):
            problem.losses(model(problem.inputs), problem.targets).sum().backward()

    def results() -> dict[str, Any]:
        B = len(problem.inputs)
        return {"sum": {name: p.sum_grad_squared / B for name, p in problem.parameters.items()}}

    return call, results
