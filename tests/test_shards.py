"""Losses with a shard_map inside: its products stay factored, and results equal those of vmap(jax.grad)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec
from support.quick import quick_jit
from test_factors import KINDS as FACTORS
from test_factors import factor

import jaxgrad as jg

EVERYWHERE, ROWS, COLUMNS = PartitionSpec(), PartitionSpec("data", None), PartitionSpec(None, "model")
B, T, OUT, IN = 3, 8, 64, 48


@pytest.fixture(scope="module", params=[AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def mesh(request):
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(request.param,) * 2)


def mapped(f, in_specs, out_specs, **options):
    """A layer on the mesh, and a loss of it."""

    def loss(*operands):
        if AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types:
            operands = [jax.sharding.reshard(a, spec) for a, spec in zip(operands, in_specs, strict=True)]
        y = jax.shard_map(f, in_specs=in_specs, out_specs=out_specs, **options)(*operands)
        return jnp.tanh(y).sum()

    return loss


def summed_before_it_is_divided(V, x):
    """The gradient of psum's result is a sum over devices, and each device multiplies it with its own number."""
    return x @ lax.psum(V[0] * (1.0 + lax.axis_index("data").astype(V.dtype)), "data").T


def five_times(W, x):
    """A layer on the mesh, five times in a row, with sharded positions."""
    layer = jax.shard_map(lambda W, x: jnp.tanh(x @ W.T) @ W, in_specs=(EVERYWHERE, ROWS), out_specs=ROWS)
    if AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types:
        W, x = jax.sharding.reshard(W, EVERYWHERE), jax.sharding.reshard(x, ROWS)
    for _ in range(5):
        x = layer(W, x)
    return x.sum()


def constrained(spec):
    """A loss without a shard_map, whose input is sharded on an explicit mesh."""

    def loss(W, x):
        if AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types:
            x = jax.sharding.reshard(x, spec)
        y = lax.scan(lambda h, _: (jnp.tanh(h @ W.T) @ W, None), x, None, length=2)[0]
        return (y.reshape(2, T // 2, IN) ** 2).sum()

    return loss


LOSSES = {
    "five times": five_times,
    "positions constrained": constrained(ROWS),
    "positions divided": mapped(lambda W, x: x @ W.T, (EVERYWHERE, ROWS), ROWS),
    "rows of the weight divided": mapped(lambda W, x: x @ W.T, (PartitionSpec("model"), EVERYWHERE), COLUMNS),
    "rows and positions divided": mapped(
        lambda W, x: x @ W.T, (PartitionSpec("model", None), ROWS), PartitionSpec("data", "model")
    ),
    "columns of the weight divided": mapped(
        lambda W, x: lax.psum(x @ W.T, "model"), (COLUMNS, PartitionSpec("data", "model")), ROWS
    ),
    "normalized before": mapped(
        lambda W, x: x @ (W / jnp.linalg.norm(W, axis=1, keepdims=True)).T,
        (PartitionSpec("model"), EVERYWHERE),
        COLUMNS,
    ),
    "a bias beside": lambda W, x: mapped(
        lambda W, x: x @ W[:, :-1].T + W[None, :, -1], (PartitionSpec("model"), EVERYWHERE), COLUMNS
    )(W, x[:, :-1]),
    "in a loop": mapped(
        lambda W, x: lax.scan(lambda h, _: (jnp.tanh(h @ W.T @ W), None), x, None, length=2)[0],
        (EVERYWHERE, ROWS),
        ROWS,
    ),
    "looked up": mapped(
        lambda W, x: W[(x[:, 0] * 5).astype(int) % OUT],
        (COLUMNS, PartitionSpec("data")),
        PartitionSpec("data", "model"),
    ),
    "looked up at divided positions": mapped(lambda W, x: W[(x[:, 0] * 5).astype(int) % OUT], (EVERYWHERE, ROWS), ROWS),
    "what differs is not checked": mapped(
        lambda W, x: x @ W.T, (PartitionSpec("model"), EVERYWHERE), COLUMNS, check_vma=False
    ),
    "jitted": jax.jit(mapped(lambda W, x: x @ W.T, (EVERYWHERE, ROWS), ROWS)),
}
FACTORED = ["positions divided", "rows of the weight divided", "rows and positions divided"]
FACTORED += ["columns of the weight divided", "a bias beside", "jitted", "looked up at divided positions"]


@pytest.mark.every(53)
@pytest.mark.parametrize("jit", [quick_jit, lambda f: f], ids=["jit", "eager"])
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_vmap(name, jit, mesh):
    loss, rng = LOSSES[name], np.random.default_rng(0)
    W, X = jnp.asarray(rng.normal(size=(OUT, IN)) / 7), jnp.asarray(rng.normal(size=(B, T, IN)))

    def ours(W, X):
        g = jg.per_example_grad(loss)(W, X)
        return g.materialize(), g.norms(), g.weighted_sum(jnp.arange(1.0, 1 + B)), g.gram()

    with jax.set_mesh(mesh):
        G = np.asarray(jax.vmap(jax.grad(loss), (None, 0))(W, X))
        rows, norms, total, gram = jit(ours)(W, X)
    np.testing.assert_allclose(rows, G, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(norms, np.linalg.norm(G.reshape(B, -1), axis=1), rtol=1e-12)
    np.testing.assert_allclose(total, np.einsum("b,bij->ij", np.arange(1.0, 1 + B), G), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(gram, np.einsum("aij,bij->ab", G, G), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", FACTORED)
def test_products_stay_factored(name, mesh):
    with jax.set_mesh(mesh):
        row = jg.explain(LOSSES[name])(jnp.ones((OUT, IN)), jnp.ones((B, T, IN))).rows[0]
    assert row.how == "factored", row


def test_factors_stay_on_the_devices_that_computed_them(mesh):
    with jax.set_mesh(mesh):
        g = jax.jit(jg.per_example_grad(LOSSES["positions divided"]))(jnp.ones((OUT, IN)), jnp.ones((B, T, IN)))
    assert [a.sharding.spec[1] for a in jax.tree.leaves(g.factors)] == ["data", "data"]


@pytest.mark.every(2)
def test_a_sum_over_devices_that_each_device_scales_differently_is_right(mesh):
    loss = mapped(summed_before_it_is_divided, (PartitionSpec("data"), ROWS), ROWS)
    rng = np.random.default_rng(1)
    V, X = jnp.asarray(rng.normal(size=(2, OUT, IN)) / 7), jnp.asarray(rng.normal(size=(B, T, IN)))
    with jax.set_mesh(mesh):
        G = jax.vmap(jax.grad(loss), (None, 0))(V, X)
        np.testing.assert_allclose(jg.per_example_grad(loss)(V, X).materialize(), G, rtol=1e-12, atol=1e-12)


@pytest.mark.every(17)
@pytest.mark.parametrize(("dtype", "rounding"), [(jnp.float32, 2.0**-24), (jnp.bfloat16, 2.0**-8)])
@pytest.mark.parametrize("name", ["rows and positions divided", "normalized before", "in a loop", "five times"])
@pytest.mark.as_used
def test_results_are_as_accurate_as_the_dtype_at_real_sizes(name, dtype, rounding, mesh):
    loss, rng = LOSSES[name], np.random.default_rng(2)
    with jax.set_mesh(mesh):
        W, X = jnp.asarray(rng.normal(size=(256, 128)) / 11, dtype), jnp.asarray(rng.normal(size=(64, 8, 128)), dtype)
        exact = np.asarray(jax.vmap(jax.grad(loss), (None, 0))(W.astype(float), X.astype(float)))
        with jax.enable_x64(False):
            g = jax.jit(jg.per_example_grad(loss))(W, X)
            norms, total = jax.jit(lambda g: (g.norms(), g.sum(jnp.float32)))(g)
    np.testing.assert_allclose(norms, np.linalg.norm(exact.reshape(64, -1), axis=1), rtol=64 * rounding)
    np.testing.assert_allclose(total, exact.sum(0), atol=64 * rounding * np.abs(exact).sum(0).max())


def operations(g):
    """The results of all operations, as arrays."""
    V, c = jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), g.sum()), jnp.arange(1.0, 1 + len(g))
    sums = (g.sum(), g.mean(), g.weighted_sum(c), g.second_moment(), g.variance())
    numbers = (g.norms(), g.squared_norms(), g.leaf_norms(), g.dot(V), g.gram(), g.gram(g[1:]))
    return sums, numbers, g.clip(1.0).sum(), g.where(c > 2).norms(), g.materialize()


def sharded(a, axis, examples):
    """`a` on an explicit mesh: an axis, counted from the last, over "model", and the examples over `examples`."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    spec = [examples, *[None] * (a.ndim - 1)]
    if 0 < a.ndim - axis < a.ndim and a.shape[-axis] % 4 == 0:
        spec[-axis] = "model"
    return jax.device_put(a, jax.NamedSharding(mesh, PartitionSpec(*spec)))


@pytest.mark.every(81)
@pytest.mark.parametrize("many", [1, 2])
@pytest.mark.parametrize("examples", [None, "data"])
@pytest.mark.parametrize("axis", range(5))
@pytest.mark.parametrize("kind", FACTORS)
def test_every_operation_on_factors_sharded_on_an_explicit_mesh(kind, axis, examples, many):
    g = jg.PerExampleGrads((tuple(factor(kind, k, 4, 4, (8, 8)) for k in range(many)),))
    expected = quick_jit(operations)(g)
    found = quick_jit(operations)(jax.tree.map(lambda a: sharded(a, axis, examples), g))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10), found, expected)


@pytest.mark.every(2)
@pytest.mark.parametrize("outputs", [2, 64])
def test_every_operation_on_convolutions_of_examples_sharded_on_an_explicit_mesh(outputs):
    """JAX itself refuses a convolution whose other axes are sharded."""

    def loss(w, x):
        return (lax.conv_general_dilated(x[None], w, (1, 1), "SAME") ** 2).sum()

    ours = quick_jit(lambda w, x: operations(jg.per_example_grad(loss)(w, x)))
    w = jnp.asarray(np.random.default_rng(0).normal(size=(outputs, 8, 3, 3)))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 8, 4, 4)))
    expected, found = ours(w, x), ours(w, sharded(x, 0, "data"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10), found, expected)
