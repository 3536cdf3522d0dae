"""Kronecker factors at real sizes, in float32 and bfloat16; and on meshes: those of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from support.dense import assert_close
from support.quick import quick_jit

import jaxgrad as jg
from benchmarks import models
from jaxgrad import curvature
from jaxgrad.curvature.kronecker import is_factors

DEVICES = 8


@pytest.fixture(autouse=True)
def jax_defaults():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


# --- Real sizes ------------------------------------------------------------------------------------------------------

SIZES = {  # name: (the model, the length of its longest sum)
    "mlp": (lambda: models.mlp((256, 128, 128, 10), B=256), 256),
    "transformer": (lambda: models.transformer(64, 32, 64), 32 * 64),
}


@functools.cache
def computed(name, dtype):
    """The factors of the model in this dtype, with inputs that bfloat16 holds exactly."""
    model = SIZES[name][0]().astype(jnp.bfloat16).astype(dtype)
    return jax.jit(curvature.kfac(model.loss))(model.params, *model.batch)


@pytest.mark.as_used
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", SIZES)
def test_factors_are_off_by_rounding(name, dtype):
    factors, expected = computed(name, dtype), computed(name, jnp.float64)
    # The cotangents themselves are rounded in the dtype; relu's slope jumps where bfloat16 rounds its operand to 0.
    rounding = 3 * 2.0**-24 * SIZES[name][1] ** 0.5 if dtype == jnp.float32 else 2.0**-5
    pairs = zip(*(jax.tree.leaves(tree, is_leaf=is_factors) for tree in (factors, expected)), strict=True)
    for found, exact in pairs:
        for a, b in ((found.left, exact.left), (found.right, exact.right)):
            assert a.dtype == jnp.float32
            sizes = np.sqrt(np.einsum("gii->gi", b))
            error = np.abs(np.float64(a) - b)
            if dtype == jnp.float32:
                assert (error <= rounding * sizes[:, :, None] * sizes[:, None]).all()
            else:
                assert np.linalg.norm(error) <= rounding * np.linalg.norm(b)
    if name == "mlp":  # the inputs are exact, and the moments accumulated in float32
        first, exact = (np.float64(f[0]["W"].right) for f in (factors, expected))
        assert_close(first, exact, 3 * 2.0**-24 * 256**0.5)
    biases = {f.bias.path for f in jax.tree.leaves(factors, is_leaf=is_factors) if f.bias is not None}
    assert biases == ({f"[{k}]['b']" for k in range(3)} if name == "mlp" else {"['b_up']", "['b_down']"})


# --- Meshes ----------------------------------------------------------------------------------------------------------


def draw(rng, *shape):
    return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[-1]))


def problem():
    """A convolution, a scan and a dense layer, each with a bias, and a batch."""
    rng, B = np.random.default_rng(0), 16
    params = {
        "conv": {"K": draw(rng, 3, 2, 2, 4), "b": draw(rng, 4)},
        "layers": {"W": draw(rng, 3, 4, 4), "b": draw(rng, 3, 4)},
        "out": {"W": draw(rng, 8, 4), "b": draw(rng, 8)},
    }
    return params, (draw(rng, B, 6, 5, 2), draw(rng, B, 7, 4), jnp.arange(B) % 8)


def loss(p, image, x, label):
    y = lax.conv_general_dilated(
        image[None], p["conv"]["K"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    layer = jax.checkpoint(lambda z, q: (jnp.tanh(z @ q["W"] + q["b"]), None))
    h = jnp.tanh(y[0] + p["conv"]["b"]).mean((0, 1)) + lax.scan(layer, x, p["layers"])[0].mean(0)
    return curvature.softmax.value(p["out"]["W"] @ h + p["out"]["b"], label)


def results(params, *batch, average=lambda tree: tree):
    factors = average(curvature.kfac(loss)(params, *batch))
    F = average(curvature.ekfac(factors, jg.per_example_grad(loss)(params, *batch)))
    return factors, F.solve(params, 0.1)


@functools.cache
def of_one_device():
    params, batch = problem()
    return quick_jit(results)(params, *batch)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_sharded_examples_give_the_results_of_one_device(axis_type):
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(axis_type,))
    params, batch = problem()
    batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    with jax.set_mesh(mesh):
        found = quick_jit(results)(jax.device_put(params, NamedSharding(mesh, PartitionSpec())), *batch)
    jax.tree.map(assert_close, found[0], of_one_device()[0])
    jax.tree.map(functools.partial(assert_close, rtol=1e-8), found[1], of_one_device()[1])


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_parameters_sharded_over_the_examples_axis_give_the_factors_of_one_device(axis_type):
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(axis_type,))
    params, batch = problem()
    batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    spec = lambda a: PartitionSpec("data") if a.shape[0] == DEVICES else PartitionSpec()  # noqa: E731
    params = jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, spec(a))), params)
    with jax.set_mesh(mesh):
        found = quick_jit(curvature.kfac(loss))(params, *batch)
    jax.tree.map(assert_close, found, of_one_device()[0])


def test_averages_inside_shard_map_are_the_results_of_one_device():
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    params, batch = problem()
    average = lambda tree: jax.tree.map(lambda a: lax.pmean(a, "data"), tree)  # noqa: E731
    examples = PartitionSpec("data")
    inside = jax.shard_map(
        functools.partial(results, average=average),
        mesh=mesh,
        in_specs=(PartitionSpec(), examples, examples, examples),
        out_specs=PartitionSpec(),
    )
    found = quick_jit(inside)(params, *batch)
    jax.tree.map(assert_close, found[0], of_one_device()[0])
    jax.tree.map(functools.partial(assert_close, rtol=1e-8), found[1], of_one_device()[1])
