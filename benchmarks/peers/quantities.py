"""The quantities that the peers compute, in JAX: from factors and from materialized gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxgrad as jg
from benchmarks import functions
from benchmarks.models import Model, mlp_outputs
from jaxgrad import curvature

CLIPPED, NORMS, MOMENT = "norms + clipped sum", "norms", "second moment"
FISHER, GAUSS_NEWTON = "empirical Fisher × vector", "Gauss-Newton × vector"


def implementations(model: Model, quantity: str, bound: float) -> dict[str, Any]:
    """The functions that compute the quantity in JAX, by column."""
    factored = {
        NORMS: lambda g, direction: g.norms(),
        MOMENT: lambda g, direction: g.second_moment(),
        FISHER: jg.curvature.fisher_vector_product,
    }
    dense = {NORMS: dense_norms, MOMENT: dense_moment, FISHER: dense_fisher}
    columns: dict[str, Any] = {"plain": functions.plain(model)}
    if quantity == CLIPPED:
        columns |= {"jaxgrad": functions.factored(model, bound), "vmap(grad)": functions.materialized(model, bound)}
        return columns | functions.jax_privacy(model, bound) | {"optax": functions.optax(model, bound)}
    v = random_direction(model)
    if quantity == GAUSS_NEWTON:
        product = curvature.gauss_newton_vector_product(mlp_outputs, curvature.softmax)
        columns["jaxgrad"] = lambda p, x, y: product(p, v, x, y)
        columns["vmap(grad)"] = lambda p, x, y: dense_gauss_newton(p, v, x)
        return columns
    vmapped = jax.vmap(jax.grad(model.loss), functions.in_axes(model))
    columns["jaxgrad"] = lambda p, *batch: factored[quantity](jg.per_example_grad(model.loss)(p, *batch), v)
    columns["vmap(grad)"] = lambda p, *batch: dense[quantity](vmapped(p, *batch), v)
    return columns


def materialized_bytes(model: Model, quantity: str, columns: dict[str, Any]) -> dict[str, int]:
    """Bytes of the materialized gradients, or for the Gauss-Newton matrix of the Jacobians of all outputs."""
    outputs = model.params[-1]["b"].size if quantity == GAUSS_NEWTON else 1
    return {name: outputs * n for name, n in functions.materialized_bytes(model, columns).items()}


def dense_norms(G: Any, direction: Any) -> Any:
    return jnp.sqrt(sum(jnp.sum(leaf.reshape(len(leaf), -1) ** 2, 1) for leaf in jax.tree.leaves(G)))


def dense_moment(G: Any, direction: Any) -> Any:
    return jax.tree.map(lambda leaf: (leaf**2).mean(0), G)


def dense_fisher(G: Any, direction: Any) -> Any:
    dots = jax.tree.map(lambda leaf, v: jnp.tensordot(leaf, v, v.ndim), G, direction)
    c: Any = sum(jax.tree.leaves(dots))
    return jax.tree.map(lambda leaf: jnp.tensordot(c / len(c), leaf, 1), G)


def dense_gauss_newton(params: Any, direction: Any, x: jax.Array) -> Any:
    """The product computed from the materialized Jacobians of all outputs."""
    J = jax.vmap(jax.jacrev(mlp_outputs), (None, 0))(params, x)
    z = jax.vmap(mlp_outputs, (None, 0))(params, x)
    p = jax.nn.softmax(z)
    Jv: Any = sum(jax.tree.leaves(jax.tree.map(lambda j, v: jnp.tensordot(j, v, v.ndim), J, direction)))
    u = p * (Jv - (p * Jv).sum(1, keepdims=True)) / len(x)
    return jax.tree.map(lambda j: jnp.tensordot(u, j, 2), J)


def random_direction(model: Model) -> Any:
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), model.params)


def reference_results(model: Model, quantity: str, bound: float) -> dict[str, np.ndarray]:
    """jaxgrad's results under the names that the peers use: norms, and sums over the batch by leaf."""

    def compute(params: Any, *batch: Any) -> dict[str, Any]:
        if quantity in (CLIPPED, NORMS):
            g = jg.per_example_grad(model.loss)(params, *batch)
            return {"norms": g.norms()} | ({"sum": g.clip(bound).sum()} if quantity == CLIPPED else {})
        return {"sum": implementations(model, quantity, bound)["jaxgrad"](params, *batch)}

    result = jax.jit(compute)(model.params, *model.batch)
    arrays = {"norms": np.asarray(result["norms"])} if "norms" in result else {}
    return arrays | {f"sum {path}": a for path, a in leaves_by_path(result.get("sum", {})).items()}


def leaves_by_path(tree: Any) -> dict[str, np.ndarray]:
    """The leaves by their paths."""
    return {jax.tree_util.keystr(path): np.asarray(a) for path, a in jax.tree_util.tree_leaves_with_path(tree)}
