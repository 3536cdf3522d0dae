"""Weights behind a map and penalties on parameters: no array of B × parameters is held, and results are accurate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxgrad as jg
from jaxgrad.per_example import Common, Dense, Layout, Mapped, Same
from jaxgrad.per_example.algebra.maps import Input, Map, Result, call_of

B, N = 64, 1024


def normal(seed, *shape, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def weight_norm(p, x):
    W = p["v"] * (p["g"] / jnp.linalg.norm(p["v"], axis=1))[:, None]
    return jnp.sum(jnp.tanh(W @ x))


def weight_decay(p, x):
    return jnp.sum(jnp.tanh(p["W"] @ x)) + 1e-4 * jnp.sum(p["W"] ** 2)


def fourier(p, x):
    modes = jnp.einsum("mi,mio->mo", jnp.fft.rfft(x, axis=0)[:32], lax.complex(p["re"], p["im"]))
    return jnp.sum(jnp.tanh(jnp.fft.irfft(modes, n=64, axis=0)))


def masked(p, x):
    return jnp.sum(jnp.tanh(jnp.tril(p["W"]) @ x))


MODELS = {
    "weight_norm": (weight_norm, {"v": normal(1, N, N) / 32, "g": np.ones(N, np.float32)}, normal(2, B, N)),
    "weight_decay": (weight_decay, {"W": normal(1, N, N) / 32}, normal(2, B, N)),
    "fourier": (
        fourier,
        {"re": normal(1, 32, 128, 128) / 11, "im": normal(3, 32, 128, 128) / 11},
        normal(2, B, 64, 128),
    ),
}


@pytest.mark.every(3)
@pytest.mark.parametrize("name", MODELS)
def test_memory_of_norms_and_clipped_sum_is_near_a_plain_gradients(name):
    loss, params, X = MODELS[name]

    def plain(params, X):
        return jax.value_and_grad(lambda params: jax.vmap(loss, (None, 0))(params, X).mean())(params)

    def ours(params, X):
        g = jg.per_example_grad(loss, strict=True)(params, X)
        norms = g.norms()
        return norms, g.scale(jnp.minimum(jnp.ones_like(norms), 1 / norms)).sum()

    def nbytes(function):
        memory = jax.jit(function).lower(params, X).compile().memory_analysis()
        return memory.temp_size_in_bytes + memory.output_size_in_bytes

    assert not jg.explain(loss)(params, X).direct
    assert nbytes(ours) <= 1.5 * nbytes(plain)


def standardized(p, x):
    W = p["W"] - p["W"].mean(1, keepdims=True)
    return jnp.sum(jnp.tanh(W / (W.std(1, keepdims=True) + jnp.asarray(0.125, W.dtype)) @ x))


def accumulated(p, x):
    return jnp.sum(jnp.tanh(jnp.cumsum(p["W"], 1) / 16 @ x))


def masked_over_positions(p, x):
    return jnp.sum(jnp.tanh(jnp.stack([x, jnp.flip(x), jnp.roll(x, 7)]) @ jnp.tril(p["W"])))


CASES = [
    (weight_decay, (100, 512)),
    (masked, (256, 256)),
    (weight_norm, (100, 512)),
    (standardized, (100, 512)),
    (accumulated, (100, 512)),
    (masked_over_positions, (256, 256)),
]


@pytest.mark.every(9)
@pytest.mark.parametrize(("loss", "shape"), CASES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.as_used
def test_norms_and_sums_are_as_accurate_as_their_dtype(loss, shape, dtype):
    names = ["v", "g"] if loss is weight_norm else ["W"]
    exact = {n: normal(k, *(shape if n != "g" else shape[:1]), dtype=np.float64) / 8 for k, n in enumerate(names)}
    params = jax.tree.map(lambda a: jnp.asarray(a, dtype), exact)
    X = jnp.asarray(normal(5, B, shape[1]), dtype)
    c = jnp.asarray(normal(6, B), jnp.float32)

    @jax.jit
    def found(params, X):
        g = jg.per_example_grad(loss)(params, X)
        return g.norms(), g.weighted_sum(c), g.gram()

    wide = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, X))
    G = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(*wide)
    whole = np.concatenate([np.asarray(a).reshape(B, -1) for a in jax.tree.leaves(G)], 1)
    norms, total, gram = jax.tree.map(lambda a: np.asarray(a, np.float64), found(params, X))
    lengths, tolerance = np.linalg.norm(whole, axis=1), 40 * float(jnp.finfo(dtype).eps)
    assert np.all(np.abs(norms - lengths) <= tolerance * lengths)
    assert np.all(np.abs(gram - whole @ whole.T) <= tolerance * np.outer(lengths, lengths))
    for a, b in zip(jax.tree.leaves(total), map(np.asarray, jax.tree.leaves(G)), strict=True):
        scale = np.sqrt((np.square(b).reshape(B, -1).sum(1) * np.square(c)).sum())
        assert np.linalg.norm(a - np.tensordot(np.asarray(c), b, 1)) <= tolerance * scale


def test_products_of_bfloat16_run_on_a_cpu_whose_compiler_folds_transposes_into_them():
    params, X = {"W": jnp.asarray(normal(1, 100, 512), jnp.bfloat16)}, jnp.asarray(normal(2, 8, 512), jnp.bfloat16)
    gram = jax.jit(lambda p, X: jg.per_example_grad(standardized)(p, X).gram())(params, X)
    norms = jax.jit(lambda p, X: jg.per_example_grad(standardized)(p, X).norms())(params, X)
    np.testing.assert_allclose(np.sqrt(np.diag(gram)), norms, rtol=0.05)


@pytest.mark.every(3)
@pytest.mark.parametrize("size", [1e-25, 1.0, 1e25])
def test_norms_of_masked_and_penalized_gradients_neither_overflow_nor_vanish(size):
    params = {"W": normal(1, 30, 30)}
    X = normal(2, 5, 30)

    def scaled(params, x, s):
        return s * (masked(params, x) + 0.1 * jnp.sum(params["W"] ** 2))

    g = jax.jit(lambda s: jg.per_example_grad(scaled)(params, X, s))
    one, other = g(np.ones(5, np.float32)).norms(), g(np.full(5, size, np.float32)).norms()
    np.testing.assert_allclose(other, one * np.float32(size), rtol=1e-5)


@pytest.mark.every(0)
def test_indexing_and_where_keep_what_all_examples_share():
    params, X = {"W": normal(1, 30, 20, dtype=np.float64)}, normal(2, 4, 20, dtype=np.float64)
    loss = lambda p, x: jnp.sum(jnp.tanh(jnp.exp(p["W"]) @ x)) + x[0] * jnp.sum(p["W"] ** 2)  # noqa: E731
    g = jg.per_example_grad(loss)(params, X)
    assert {type(f) for f in g.factors["W"]} == {Mapped, Common}
    expected = jax.vmap(jax.grad(loss), (None, 0))(params, X)["W"]
    for index in (slice(1, 3), np.array([2, 0]), np.array([True, False, True, True])):
        np.testing.assert_allclose(g[index].materialize()["W"], expected[index], rtol=1e-12)
    np.testing.assert_allclose(g.where(jnp.arange(4) < 2).sum()["W"], expected[:2].sum(0), rtol=1e-12)
    total = jax.jit(lambda g: g.scale(jnp.arange(4.0)).sum())(g)["W"]
    np.testing.assert_allclose(total, np.tensordot(np.arange(4.0), expected, 1), rtol=1e-12)


def test_two_calls_give_the_same_tree_structure():
    params, X = {"v": normal(1, 30, 20), "g": normal(3, 30)}, normal(2, 4, 20)
    first, second = (jg.per_example_grad(weight_norm)(params, X) for _ in range(2))
    assert jax.tree.structure(first) == jax.tree.structure(second)
    first, second = (jg.per_example_grad(masked)({"W": normal(1, 20, 20)}, X) for _ in range(2))
    assert jax.tree.structure(first) == jax.tree.structure(second)


@pytest.mark.every(0)
def test_one_example_moves_a_clipped_sum_by_at_most_the_bound_behind_a_map_and_a_penalty():
    params = {"W": normal(1, 40, 40)}
    loss = lambda p, x: masked(p, x[1:]) + x[0] * jnp.sum(p["W"] ** 2)  # noqa: E731
    gradient = jg.clipped_grad(loss, 1.0)
    X = normal(2, 8, 41) * np.float32(10) ** np.arange(-4, 4, dtype=np.float32)[:, None]
    total, _ = jax.jit(gradient)(params, X)
    for k in range(8):
        without, _ = jax.jit(gradient)(params, X, mask=np.arange(8) != k)
        moved = np.linalg.norm(np.float64(total["W"]) - np.float64(without["W"]))
        assert moved <= gradient.sensitivity(8)


@pytest.mark.every(19)
@pytest.mark.parametrize("size", [1e-25, 1.0, 1e25])
@pytest.mark.parametrize(("loss", "shape"), CASES)
def test_magnitudes_are_no_less_than_the_norms(loss, shape, size):
    names = {"v": shape, "g": shape[:1]} if loss is weight_norm else {"W": shape}
    params, X = {n: normal(k, *s) for k, (n, s) in enumerate(names.items())}, normal(1, 5, shape[1])
    g = jax.jit(jg.per_example_grad(lambda p, x, s: s * loss(p, x)))(params, X, np.full(5, size, np.float32))
    magnitudes = g.magnitudes()  # of the matrix only: nothing cancels in the gradient of the other, a vector
    matrix = next(norms for name, norms in g.leaf_norms().items() if name != "g")
    assert magnitudes is None or bool((magnitudes >= matrix * np.float32(1 - 1e-5)).all())


def test_the_norm_of_a_map_that_broadcasts_its_input_counts_the_copies():
    column, array = jnp.ones((30, 1), jnp.float32), jnp.asarray(normal(1, 30, 400))
    (eqn,) = jax.make_jaxpr(lax.mul)(column, array).eqns
    spread, _, shared = Map.of([Result(call_of(eqn, [Input(column), array]), 0)])
    layout = Layout.of_array((30, 400), jnp.float32)
    part = Dense.of(column[None], jnp.float32)
    f = Mapped(((part,),), Same(tuple(shared)), spread, (((30, 1), jnp.dtype(jnp.float32)),), layout)
    assert f.norm(jnp.float32) >= np.linalg.norm(array, axis=1).max()


@pytest.mark.every(2)
@pytest.mark.parametrize(("dtype", "rounding"), [(jnp.float32, 2.0**-24), (jnp.bfloat16, 2.0**-9)])
@pytest.mark.as_used
def test_a_map_in_every_step_of_a_loop_is_as_accurate_as_its_dtype_at_real_sizes(dtype, rounding):
    rng = np.random.default_rng(0)
    W, x = rng.normal(size=(64, 64)) / 8, rng.normal(size=(64, 5, 64))
    mask = jnp.asarray(rng.random((64, 64)) < 0.5)

    def loss(W, x):
        def step(h, x):
            return jnp.tanh(jnp.where(mask, W, jnp.zeros_like(W)) @ h + x), None

        return jax.lax.scan(step, jnp.zeros(64, x.dtype), x)[0].sum()

    exact = np.asarray(jax.vmap(jax.grad(loss), (None, 0))(jnp.asarray(W), jnp.asarray(x)))
    with jax.enable_x64(False):
        g = jax.jit(jg.per_example_grad(loss))(jnp.asarray(W, dtype), jnp.asarray(x, dtype))
        norms, total = jax.jit(lambda g: (g.norms(), g.sum(jnp.float32)))(g)
    assert jg.explain(loss)(jnp.asarray(W), jnp.asarray(x)).rows[0].how == "factored"
    lengths = np.linalg.norm(exact.reshape(64, -1), axis=1)
    np.testing.assert_allclose(norms, lengths, rtol=64 * rounding)
    np.testing.assert_allclose(total, exact.sum(0), atol=64 * rounding * np.abs(exact).sum(0).max())


@pytest.mark.every(0)
@pytest.mark.parametrize("loss", [weight_decay, masked, standardized])
def test_batches_behind_a_map_are_concatenated_where_they_share_it(loss):
    params, X = {"W": jnp.asarray(normal(1, 30, 20))}, jnp.asarray(normal(2, 7, 20))
    g = jg.per_example_grad(loss)
    with jax.numpy_rank_promotion("allow"):
        both = jg.PerExampleGrads.concatenate([g(params, X[:3]), g(params, X[3:])])
        np.testing.assert_allclose(both.materialize()["W"], g(params, X).materialize()["W"], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(both.norms(), g(params, X).norms(), rtol=1e-5)
        other = g({"W": params["W"] + 0.5}, X)
    with pytest.raises(ValueError, match="concatenate: a weight that passes a map, or a penalty"):
        jg.PerExampleGrads.concatenate([both, other]) if loss is not masked else jax.jit(
            lambda a, b: jg.PerExampleGrads.concatenate([a, b])
        )(both, other)


def orthogonalized(W, x):
    step = lambda W, _: (1.5 * W - 0.5 * W @ (W.T @ W), None)  # noqa: E731
    return jnp.tanh(lax.scan(step, W[0] / jnp.linalg.norm(W[0]), None, length=3)[0] @ x).sum()


def layers_of_unit_rows(W, x):
    unit = lambda W: W / jnp.linalg.norm(W, axis=1, keepdims=True)  # noqa: E731
    return lax.scan(lambda h, W: (jnp.tanh(unit(W) @ h), None), x, W)[0].sum()


def exponential(W, x):
    return jnp.tanh(jax.scipy.linalg.expm(W[0] - W[0].T) @ x).sum()


@pytest.mark.every(11)
@pytest.mark.parametrize("B", [64, 256])
@pytest.mark.parametrize(
    ("loss", "dtype", "rounding"),
    [
        (orthogonalized, jnp.float32, 2.0**-24),
        (orthogonalized, jnp.bfloat16, 2.0**-9),
        (layers_of_unit_rows, jnp.float32, 2.0**-24),
        (layers_of_unit_rows, jnp.bfloat16, 2.0**-9),
        (exponential, jnp.float32, 2.0**-24),  # jax.scipy has no bfloat16 version
    ],
)
@pytest.mark.as_used
def test_loops_that_are_maps_are_as_accurate_as_their_dtype_at_real_sizes(loss, dtype, rounding, B):
    rng = np.random.default_rng(0)
    W, X = jnp.asarray(rng.normal(size=(3, 64, 64)) / 8, dtype), jnp.asarray(rng.normal(size=(B, 64)), dtype)
    exact = np.asarray(jax.vmap(jax.grad(loss), (None, 0))(W.astype(float), X.astype(float)))
    with jax.enable_x64(False):
        assert jg.explain(loss)(W, X).rows[0].how == "factored"
        g = jax.jit(jg.per_example_grad(loss))(W, X)
        norms, total = jax.jit(lambda g: (g.norms(), g.sum(jnp.float32)))(g)
    np.testing.assert_allclose(norms, np.linalg.norm(exact.reshape(B, -1), axis=1), rtol=64 * rounding)
    np.testing.assert_allclose(total, exact.sum(0), atol=64 * rounding * np.abs(exact).sum(0).max())


@pytest.mark.parametrize("number", [np.float64(2.0), np.full(3, 2.0), jnp.full(3, 2.0)], ids=["scalar", "numpy", "jax"])
def test_shared_numbers_of_numpy_are_arrays_of_a_map(number):
    """A literal in a jaxpr is an array of NumPy; what is shared may be sharded, shaped and cast as an array of JAX."""
    x = jnp.arange(3.0)
    doubled = call_of(jax.make_jaxpr(lambda a, b: a * b)(x, jnp.asarray(number)).eqns[-1], (Input(x), number))
    function, (found,), shared = Map.of([Result(doubled, 0)])
    assert found.value is x
    assert all(isinstance(a, jax.Array) for a in shared)
    np.testing.assert_array_equal(function([x], shared), 2 * np.arange(3.0))
