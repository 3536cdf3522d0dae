"""Opacus with ghost clipping: norms from activations and cotangents, then a second backward pass."""

from collections.abc import Callable
from typing import Any

import torch
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

from benchmarks.peers.torch_models import Problem

PACKAGES, MATERIALIZES = ("opacus",), False


def prepare(problem: Problem) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """(the function that is timed, a function that returns its results)."""
    parameters = problem.parameters
    module = GradSampleModuleFastGradientClipping(
        problem.model, max_grad_norm=problem.bound, use_ghost_clipping=True, loss_reduction="mean"
    )
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(parameters.values(), lr=0.1),
        noise_multiplier=0.0,
        max_grad_norm=problem.bound,
        expected_batch_size=len(problem.inputs),
    )

    def call() -> None:
        optimizer.zero_grad(set_to_none=True)
        losses = problem.losses(module(problem.inputs), problem.targets)
        DPTensorFastGradientClipping(module, optimizer, losses, "mean").backward()

    def results() -> dict[str, Any]:
        norms = module.per_sample_gradient_norms
        return {"norms": norms, "sum": {name: p.grad for name, p in parameters.items()}}

    return call, results
