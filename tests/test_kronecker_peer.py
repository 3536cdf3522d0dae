"""K-FAC, EK-FAC, Fisher and Gauss-Newton matrices: the products of curvlinops, in float64, on the same models."""

import functools
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import benchmarks
import jaxgrad as jg
from benchmarks import models
from benchmarks.peers.quantities import leaves_by_path, random_direction
from benchmarks.peers.theme import write_problem
from jaxgrad import curvature
from jaxgrad.curvature.joint import from_matrix, to_matrix

PYTHON = os.environ.get("JAXGRAD_TORCH_PYTHON", sys.executable if importlib.util.find_spec("curvlinops") else "")
pytestmark = pytest.mark.skipif(
    not PYTHON, reason="curvlinops is not installed; JAXGRAD_TORCH_PYTHON=PATH names a Python that has it"
)
DAMPING = 0.1
MODELS = {  # name: (the model, its outputs)
    "mlp": (lambda: models.mlp((6, 8, 7, 3), B=40), models.mlp_outputs),
    "conv_net": (lambda: models.conv_net(B=6), models.conv_net_outputs),
}
MATRICES = ["Fisher", "Gauss-Newton", "EK-FAC", "EK-FAC, inverse"]
MATRICES += [f"K-FAC {shared}{what}" for shared in ("expand", "reduce") for what in ("", ", biases apart", ", inverse")]


@pytest.fixture(autouse=True)
def jax_defaults():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@functools.cache
def problem(kind):
    """(the model in float64, a direction, curvlinops' products by name)."""
    model = MODELS[kind][0]()
    rng = np.random.default_rng(2)  # biases that are not zero
    params = jax.tree.map(lambda a: a + 0.1 * rng.normal(size=a.shape), model.astype(jnp.float64).params)
    model = model.astype(jnp.float64)._replace(params=params)
    root = str(Path(benchmarks.__file__).parents[1])
    with tempfile.TemporaryDirectory() as folder:
        write_problem(Path(folder), model, 1.0)
        command = [PYTHON, "-m", "benchmarks.peers.curvlinops_kronecker", kind, folder]
        process = subprocess.run(command, env=os.environ | {"PYTHONPATH": root}, capture_output=True, text=True)
        assert not process.returncode, process.stderr
        with np.load(Path(folder) / "out.npz") as arrays:
            return model, random_direction(model), dict(arrays)


def product(model, kind, matrix, v):
    """The product of jaxgrad's matrix with the direction."""
    params, batch = model.params, model.batch
    if matrix == "Gauss-Newton":
        vector_product = curvature.gauss_newton_vector_product(MODELS[kind][1], curvature.softmax)
        return vector_product(params, v, *batch)
    g = jg.per_example_grad(model.loss)(params, *batch)
    if matrix == "Fisher":
        return curvature.fisher_vector_product(g, v)
    shared = "reduce" if "reduce" in matrix else "expand"
    biases = "apart" if "apart" in matrix else "joint"
    factors = curvature.kfac(model.loss, shared=shared, biases=biases)(params, *batch)
    if matrix.startswith("EK-FAC"):
        F = curvature.ekfac(factors, g)
        return F.solve(v, DAMPING) if "inverse" in matrix else F.product(v)
    return of_factors(factors, v, "inverse" in matrix)


def of_factors(factors, v, inverse):
    """The product of the Kronecker factors, or their damped inverses, with the weights and biases that they have."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(v)
    arrays, found = {jax.tree_util.keystr(path): a for path, a in paths}, {}
    for path, f in zip(arrays, treedef.flatten_up_to(factors), strict=True):
        if f is not None:
            names = [path] if f.bias is None else [path, f.bias.path]
            parts = [arrays[name] for name in names]
            if inverse:
                results = f.solve(tuple(parts) if f.bias else parts[0], DAMPING)
            else:
                matrix = jnp.einsum("gab,gbk,gkl->gal", f.left, to_matrix(f.layout, f.bias, parts), f.right)
                results = from_matrix(f.layout, f.bias, matrix)
            found |= dict(zip(names, results if isinstance(results, tuple | list) else [results], strict=True))
    return found


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("kind", MODELS)
def test_products_are_those_of_curvlinops(kind, matrix):
    model, v, expected = problem(kind)
    found = jax.jit(lambda v: product(model, kind, matrix, v))(v)
    found = found if matrix.startswith("K-FAC") else leaves_by_path(found)
    assert len(found) == (sum(a.ndim > 1 for a in jax.tree.leaves(v)) if "apart" in matrix else len(jax.tree.leaves(v)))
    for path, a in found.items():
        b = expected[f"{matrix} {path}"]
        assert a.shape == b.shape
        error = np.linalg.norm(a - b) / np.linalg.norm(b)
        print(f"{kind}, {matrix}, {path}: {error:.1e}")
        assert error < 1e-12
