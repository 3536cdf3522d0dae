"""Complex parameters, against `jax.vmap(jax.grad)`."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from support.quick import quick_jit

import jaxgrad as jg

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def jax_defaults():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape))


def complex_normal(*shape):
    return jax.lax.complex(normal(*shape), normal(*shape))


def wave_function(p, x):
    """The wave function of a restricted Boltzmann machine: log cosh of complex angles."""
    h = p["W"] @ x + p["b"]
    return jnp.sum(jnp.log(jnp.cosh(h))).real + jnp.vdot(p["a"], x).real


def spectral(p, x):
    """A layer of an FNO: products of Fourier coefficients."""
    spectrum = jnp.einsum("iok,ik->ok", p["R"], jnp.fft.rfft(x, axis=1))
    return (jnp.tanh(jnp.fft.irfft(spectrum, axis=1)) * p["w"][:, None]).sum()


def penalized(p, x):
    return (jnp.abs(p["W"] @ x) ** 2).sum() + 0.1 * (jnp.abs(p["W"]) ** 2).sum()


def unused_and_bare(p, x):
    return (p["W"] @ x).imag.sum()


LOSSES = {
    "wave function": (
        wave_function,
        {"W": complex_normal(7, 5), "b": complex_normal(7), "a": complex_normal(5)},
        normal(6, 5),
    ),
    "spectral": (spectral, {"R": complex_normal(3, 4, 5), "w": normal(4)}, normal(6, 3, 8)),
    "penalized": (penalized, {"W": complex_normal(7, 5)}, normal(6, 5)),
    "unused": (
        unused_and_bare,
        {"W": complex_normal(7, 5), "none": complex_normal(3, 2), "w": normal(2)},
        normal(6, 5),
    ),
}


def real(tree):
    """Complex gradients as real vectors: the real parts and the negated imaginary parts."""
    flat = jax.vmap(lambda tree: ravel_pytree(tree)[0])(tree)
    return jnp.concatenate([flat.real, -flat.imag], 1)


@pytest.mark.every(5)
@pytest.mark.parametrize(("name", "jit"), [*((name, True) for name in LOSSES), ("penalized", False)])
def test_gradients_and_operations_on_them(name, jit):
    loss, params, x = LOSSES[name]
    want = quick_jit(jax.vmap(jax.grad(loss), (None, 0)))(params, x)
    G, c = real(want), normal(6)
    norms = jnp.linalg.norm(G, axis=1)
    bound = float(jnp.median(norms))

    def results(params, x):
        g = jg.per_example_grad(loss)(params, x)
        clipped = [jg.clipped_grad(loss, max_norm=bound, microbatch_size=size)(params, x) for size in (None, 4)]
        linear = g.materialize(), g.sum(), g.dot(g.mean()), g.weighted_sum(c)
        return linear, (g.norms(), g.leaf_norms(), g.gram(), g.second_moment(), g.variance()), clipped

    (materialized, total, dot, weighted), quadratic, clipped = (quick_jit(results) if jit else results)(params, x)
    lengths, leaf_norms, gram, second_moment, variance = quadratic
    chex.assert_trees_all_close(materialized, want, rtol=1e-12, atol=1e-13)
    chex.assert_trees_all_equal_dtypes(total, params)
    np.testing.assert_allclose(lengths, norms, rtol=1e-12)
    for leaf, dense in zip(jax.tree.leaves(leaf_norms), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(leaf, jnp.linalg.norm(dense.reshape(6, -1), axis=1), rtol=1e-12)
    np.testing.assert_allclose(gram, G @ G.T, rtol=1e-11, atol=1e-11 * float((G**2).sum()))
    np.testing.assert_allclose(dot, G @ G.mean(0), rtol=1e-11)
    chex.assert_trees_all_close(weighted, combined(c, want), rtol=1e-11, atol=1e-11)
    squares = jax.tree.map(lambda a: (jnp.abs(a) ** 2).mean(0), want)
    chex.assert_trees_all_close(second_moment, squares, rtol=1e-11)
    deviations = jax.tree.map(lambda a: (jnp.abs(a - a.mean(0)[None]) ** 2).mean(0), want)
    chex.assert_trees_all_close(variance, deviations, rtol=1e-9, atol=1e-12)
    shorter = jnp.minimum(1, bound / norms)
    for summed, info in clipped:
        chex.assert_trees_all_close(summed, combined(shorter, want), rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(info.norms, norms, rtol=1e-8)


def combined(c, tree):
    return jax.tree.map(lambda a: jnp.tensordot(c.astype(a.dtype), a, 1), tree)


def test_bounds_of_groups_count_real_and_imaginary_parts():
    loss, params, x = LOSSES["wave function"]
    g = jg.per_example_grad(loss)(params, x)
    clipped = g.clip({"W": 0.1, "b": 0.2, "a": 0.3}).leaf_norms()
    for name, bound in (("W", 0.1), ("b", 0.2), ("a", 0.3)):
        np.testing.assert_allclose(clipped[name], jnp.minimum(bound, g.leaf_norms()[name]), rtol=1e-12)


@pytest.mark.every(0)
def test_steps_and_scores_are_those_of_the_real_vectors():
    loss, params, x = LOSSES["wave function"]
    g = jg.per_example_grad(loss)(params, x)
    G = real(g.materialize())
    step = jg.curvature.natural_gradient(g, 0.1)
    expected = jnp.linalg.solve(G.T @ G / 6 + 0.1 * jnp.eye(G.shape[1]), G.mean(0))
    np.testing.assert_allclose(real(jax.tree.map(lambda a: a[None], step))[0], expected, rtol=1e-8, atol=1e-10)
    features = jg.attribution.random_projection(g, jax.random.key(0), 20_000)
    np.testing.assert_allclose(features @ features.T, G @ G.T, atol=0.05 * float((G**2).sum(1).max()))


def test_dot_takes_the_conjugate_of_a_change_of_the_parameters():
    loss, params, x = LOSSES["wave function"]
    change = jax.tree.map(lambda a: complex_normal(*a.shape), params)
    derivative = jax.vmap(lambda x: jax.jvp(lambda p: loss(p, x), (params,), (change,))[1])(x)
    got = jg.per_example_grad(loss)(params, x).dot(jax.tree.map(jnp.conj, change))
    np.testing.assert_allclose(got, derivative, rtol=1e-11)


@pytest.mark.every(0)
def test_single_precision_at_a_real_size():
    with jax.enable_x64(False):
        params = {
            "W": complex_normal(128, 64).astype(jnp.complex64) / 8,
            "b": complex_normal(128).astype(jnp.complex64),
        }
        x = normal(256, 64).astype(jnp.float32)
        loss = lambda p, x: (jnp.abs(p["W"] @ x.astype(jnp.complex64) + p["b"])).sum()  # noqa: E731
        g = jax.jit(jg.per_example_grad(loss))(params, x)
        materialized = jax.vmap(jax.grad(loss), (None, 0))(params, x)
        norms = np.sqrt(sum((np.abs(np.asarray(a, np.complex128).reshape(256, -1)) ** 2).sum(1) for a in materialized.values()))  # fmt: skip  # noqa: E501
        np.testing.assert_allclose(g.norms(), norms, rtol=2e-6)
        assert g.sum()["W"].dtype == jnp.complex64
        assert jg.explain(loss)(params, x)["['W'].real"].how == "factored"


def test_a_real_direction_for_complex_parameters_is_refused():
    loss, params, x = LOSSES["wave function"]
    g = jg.per_example_grad(loss)(params, x)
    with pytest.raises(ValueError, match="expected complex numbers where the parameters are"):
        g.dot(jax.tree.map(jnp.real, params))
