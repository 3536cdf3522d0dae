"""curvlinops' empirical Fisher matrix as a linear operator: its product with a vector, from scratch."""

from collections.abc import Callable
from typing import Any

from curvlinops import EFLinearOperator
from torch import nn

from benchmarks.peers.torch_models import Problem

PACKAGES, WRITES_OUT = ("curvlinops-for-pytorch",), False


def prepare(problem: Problem) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """(what is timed, what it has computed)."""
    parameters, held = problem.parameters, {}
    fisher = EFLinearOperator(
        problem.model,
        nn.CrossEntropyLoss(),
        list(parameters.values()),
        [(problem.inputs, problem.targets)],
        check_deterministic=False,
    )
    direction = [problem.direction[name] for name in parameters]

    def call() -> None:
        held["sum"] = dict(zip(parameters, fisher @ direction, strict=True))

    return call, lambda: held
