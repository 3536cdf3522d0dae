"""curvlinops' Gauss-Newton matrix times a vector."""

from collections.abc import Callable
from typing import Any

from curvlinops import GGNLinearOperator

from benchmarks.peers.curvlinops_products import product
from benchmarks.peers.torch_models import Problem

PACKAGES, MATERIALIZES = ("curvlinops-for-pytorch",), False


def prepare(problem: Problem) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """(the function that is timed, a function that returns its results)."""
    return product(GGNLinearOperator, problem)
