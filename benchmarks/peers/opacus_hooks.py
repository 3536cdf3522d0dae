"""Opacus with its hooks, which materialize every layer's per-example gradients, then clip and sum them."""

from collections.abc import Callable
from typing import Any

import torch
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer

from benchmarks.peers.torch_models import Problem

PACKAGES, MATERIALIZES = ("opacus",), True


def prepare(problem: Problem) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """(the function that is timed, a function that returns its results)."""
    B, parameters = len(problem.inputs), problem.parameters
    module = GradSampleModule(problem.model)
    optimizer = DPOptimizer(
        torch.optim.SGD(parameters.values(), lr=0.1),
        noise_multiplier=0.0,
        max_grad_norm=problem.bound,
        expected_batch_size=B,
    )

    def call() -> None:
        optimizer.zero_grad(set_to_none=True)
        problem.losses(module(problem.inputs), problem.targets).mean().backward()
        optimizer.clip_and_accumulate()

    def results() -> dict[str, Any]:
        squares = sum(p.grad_sample.flatten(1).square().sum(1) for p in parameters.values())
        return {"norms": torch.sqrt(squares), "sum": {name: p.summed_grad for name, p in parameters.items()}}

    return call, results
