"""The noise of each parameter's gradient against variances of materialized gradients, and averages over steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.dense import assert_close, each_loss, gradients
from support.quick import quick_jit

import jaxgrad as jg
from jaxgrad.attribution import (
    leaf_noise_scale,
    noise_recorder,
    noise_scale,
    noise_scale_from_norms,
    total_noise_scale,
)


@pytest.fixture(autouse=True)
def jax_defaults():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def dense(G):
    """(noise, signal) of gradients [B, …], which may be complex."""
    G = np.asarray(G).reshape(len(G), -1)
    noise = (np.abs(G - G.mean(0)) ** 2).sum() / (len(G) - 1)
    return noise, (np.abs(G.mean(0)) ** 2).sum() - noise / len(G)


@pytest.mark.every(4)
@each_loss
def test_the_noise_of_each_parameter_is_the_variance_of_its_gradient(entry):
    g, _ = gradients(entry.name)
    found, whole, total = quick_jit(
        lambda g: (leaf_noise_scale(g), noise_scale(g), total_noise_scale(leaf_noise_scale(g)))
    )(g)
    for noise, signal, scale, G in zip(*map(jax.tree.leaves, (*found, g.materialize())), strict=True):
        expected = dense(G)
        size = (np.asarray(G) ** 2).sum()
        np.testing.assert_allclose([noise, signal], expected, rtol=1e-9, atol=1e-12 * size)
        np.testing.assert_allclose(scale, np.inf if signal <= 0 else noise / signal, rtol=1e-12)
    np.testing.assert_allclose(total, whole, rtol=1e-9)


def layer_norm_net(p, x, y):
    h = p["W"] @ x
    h = (h - h.mean()) / jnp.sqrt(h.var() + 1e-5) * p["norm"]["scale"] + p["norm"]["bias"]
    return (p["v"] @ jnp.tanh(h) - y) ** 2


def net_params(dtype=jnp.float64):
    rng = np.random.default_rng(0)
    tree = {"W": rng.normal(size=(12, 8)), "norm": {"scale": rng.normal(size=12), "bias": rng.normal(size=12)}}
    return jax.tree.map(lambda a: jnp.asarray(a, dtype), {**tree, "v": rng.normal(size=12)})


def net_batch(B, dtype=jnp.float64, seed=1):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(B, 8)), dtype), jnp.asarray(rng.normal(size=B), dtype)


def test_norms_and_a_mean_give_the_same_estimates():
    p, batch = net_params(), net_batch(10)

    @quick_jit
    def estimates(p, batch):
        _, norms = jg.per_example_norms(layer_norm_net, leaf_norms=True)(p, *batch)
        mean = jax.grad(lambda p: jax.vmap(layer_norm_net, (None, 0, 0))(p, *batch).mean())(p)
        total, info = jg.clipped_grad(layer_norm_net, jnp.inf)(p, *batch)
        whole = noise_scale_from_norms(info.norms, jax.tree.map(lambda a: a / 10, total))
        g = jg.per_example_grad(layer_norm_net)(p, *batch)
        return noise_scale_from_norms(norms, mean), leaf_noise_scale(g), whole, noise_scale(g)

    by_leaf, expected, whole, expected_whole = estimates(p, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), by_leaf, expected)
    np.testing.assert_allclose(whole, expected_whole, rtol=1e-9)


def test_selected_parameters_are_those_of_a_loss_of_them_alone():
    p, batch = net_params(), net_batch(10)
    norm, rest = {"norm": p["norm"]}, {k: a for k, a in p.items() if k != "norm"}

    def alone(norm, rest, x, y):
        return layer_norm_net({**rest, **norm}, x, y)

    expected, estimates = quick_jit(
        lambda p, norm, rest, batch: (
            noise_scale(jg.per_example_grad(alone, in_axes=(None, None, 0, 0))(norm, rest, *batch)),
            leaf_noise_scale(jg.per_example_grad(layer_norm_net)(p, *batch)),
        )
    )(p, norm, rest, batch)
    np.testing.assert_allclose(total_noise_scale(estimates, lambda path: "norm" in path), expected, rtol=1e-10)
    with pytest.raises(ValueError, match=r"total_noise_scale: expected at least one .* \[\"\['W'\]\", \"\['norm'\]"):
        total_noise_scale(estimates, lambda path: "attention" in path)


@pytest.mark.parametrize("options", [{"decay": 0.7}, {"window": 3}])
def test_a_recorder_in_a_jitted_training_loop_averages_noise_and_signal(options):
    p, recorder, optimizer = net_params(), noise_recorder(**options), optax.adam(0.1)
    steps = 5
    batches = [jnp.stack(a) for a in zip(*(net_batch(6, seed=k) for k in range(steps)), strict=True)]

    def step(carry, batch):
        p, state, record = carry
        g = jg.per_example_grad(layer_norm_net)(p, *batch)
        estimates = leaf_noise_scale(g)
        updates, state = optimizer.update(g.mean(), state, p)
        return (optax.apply_updates(p, updates), state, recorder.update(record, estimates)), estimates

    start = p, optimizer.init(p), recorder.init(p)
    (_, _, record), each = quick_jit(lambda start: jax.lax.scan(step, start, tuple(batches)))(start)
    weights = 0.7 ** np.arange(steps)[::-1] if "decay" in options else np.array([0, 0, 1, 1, 1])
    average = recorder.average(record)
    for field in ("noise", "signal"):
        averages, values = (jax.tree.leaves(getattr(a, field)) for a in (average, each))
        for found, over_steps in zip(averages, values, strict=True):
            np.testing.assert_allclose(found, weights @ over_steps / weights.sum(), rtol=1e-10)
    quotients = jax.tree.map(lambda n, s: n / s if s > 0 else np.inf, average.noise, average.signal)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), average.scale, quotients)
    assert record.count == steps


@pytest.mark.every(0)
@pytest.mark.parametrize("options", [{"window": 4}, {"decay": 0.9}])
def test_the_first_steps_are_not_drawn_to_zero(options):
    recorder = noise_recorder(**options)
    g = jg.per_example_grad(layer_norm_net)(net_params(), *net_batch(6))
    estimates = leaf_noise_scale(g)
    record = recorder.init(net_params())
    assert all(np.isnan(a) for a in jax.tree.leaves(recorder.average(record).noise))  # nothing is recorded
    for _ in range(2):
        record = recorder.update(record, estimates)
        average = recorder.average(record)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), average.noise, estimates.noise)


@pytest.mark.as_used
@pytest.mark.every(2)
@pytest.mark.parametrize(("dtype", "rtol"), [(jnp.float32, 1e-5), (jnp.bfloat16, 0.03)])
def test_single_and_half_precision_at_a_real_size(dtype, rtol):
    p, batch = net_params(dtype), net_batch(128, dtype)
    found = jax.jit(lambda p, *batch: leaf_noise_scale(jg.per_example_grad(layer_norm_net)(p, *batch)))(p, *batch)
    wide = jax.tree.map(lambda a: a.astype(jnp.float64), (p, *batch))
    expected = leaf_noise_scale(quick_jit(jg.per_example_grad(layer_norm_net))(*wide))
    assert {a.dtype for a in jax.tree.leaves(found)} == {jnp.dtype(jnp.float32)}
    for a, b, signal in zip(*map(jax.tree.leaves, (found.noise, expected.noise, expected.signal)), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * abs(signal))


def test_complex_parameters_count_with_both_parts():
    rng = np.random.default_rng(0)
    W = jnp.asarray(rng.normal(size=(3, 4)) + 1j * rng.normal(size=(3, 4)))
    loss = lambda W, x: (jnp.abs(W @ x) ** 2).sum()  # noqa: E731
    x = jnp.asarray(rng.normal(size=(6, 4)))
    found = leaf_noise_scale(jg.per_example_grad(loss)(W, x))
    np.testing.assert_allclose(found[:2], dense(jax.vmap(jax.grad(loss), (None, 0))(W, x)), rtol=1e-10)
    assert noise_recorder(decay=0.5).init(W).noise.dtype == jnp.float64


@pytest.mark.every(3)
@pytest.mark.parametrize("size", [1e-25, 1e-15, 1e15, 1e25])
def test_the_scale_of_the_gradients_does_not_matter(size):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)
    estimates = [leaf_noise_scale(jg.per_example_grad(lambda w, x, c=c: c * (w @ x))(x[0], x)) for c in (1.0, size)]
    assert_close(estimates[1].scale, estimates[0].scale, 1e-5)
    if 1e-20 < size < 1e20:  # float32 holds the squares
        assert_close(estimates[1].noise / np.float64(size) ** 2, estimates[0].noise, 1e-5)


def test_fewer_than_two_examples_give_nan_and_equal_gradients_no_negative_noise():
    for B in (0, 1):
        g = jg.per_example_grad(lambda w, x: w @ x)(jnp.ones(3), jnp.ones((B, 3)))
        assert all(np.isnan(a) for a in jax.tree.leaves(leaf_noise_scale(g)))
    same = jnp.broadcast_to(jnp.asarray(np.random.default_rng(0).normal(size=7), jnp.float32), (5, 7))
    found = leaf_noise_scale(jg.per_example_grad(lambda w, x: w @ x)(same[0], same))
    assert 0 <= found.noise <= 1e-5 * found.signal


@pytest.mark.usefixtures("plain_types")
def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match="noise_recorder: expected either decay or window, got decay=None"):
        noise_recorder()
    with pytest.raises(ValueError, match="noise_recorder: expected a decay ≥ 0 and < 1, got 1"):
        noise_recorder(decay=1)
    with pytest.raises(ValueError, match="noise_recorder: expected a window of at least 1 step, got 0"):
        noise_recorder(window=0)
    recorder = noise_recorder(window=2)
    estimates = noise_scale_from_norms({"w": jnp.ones(3)}, {"w": jnp.ones(4)})
    with pytest.raises(ValueError, match=r"NoiseRecorder.update: expected estimates like the record"):
        recorder.update(recorder.init(jnp.zeros(3)), estimates)
    with pytest.raises(ValueError, match=r"noise_scale_from_norms: expected norms of B examples, arrays \[B\], got"):
        noise_scale_from_norms({"w": jnp.ones(3), "b": jnp.ones(4)}, {"w": jnp.ones(4), "b": jnp.ones(2)})
    with pytest.raises(ValueError, match="noise_scale_from_norms: expected norms in a tree prefix"):
        noise_scale_from_norms({"w": jnp.ones(3)}, {"v": jnp.ones(4)})
    with pytest.raises(TypeError, match="leaf_noise_scale: expected PerExampleGrads"):
        leaf_noise_scale({"w": jnp.ones(3)})
