"""curvlinops' linear operators: the product of a curvature matrix and a vector, with nothing precomputed."""

from collections.abc import Callable
from typing import Any

from torch import nn

from benchmarks.peers.torch_models import Problem


def product(operator: Any, problem: Problem) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """(the function that is timed, a function that returns its results), for one of curvlinops' classes."""
    parameters, results = problem.parameters, {}
    matrix = operator(
        problem.model,
        nn.CrossEntropyLoss(),
        list(parameters.values()),
        [(problem.inputs, problem.targets)],
        check_deterministic=False,
    )
    direction = [problem.direction[name] for name in parameters]

    def call() -> None:
        results["sum"] = dict(zip(parameters, matrix @ direction, strict=True))

    return call, lambda: results
