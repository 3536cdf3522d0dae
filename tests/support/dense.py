"""Losses with gradients small enough to materialize: references for the tests of curvature and attribution."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.flatten_util import ravel_pytree

from jaxgrad import PerExampleGrads, network, per_example_grad
from jaxgrad.network import Params
from support.quick import quick_jit
from support.zoo import ENTRIES

NAMES = ("exercise", "mlp", "tied_to_the_output_layer", "transformer_block", "gru", "conv_1d")
LOSSES = [entry for entry in ENTRIES if entry.name in NAMES]
each_loss = pytest.mark.parametrize("entry", LOSSES, ids=lambda entry: entry.name)


def reordered(entry: Any) -> tuple[np.ndarray, ...]:
    """Other examples for the same loss: the batch with its arguments rolled against each other, less one."""
    return tuple(np.roll(a, k, 0)[1:] for k, a in enumerate(entry.batch))


@functools.cache
def gradients(name: str, other: bool = False) -> tuple[PerExampleGrads, np.ndarray]:
    """Gradients as factors, and materialized by jax.grad, [B, parameters]; with `other`, of the reordered batch."""
    entry = next(entry for entry in LOSSES if entry.name == name)
    batch = reordered(entry) if other else entry.batch
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        g = quick_jit(per_example_grad(entry.loss))(entry.params, *batch)
        materialized = quick_jit(jax.vmap(jax.grad(entry.loss), (None, *[0] * len(batch))))(entry.params, *batch)
    return g, matrix(materialized)


def gradients_with_rows(G: Any, dtype: Any = jnp.float64) -> PerExampleGrads:
    """PerExampleGrads with the rows of G: the gradients of G w."""
    G = jnp.asarray(G, dtype)
    return per_example_grad(lambda w, x: w @ x)(jnp.zeros(G.shape[1], dtype), G)


def matrix(tree: Any) -> np.ndarray:
    """A tree of [B, …] as [B, parameters]."""
    return np.concatenate([np.asarray(a, np.float64).reshape(len(a), -1) for a in jax.tree.leaves(tree)], 1)


def flat(tree: Any) -> np.ndarray:
    """A tree as one vector."""
    return np.asarray(ravel_pytree(tree)[0])


def solved(G: np.ndarray, v: np.ndarray, damping: float) -> np.ndarray:
    """(GᵀG/n + μI)⁻¹ v, by a [parameters, parameters] solve."""
    return np.linalg.solve(G.T @ G / len(G) + damping * np.eye(G.shape[1]), v)


def assert_close(found: Any, expected: Any, rtol: float = 1e-9) -> None:
    """Assert |found - expected| ≤ rtol · max|expected|, entry by entry."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    scale = np.abs(expected).max(initial=0)
    np.testing.assert_allclose(found, expected, rtol=0, atol=rtol * scale)


class Model(NamedTuple):
    """A model and its data: model(params, x) → outputs."""

    model: Callable[..., Any]
    params: Any
    x: np.ndarray


def _draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def _mlp(params: Any, x: Any) -> Any:
    return params["out"] @ jnp.tanh(params["in"] @ x + params["b"])


def _tied(params: Any, x: Any) -> Any:
    return jnp.tanh(jnp.tanh(x @ params["E"].T) @ params["E"]) @ params["E"].T


def _conv(params: Any, x: Any) -> Any:
    image = x.reshape(1, 6, 5, 1)
    h = lax.conv_general_dilated(image, params["K"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return jnp.tanh(h[0]).mean((0, 1)) @ params["out"]


def _recurrent(params: Any, x: Any) -> Any:
    h, _ = lax.scan(lambda h, a: (jnp.tanh(params["W"] @ h + params["V"] @ a), None), jnp.zeros(4), x.reshape(6, 5))
    return params["out"] @ h


X = _draw(5, 30)
MODELS = {
    "mlp": Model(_mlp, {"in": _draw(7, 30) / 5, "b": _draw(7), "out": _draw(4, 7)}, X),
    "tied": Model(_tied, {"E": _draw(4, 30) / 5}, X),
    "conv": Model(_conv, {"K": _draw(3, 3, 1, 6), "out": _draw(6, 4)}, X),
    "recurrent": Model(_recurrent, {"W": _draw(4, 4) / 2, "V": _draw(4, 5), "out": _draw(4, 4)}, X),
}
each_model = pytest.mark.parametrize("name", MODELS)


def jacobian(model: Model) -> np.ndarray:
    """[B, O, parameters], by jax.jacobian."""
    J = quick_jit(jax.vmap(jax.jacobian(model.model), (None, 0)))(model.params, model.x)
    return np.concatenate([np.asarray(a).reshape(*a.shape[:2], -1) for a in jax.tree.leaves(J)], 2)


def exercise() -> tuple[Params, jax.Array, jax.Array]:
    """Parameters and a batch of the exercise's network."""
    params = network.init_params(jax.random.key(0), inputs=5, hidden=4, dtype=jnp.float64)
    return params, jnp.asarray(_draw(6, 5)), jnp.where(jnp.arange(6) % 2 == 0, 1.0, -1.0)
