"""Stochastic reconfiguration, against dense definitions in float64; for wave functions with real and complex parts."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from support.dense import assert_close
from support.quick import quick_jit

import jaxgrad as jg
from jaxgrad.curvature import centered_gram, log_derivatives, minsr, relative, scale_by_spring, spring

SITES, N = 5, 12
RNG = np.random.default_rng(0)
SPINS = RNG.choice([-1.0, 1.0], size=(N, SITES))
ENERGIES = RNG.normal(size=N) + 1j * RNG.normal(size=N) - 40
WEIGHTS = jnp.asarray(RNG.uniform(0.2, 2, size=N))


@pytest.fixture(autouse=True)
def jax_defaults():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def machine(p, x):
    """log ψ of a restricted Boltzmann machine; real or complex as its parameters are, and then holomorphic."""
    return jnp.log(jnp.cosh(p["W"] @ x + p["b"])).sum() + p["a"] @ x


def with_phase(p, x):
    """log|ψ| and a phase, from real parameters that both share."""
    h = jnp.tanh(p["W"] @ x + p["b"])
    return h.sum(), (h**3).sum() * (p["a"] @ x)


def mixed(p, x):
    """log ψ that is not a holomorphic function of its complex parameters."""
    return machine(p, x) + 0.3j * jnp.abs(p["W"]).sum() * x[0] + jnp.real(p["b"]).sum() * x[1]


def params(hidden, dtype=complex):
    def draw(*shape):
        real = RNG.normal(size=shape) / 3
        return jnp.asarray(real + 1j * RNG.normal(size=shape) / 3 if dtype is complex else real)

    return {"W": draw(hidden, SITES), "b": draw(hidden), "a": draw(SITES)}


def parts_of(fun, p, x):
    """[R]: Re log ψ and Im log ψ, or log ψ."""
    value = fun(p, x)
    if isinstance(value, tuple):
        return jnp.stack(value)
    return jnp.stack([value.real, value.imag]) if jnp.iscomplexobj(value) else value[None]


def real_vector(tree):
    """The real parameters of a tree: for each leaf those of its real parts, then of its imaginary parts."""
    parts = [[a.real, a.imag] if np.iscomplexobj(a) else [a] for a in jax.tree.leaves(tree)]
    return np.concatenate([np.ravel(a) for a in itertools.chain(*parts)])


def from_real(p, vector):
    leaves, tree = jax.tree.flatten(p)
    found = []
    for a in leaves:
        re, vector = vector[: a.size].reshape(a.shape), vector[a.size :]
        if jnp.iscomplexobj(a):
            im, vector = vector[: a.size].reshape(a.shape), vector[a.size :]
            re = jax.lax.complex(re, im)
        found.append(re)
    return jax.tree.unflatten(tree, found)


def dense(fun, p, x, energies, weights):
    """(Õ [N·R, real parameters], ε [N·R]), by jax.jacobian."""
    jacobian = jax.jacobian(lambda v, s: parts_of(fun, from_real(p, v), s))
    D = np.asarray(quick_jit(jax.vmap(jacobian, (None, 0)))(jnp.asarray(real_vector(p)), x))
    w = np.asarray(weights / weights.sum())[:, None]
    e = np.stack([energies.real, energies.imag], 1)[:, : D.shape[1]]
    centered, e = D - (w[:, :, None] * D).sum(0), e - (w * e).sum(0)
    root = np.sqrt(w)
    return (root[:, :, None] * centered).reshape(-1, D.shape[2]), (root * e).ravel()


WAVES = {
    "real": (machine, float),
    "holomorphic": (machine, complex),
    "phase": (with_phase, float),
    "mixed": (mixed, complex),
}


@pytest.mark.every(8)
@pytest.mark.parametrize("block_size", [None, 5])
@pytest.mark.parametrize("hidden", [7, 1])  # more parameters than rows, and fewer
@pytest.mark.parametrize("name", WAVES)
def test_steps_match_the_dense_ones(name, hidden, block_size):
    fun, dtype = WAVES[name]
    p = params(hidden, dtype)
    O_, e = dense(fun, p, SPINS, ENERGIES, WEIGHTS)
    previous = from_real(p, jnp.asarray(RNG.normal(size=O_.shape[1])))
    assert (O_.shape[0] > O_.shape[1]) == (hidden == 1)

    @quick_jit
    def found(p, x):
        D = log_derivatives(fun, block_size=block_size)(p, x)
        E = jnp.asarray(ENERGIES)
        return (
            centered_gram(D, WEIGHTS),
            minsr(D, E, relative(0.02), weights=WEIGHTS),
            spring(D, E, 0.02, previous, 0.7, weights=WEIGHTS),
        )

    K, step, with_momentum = found(p, SPINS)
    S = O_.T @ O_

    def solved(damping, v):
        return np.linalg.solve(S + damping * np.eye(len(S)), v)

    assert_close(K, O_ @ O_.T)
    assert_close(real_vector(step), solved(0.02 * np.trace(S), O_.T @ e), 1e-8)
    guess = 0.7 * real_vector(previous)
    assert_close(real_vector(with_momentum), guess + solved(0.02, O_.T @ (e - O_ @ guess)), 1e-8)
    assert jax.tree.map(jnp.result_type, step) == jax.tree.map(jnp.result_type, p)


def test_a_holomorphic_step_is_the_complex_one():
    p = params(7)
    O_ = jax.vmap(jax.grad(machine, holomorphic=True), (None, 0))(p, SPINS.astype(complex))
    O_ = np.concatenate([np.asarray(a).reshape(N, -1) for a in jax.tree.leaves(O_)], 1)
    w = np.asarray(WEIGHTS / WEIGHTS.sum())
    centered, e = np.sqrt(w)[:, None] * (O_ - w @ O_), np.sqrt(w) * (ENERGIES - w @ ENERGIES)
    expected = np.linalg.solve(centered.conj().T @ centered + 0.01 * np.eye(O_.shape[1]), centered.conj().T @ e)
    step = quick_jit(lambda p: minsr(log_derivatives(machine)(p, SPINS), jnp.asarray(ENERGIES), 0.01, weights=WEIGHTS))(
        p
    )
    step = np.concatenate([np.ravel(a) for a in jax.tree.leaves(step)])
    np.testing.assert_allclose(step, expected, atol=1e-9 * np.abs(expected).max())


@pytest.mark.every(3)
@pytest.mark.parametrize("name", ["holomorphic", "phase", "real"])
def test_the_step_for_a_large_damping_is_half_the_gradient_of_the_energy(name):
    fun, dtype = WAVES[name]
    p, states = params(3, dtype), np.array(list(itertools.product([-1.0, 1.0], repeat=SITES)))
    H = RNG.normal(size=(2**SITES, 2**SITES)) + (1j * RNG.normal(size=(2**SITES, 2**SITES)) if name != "real" else 0)
    H = jnp.asarray(H + H.conj().T)

    def amplitudes(v):
        parts = jax.vmap(lambda x: parts_of(fun, from_real(p, v), x))(states)
        return jnp.exp(parts[:, 0] + 1j * parts[:, 1]) if parts.shape[1] == 2 else jnp.exp(parts[:, 0])

    def energy(v):
        psi = amplitudes(v)
        return (psi.conj() @ H @ psi).real / (jnp.abs(psi) ** 2).sum()

    v = jnp.asarray(real_vector(p))
    psi = amplitudes(v)
    step = quick_jit(lambda p, E, w: minsr(log_derivatives(fun)(p, states), E, 1e8, weights=w))
    step = step(p, H @ psi / psi, jnp.abs(psi) ** 2)
    assert_close(1e8 * real_vector(step), quick_jit(jax.grad(energy))(v) / 2, 1e-5)


@pytest.mark.every(3)
@pytest.mark.parametrize("momentum", [0.9, 0.0, lambda count: 0.9 - 0.1 * count])
def test_the_transformation_is_spring_in_a_jitted_loop(momentum):
    p, count = params(7), 3
    optimizer = optax.chain(scale_by_spring(lambda count: 0.1 / (1 + count), momentum), optax.scale(-0.05))
    derivatives = quick_jit(log_derivatives(machine))
    one_step = quick_jit(spring)

    def energies(p):
        return jax.vmap(lambda x: machine(p, -x) - machine(p, x))(SPINS)

    @quick_jit
    def step(p, state):
        D = log_derivatives(machine)(p, SPINS)
        updates, state = optimizer.update(D, state, p, local_energies=energies(p), weights=WEIGHTS)
        return optax.apply_updates(p, updates), state

    found, state, by_hand = p, optimizer.init(p), p
    previous = jax.tree.map(jnp.zeros_like, p)
    for k in range(count):
        found, state = step(found, state)
        mu = momentum(k) if callable(momentum) else momentum
        D, E = derivatives(by_hand, SPINS), quick_jit(energies)(by_hand)
        previous = one_step(D, E, 0.1 / (1 + k), previous, mu, weights=WEIGHTS)
        by_hand = jax.tree.map(lambda a, d: a - 0.05 * d, by_hand, previous)
    assert_close(real_vector(found), real_vector(by_hand), 1e-10)
    assert state[0].count == count
    assert (state[0].previous is None) == (momentum == 0.0)


# --- Digits ----------------------------------------------------------------------------------------------------------


def deep(p, x):
    h = jnp.tanh(p["W1"] @ x + p["b1"])
    h = jnp.tanh(p["W2"] @ h + p["b2"])
    return p["v"] @ h, p["u"] @ h


def deep_params(dtype):
    rng = np.random.default_rng(1)
    shapes = {"W1": (24, 16), "b1": (24,), "W2": (20, 24), "b2": (20,), "v": (20,), "u": (20,)}
    return {k: jnp.asarray(rng.normal(size=s) / s[-1] ** 0.5).astype(dtype) for k, s in shapes.items()}


@pytest.mark.as_used
@pytest.mark.every(4)
@pytest.mark.parametrize("samples", [96, 640])  # solves with samples, and with parameters
@pytest.mark.parametrize(("dtype", "rtol"), [(jnp.float32, 2e-5), (jnp.bfloat16, 2e-2)])
def test_single_and_half_precision_at_real_sizes(dtype, rtol, samples):
    x = jnp.asarray(np.random.default_rng(2).choice([-1.0, 1.0], size=(samples, 16)), dtype)
    E = jnp.asarray(np.random.default_rng(3).normal(size=samples) - 1e5, jnp.float32)
    p = deep_params(dtype)
    step = jax.jit(lambda p, x: minsr(log_derivatives(deep)(p, x), E, relative(0.01)))
    found = step(p, x)
    assert {a.dtype for a in jax.tree.leaves(found)} == {jnp.dtype(dtype)}
    wide = jax.tree.map(lambda a: a.astype(jnp.float64), (p, x))
    expected = quick_jit(lambda p, x: minsr(log_derivatives(deep)(p, x), E.astype(jnp.float64), relative(0.01)))(*wide)
    found, expected = real_vector(jax.tree.map(lambda a: a.astype(jnp.float64), found)), real_vector(expected)
    assert np.linalg.norm(found - expected) <= rtol * np.linalg.norm(expected)


@pytest.mark.every(2)
@pytest.mark.parametrize("size", [1e-15, 1e15])
def test_the_scale_of_the_derivatives_does_not_matter(size):
    p = jax.tree.map(lambda a: a.astype(jnp.float32), params(7, float))
    E, x = jnp.asarray(ENERGIES.real, jnp.float32), jnp.asarray(SPINS, jnp.float32)
    scaled = lambda p, x: jnp.float32(size) * machine(p, x)  # noqa: E731
    for damping, damping_ in ((relative(0.1), relative(0.1)), (0.1, 0.1 * size * size)):
        step = quick_jit(lambda p, x, d=damping: minsr(log_derivatives(machine)(p, x), E, d))(p, x)
        other = quick_jit(lambda p, x, d=damping_: minsr(log_derivatives(scaled)(p, x), E, d))(p, x)
        assert_close(real_vector(other) * np.float64(size), real_vector(step), 1e-4)


def test_without_damping_the_step_is_the_shortest_solution():
    p = params(7, float)
    O_, e = dense(machine, p, SPINS, ENERGIES, WEIGHTS)
    E = jnp.asarray(ENERGIES.real)
    step = quick_jit(lambda p: minsr(log_derivatives(machine)(p, SPINS), E, 0.0, weights=WEIGHTS))(p)
    assert_close(real_vector(step), np.linalg.pinv(O_, rcond=1e-7) @ e, 1e-6)


@pytest.mark.every(2)
@pytest.mark.parametrize("mean", [1e6, 1e3])
def test_a_common_part_of_all_derivatives_costs_no_digits_in_the_solve_with_parameters(mean):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 3)) + mean, jnp.float32)
    E = jnp.asarray(np.random.default_rng(1).normal(size=64), jnp.float32)
    step = minsr(log_derivatives(lambda w, x: w @ x)(jnp.zeros(3, jnp.float32), x), E, 1e-3)
    wide = np.asarray(x, np.float64)
    centered = (wide - wide.mean(0)) / 8
    F = centered.T @ np.asarray(E - E.mean(), np.float64) / 8
    assert_close(step, np.linalg.solve(centered.T @ centered + 1e-3 * np.eye(3), F), 1e-4)


# --- Edges and errors ------------------------------------------------------------------------------------------------


@functools.cache
def small():
    p = params(7)
    return p, quick_jit(log_derivatives(machine))(p, SPINS)


@pytest.mark.slow
def test_a_weight_of_zero_leaves_a_sample_out():
    p, D = small()
    weights = WEIGHTS.at[3].set(0.0).at[8].set(0.0)
    kept = np.delete(np.arange(N), [3, 8])
    E = jnp.asarray(ENERGIES)
    step = quick_jit(lambda D, E, w: minsr(D, E, 0.1, weights=w))
    expected = step(quick_jit(log_derivatives(machine))(p, SPINS[kept]), E[kept], weights[kept])
    for w in (weights, 1e-300 * weights):
        assert_close(real_vector(step(D, E, w)), real_vector(expected), 1e-10)


@pytest.mark.every(0)
@pytest.mark.parametrize("block_size", [2, None])
def test_one_sample_gives_a_zero_step_and_none_gives_nan(block_size):
    p, _ = small()
    derivatives = log_derivatives(machine, block_size=block_size)
    step = quick_jit(lambda p, x, E: minsr(derivatives(p, x), E, 0.1))
    assert np.all(real_vector(step(p, SPINS[:1], ENERGIES[:1])) == 0)
    assert np.all(np.isnan(real_vector(step(p, SPINS[:0], ENERGIES[:0]))))


def test_numbers_that_are_not_finite_and_weights_that_make_no_sense_are_not_hidden():
    _, D = small()
    E = jnp.asarray(ENERGIES)
    step = quick_jit(lambda D, E, w: minsr(D, E, 0.1, weights=w))
    for energies, weights in ((E.at[2].set(jnp.nan), WEIGHTS), (E, 0 * WEIGHTS), (E, WEIGHTS.at[0].set(-0.1))):
        assert np.all(np.isnan(real_vector(step(D, energies, weights))))


def test_shared_arguments_and_several_differentiated_ones():
    def log_psi(scale, x, W, v):
        return scale * (v @ jnp.tanh(W @ x))

    W, v = jnp.asarray(RNG.normal(size=(4, SITES))), jnp.asarray(RNG.normal(size=4))
    both = {"argnums": (2, 3), "in_axes": (None, 1, None, None)}
    E = jnp.asarray(ENERGIES.real)

    @quick_jit
    def steps(W, v):
        plain = log_derivatives(lambda p, x: log_psi(2.0, x, *p))((W, v), SPINS)
        of_blocks = [log_derivatives(log_psi, **both, block_size=size)(2.0, SPINS.T, W, v) for size in (None, 5)]
        return [minsr(D, E, 0.1) for D in (plain, *of_blocks)]

    expected, *found = steps(W, v)
    for step in found:
        assert_close(real_vector(step), real_vector(expected), 1e-10)


@pytest.mark.every(4)
@pytest.mark.parametrize("hidden", [7, 1])
@pytest.mark.parametrize("block_size", [None, 5])
def test_samples_may_be_sharded_on_an_explicit_mesh(block_size, hidden):
    p = params(hidden, float)
    step = quick_jit(lambda p, x, E: minsr(log_derivatives(machine, block_size=block_size)(p, x), E, 0.1))
    expected = step(p, SPINS, jnp.asarray(ENERGIES.real))
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.sharding.set_mesh(mesh):
        whole, by_sample = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
        found = step(*jax.device_put((p, SPINS, jnp.asarray(ENERGIES.real)), (whole, by_sample, by_sample)))
    assert_close(real_vector(found), real_vector(expected), 1e-10)


@pytest.mark.every(0)
def test_blocks_need_less_memory():
    p, x = deep_params(jnp.float32), jnp.ones((512, 16), jnp.float32)
    E = jnp.ones(512, jnp.float32)

    def factors(block_size):
        def products(p, x):
            return log_derivatives(deep, block_size=block_size)(p, x).rows.weighted_sum(jnp.repeat(E, 2))

        return jax.jit(products).lower(p, x).compile().memory_analysis().temp_size_in_bytes

    assert 4 * factors(32) < factors(None)


@pytest.mark.usefixtures("plain_types")
def test_errors_say_what_to_do():
    p, D = small()
    E = jnp.asarray(ENERGIES)
    with pytest.raises(ValueError, match="minsr: expected a damping ≥ 0, got -1"):
        minsr(D, E, -1.0)
    with pytest.raises(ValueError, match=r"minsr: expected one local energy for each sample, shape \(12,\), got"):
        minsr(D, E[:3], 0.1)
    with pytest.raises(ValueError, match="minsr: expected real weights of shape"):
        minsr(D, E, 0.1, weights=WEIGHTS[:3])
    with pytest.raises(TypeError, match=r"centered_gram: expected LogDerivatives, as jg.curvature.log_derivatives"):
        centered_gram(jg.per_example_grad(lambda p, x: machine(p, x).real)(p, SPINS))
    with pytest.raises(ValueError, match="spring: expected a tree like the parameters'"):
        spring(D, E, 0.1, {"W": p["W"]}, 0.9)
    with pytest.raises(ValueError, match="spring: expected a tree like the parameters'"):
        spring(D, E, 0.1, jax.tree.map(jnp.real, p), 0.9)
    with pytest.raises(TypeError, match=r"log_derivatives: expected log ψ of one sample, .* got float64\[5\]"):
        log_derivatives(lambda p, x: p["a"].real * x)(p, SPINS)
    with pytest.raises(ValueError, match="log_derivatives: expected a block size of at least 1 or None, got 0"):
        log_derivatives(machine, block_size=0)
    with pytest.raises(
        TypeError, match=r"scale_by_spring: expected update\(derivatives, state, params, local_energies=…\)"
    ):
        scale_by_spring(0.1).update(D, scale_by_spring(0.1).init(p), p)
