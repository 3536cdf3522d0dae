"""Products with curvlinops' matrices in float64: python -m benchmarks.peers.curvlinops_kronecker MODEL FOLDER

It reads FOLDER/in.npz and writes FOLDER/out.npz, for tests/test_kronecker_peer.py: for each matrix of `matrices` and
each parameter, under the name "MATRIX PATH", the product with the direction.
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from curvlinops import (
    EFLinearOperator,
    EKFACLinearOperator,
    GGNLinearOperator,
    KFACInverseLinearOperator,
    KFACLinearOperator,
)
from torch import nn

from benchmarks.peers.torch_models import Problem, problem

DAMPING = 0.1


def matrices(problem: Problem) -> dict[str, Callable[[], Any]]:
    """Functions that make curvlinops' operators, by the names of the matrices. Losses are averaged."""
    data = [(problem.inputs, problem.targets)]
    arguments = problem.model, nn.CrossEntropyLoss(), list(problem.parameters.values()), data
    empirical = {"fisher_type": "empirical", "check_deterministic": False}
    joint = {**empirical, "separate_weight_and_bias": False}

    def kfac(shared: str, options: dict[str, Any]) -> KFACLinearOperator:
        return KFACLinearOperator(*arguments, kfac_approx=shared, **options)

    def ekfac() -> EKFACLinearOperator:
        return EKFACLinearOperator(*arguments, **joint)

    def inverse(shared: str) -> KFACInverseLinearOperator:
        return KFACInverseLinearOperator(kfac(shared, joint), damping=DAMPING, use_heuristic_damping=True)

    found: dict[str, Callable[[], Any]] = {
        "Fisher": lambda: EFLinearOperator(*arguments, check_deterministic=False),
        "Gauss-Newton": lambda: GGNLinearOperator(*arguments, check_deterministic=False),
        "EK-FAC": ekfac,
        "EK-FAC, inverse": lambda: KFACInverseLinearOperator(ekfac(), damping=DAMPING, use_exact_damping=True),
    }
    for shared in ("expand", "reduce"):
        found[f"K-FAC {shared}"] = functools.partial(kfac, shared, joint)
        found[f"K-FAC {shared}, biases apart"] = functools.partial(kfac, shared, empirical)
        found[f"K-FAC {shared}, inverse"] = functools.partial(inverse, shared)
    return found


def main(kind: str, folder: Path) -> None:
    torch.set_default_dtype(torch.float64)
    with np.load(folder / "in.npz") as arrays:
        given = problem(kind, arrays)
    results: dict[str, np.ndarray] = {}
    direction = [given.direction[name] for name in given.parameters]
    for matrix, operator in matrices(given).items():
        products = dict(zip(given.parameters, operator() @ direction, strict=True))
        results |= {f"{matrix} {path}": a for path, a in given.to_jax(products).items()}
    np.savez(folder / "out.npz", **results)  # type: ignore[arg-type]


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
