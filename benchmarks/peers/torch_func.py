"""torch.func: vmap(grad) materializes the per-example gradients, then they are clipped and summed."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from benchmarks.peers.torch_models import Problem

PACKAGES, MATERIALIZES = (), True


def prepare(problem: Problem) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """(the function that is timed, a function that returns its results)."""
    parameters = {name: p.detach() for name, p in problem.parameters.items()}
    results: dict[str, Any] = {}

    def loss(parameters: dict[str, Tensor], x: Tensor, target: Tensor) -> Tensor:
        return problem.losses(functional_call(problem.model, parameters, (x[None],)), target[None])[0]

    per_example = vmap(grad(loss), in_dims=(None, 0, 0))

    def call() -> None:
        gradients = per_example(parameters, problem.inputs, problem.targets)
        norms = torch.sqrt(sum(g.flatten(1).square().sum(1) for g in gradients.values()))
        c = problem.bound / norms.clamp(min=problem.bound)
        results.update(norms=norms, sum={name: torch.tensordot(c, g, 1) for name, g in gradients.items()})

    return call, lambda: results
