"""`jax.export` of functions of gradients, with a symbolic number of examples, and serialized."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jaxgrad as jg

pytestmark = pytest.mark.usefixtures("plain_types")  # a symbolic size is not an int


@pytest.fixture(autouse=True)
def jax_defaults():
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def dense(params, x, y):
    return jnp.sum((params["V"] @ jnp.tanh(params["W"] @ x + params["b"]) - y) ** 2)


def positions(params, x, y):
    return jnp.sum((params["V"] @ jnp.tanh(x @ params["W"].T + params["b"]).mean(0) - y) ** 2)


def table(params, ids, y):
    return jnp.sum((params["V"] @ jnp.tanh(params["E"][ids]).mean(0) - y) ** 2)


def image(params, x, y):
    h = jnp.tanh(jax.lax.conv(x[None], params["K"], (1, 1), "SAME"))
    return jnp.sum((h.mean((0, 2, 3)) - y) ** 2)


def penalty(params, x, y):
    return dense(params, x, y) + 0.1 * (params["W"] ** 2).sum()


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def ids(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 11, shape), jnp.int32)


WEIGHTS = {"W": normal(1, 3, 4), "b": normal(2, 3), "V": normal(3, 2, 3)}
LOSSES = {
    "dense": (dense, WEIGHTS, lambda B: (normal(4, B, 4), normal(5, B, 2))),
    "positions": (positions, WEIGHTS, lambda B: (normal(4, B, 7, 4), normal(5, B, 2))),
    "table": (table, {"E": normal(1, 11, 3), "V": normal(3, 2, 3)}, lambda B: (ids(4, B, 5), normal(5, B, 2))),
    "few of many rows": (
        table,
        {"E": normal(1, 5000, 3), "V": normal(3, 2, 3)},
        lambda B: (ids(4, B, 5), normal(5, B, 2)),
    ),
    "image": (image, {"K": normal(1, 2, 3, 3, 3)}, lambda B: (normal(4, B, 3, 6, 6), normal(5, B, 2))),
    "penalty": (penalty, WEIGHTS, lambda B: (normal(4, B, 4), normal(5, B, 2))),
}


def everything(g):
    """All operations, with a [B, B] result last."""
    return {
        "norms": g.norms(),
        "squared": g.squared_norms(),
        "leaves": g.leaf_norms(),
        "moment": g.second_moment(),
        "variance": g.variance(),
        "sum": g.weighted_sum(g.norms()),
        "mean": g.mean(),
        "clipped": g.clip(0.5).sum(),
        "materialized": g.materialize(),
        "dot": g.dot(g.mean()),
        "noise": jg.attribution.noise_scale(g),
        "natural": jg.curvature.natural_gradient(g, 1.0),
        "gram": g.gram(),
    }


def exported(function, *arguments):
    """Exported, serialized and read again, with a symbolic leading axis in all arguments but the first."""
    (b,) = export.symbolic_shape("b")
    params, *batch = arguments
    symbolic = [jax.ShapeDtypeStruct((b, *a.shape[1:]), a.dtype) for a in batch]
    return export.deserialize(export.export(jax.jit(function))(params, *symbolic).serialize())


@pytest.mark.every(0)
@pytest.mark.parametrize("name", LOSSES)
def test_any_number_of_examples_in_an_exported_function(name):
    loss, params, batch = LOSSES[name]

    def run(params, *batch):
        return everything(jg.per_example_grad(loss)(params, *batch))

    program = exported(run, params, *batch(1))
    for B in (3, 130):  # fewer and more than one block holds
        got, expected = program.call(params, *batch(B)), jax.jit(run)(params, *batch(B))
        scale = jax.tree.map(lambda a: 2e-4 * float(jnp.abs(a).max()), expected)
        jax.tree.map(lambda a, b, atol: np.testing.assert_allclose(a, b, rtol=2e-4, atol=atol), got, expected, scale)


@pytest.mark.every(7)
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_and_clip_info_are_arguments_and_results(name):
    loss, params, batch = LOSSES[name]
    grads = exported(jg.per_example_grad(loss), params, *batch(5)).call(params, *batch(5))
    assert isinstance(grads, jg.PerExampleGrads)
    expected = jg.per_example_grad(loss)(params, *batch(5))
    np.testing.assert_allclose(grads.norms(), expected.norms(), rtol=1e-5)

    norms = export.deserialize(export.export(jax.jit(lambda g: g.norms()))(grads).serialize())
    np.testing.assert_allclose(norms.call(expected), expected.norms(), rtol=1e-5)

    total, info = exported(jg.clipped_grad(loss, max_norm=0.5), params, *batch(5)).call(params, *batch(5))
    assert isinstance(info, jg.ClipInfo)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), total, expected.clip(0.5).sum())


def test_a_gradient_behind_a_map_says_what_to_export():
    def loss(W, x):
        return jnp.tanh(jnp.exp(W) @ x).sum()

    program = export.export(jax.jit(jg.per_example_grad(loss)))(normal(1, 30, 20), normal(2, 4, 20))
    with pytest.raises(ValueError, match="norms, sums"):
        program.serialize()


def test_the_exercise():
    params = jg.network.init_params(jax.random.key(0), 4, 3)
    X, y = normal(1, 6, 4), jnp.sign(normal(2, 6))
    got = exported(jax.vmap(jax.grad(jg.network.loss), (None, 0, 0)), params, X, y).call(params, X, y)
    assert isinstance(got, jg.network.Params)
    by_hand = exported(jg.network.closed_form.factored_grads, params, X, y).call(params, X, y).materialize()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), by_hand, got)
