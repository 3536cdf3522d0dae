"""Kronecker factors taken inside the walk, and EK-FAC: against dense algebra in float64. Biases are apart here."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support.dense import assert_close, matrix
from support.quick import quick_jit

import jaxgrad as jg
from jaxgrad import attribution, curvature

NHWC = ("NHWC", "HWIO", "NHWC")
RNG = np.random.default_rng(0)
PARAMS = {
    "K": RNG.normal(size=(3, 2, 2, 4)),  # a convolution of 6 × 5 positions
    "W": RNG.normal(size=(5, 4)),  # 30 positions for 20 entries
    "b": RNG.normal(size=4),
    "S": RNG.normal(size=(3, 4, 4)) / 2,  # three layers in a scan
    "V": RNG.normal(size=(2, 4)),  # one position
}
BATCH = RNG.normal(size=(6, 6, 5, 2)), RNG.normal(size=(6, 30, 5))


def forward(p, image, x, taps):
    """(loss, the inputs of K, W, S and V); the taps are added to the outputs of K, W, S and V."""
    h = lax.conv_general_dilated(image[None], p["K"], (1, 1), "SAME", dimension_numbers=NHWC)[0] + taps["K"]
    z = jnp.tanh(x @ p["W"] + p["b"][None] + taps["W"])

    def layer(z, inputs):
        W, tap = inputs
        return jnp.tanh(z @ W + tap), z

    z, before = lax.scan(jax.checkpoint(layer), z, (p["S"], taps["S"]))
    last = jnp.tanh(h).mean((0, 1)) + z.mean(0)
    return jnp.sin(p["V"] @ last + taps["V"]).sum(), {"W": x, "S": before, "V": last[None]}


ZEROS = {"K": np.zeros((6, 5, 4)), "W": np.zeros((30, 4)), "S": np.zeros((3, 30, 4)), "V": np.zeros(2)}


def loss(p, image, x):
    return forward(p, image, x, ZEROS)[0]


def patches(image):
    padded = np.pad(image, [(0, 0), (1, 1), (0, 1), (0, 0)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 2), (1, 2))  # [B, 6, 5, N, 3, 2]
    return windows.transpose(0, 1, 2, 4, 5, 3).reshape(len(image), 30, 12)


def sides():
    """For each matrix: (cotangents [B, G, T, F], inputs [B, G, T, K])."""
    taps, inputs = quick_jit(jax.vmap(jax.grad(forward, 3, has_aux=True), (None, 0, 0, None)))(PARAMS, *BATCH, ZEROS)
    inputs = {**inputs, "K": patches(BATCH[0])}
    deltas = {**taps, "K": taps["K"].reshape(6, 30, 4), "V": taps["V"][:, None]}
    grouped = lambda a: np.asarray(a if a.ndim == 4 else a[:, None])  # noqa: E731
    return {name: (grouped(deltas[name]), grouped(inputs[name])) for name in ("K", "W", "S", "V")}


@functools.cache
def computed():
    """(the factors, the gradients, EK-FAC, the materialized gradients)."""

    @quick_jit
    def run(p, *batch):
        factors, g = curvature.kfac(loss, biases="apart")(p, *batch), jg.per_example_grad(loss)(p, *batch)
        return factors, g, curvature.ekfac(factors, g)

    return *run(PARAMS, *BATCH), quick_jit(jax.vmap(jax.grad(loss), (None, 0, 0)))(PARAMS, *BATCH)


@pytest.mark.parametrize("shared", ["expand", "reduce"])
def test_factors_exist_for_every_matrix_and_are_the_moments_of_its_sides(shared):
    found = quick_jit(curvature.kfac(loss, shared=shared, biases="apart"))(PARAMS, *BATCH)
    assert found["b"] is None
    for name, (delta, a) in sides().items():
        T = a.shape[2]
        if shared == "reduce":
            delta, a, T = delta.sum(2, keepdims=True), a.mean(2, keepdims=True), 1
        D = np.einsum("bgtf,bgte->gfe", delta, delta) / 6
        A = np.einsum("bgtk,bgtl->gkl", a, a) / 6 / T
        factors = found[name]
        kron = np.einsum("gab,gcd->gacbd", factors.left, factors.right)
        F, K = factors.left.shape[1], factors.right.shape[1]
        first, second = (D, A) if factors.layout.matrix[1] == D.shape[1] and name in ("V", "K") else (A, D)
        assert (first.shape[1], second.shape[1]) == (F, K)
        assert_close(kron, np.einsum("gab,gcd->gacbd", first, second))


def test_factors_in_a_scan_are_taken_inside_the_loop():
    params, x = {"S": jnp.ones((24, 64, 64), jnp.float32)}, jnp.ones((8, 256, 64), jnp.float32)

    def deep(p, x):
        return lax.scan(jax.checkpoint(lambda h, W: (jnp.tanh(h @ W), None)), x, p["S"])[0].sum()

    plain = jax.jit(jax.grad(lambda p, x: jax.vmap(deep, (None, 0))(p, x).sum()))
    used = [
        jax.jit(f).lower(params, x).compile().memory_analysis().temp_size_in_bytes
        for f in (plain, curvature.kfac(deep))
    ]
    assert used[1] < 1.5 * used[0]


def test_uses_of_one_matrix_in_several_places_count_as_positions():
    W, x = RNG.normal(size=(5, 5)), RNG.normal(size=(4, 5))
    unrolled = lambda W, x: jnp.tanh(W @ jnp.tanh(W @ x)).sum()  # noqa: E731
    found = quick_jit(curvature.kfac(unrolled))(W, x)
    h = np.tanh(x @ W.T)
    outer = 1 - np.tanh(h @ W.T) ** 2
    inner = (outer @ W) * (1 - h**2)
    assert_close(found.left[0], (outer.T @ outer + inner.T @ inner) / 4)
    assert_close(found.right[0], (h.T @ h + x.T @ x) / 8)


def test_damped_inverses_are_those_of_the_two_damped_factors():
    factors, solve = computed()[0], quick_jit(lambda f, V, damping: f.layout.to_matrix(f.solve(V, damping)))
    for name, mu in (("S", 0.1), ("K", 0.1)):
        f, V = factors[name], jnp.asarray(RNG.normal(size=PARAMS[name].shape))
        found = solve(f, V, mu)
        trace = (np.trace(f.left, axis1=1, axis2=2) * np.trace(f.right, axis1=1, axis2=2)).sum()
        assert_close(solve(f, V, curvature.relative(mu / trace)), found)
        for g, (L, R) in enumerate(zip(np.asarray(f.left), np.asarray(f.right), strict=True)):
            pi = np.sqrt(np.trace(R) / len(R) / (np.trace(L) / len(L)))
            L, R = L + np.sqrt(mu) / pi * np.eye(len(L)), R + np.sqrt(mu) * pi * np.eye(len(R))
            inside = np.asarray(f.layout.to_matrix(V))[g]
            assert_close(found[g], np.linalg.solve(np.kron(L, R), inside.ravel()).reshape(inside.shape))
    with pytest.raises(ValueError, match=r"KroneckerFactors\.solve: expected a damping > 0, got 0"):
        factors["W"].solve(jnp.asarray(PARAMS["W"]), 0.0)


# --- EK-FAC ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [None, 2])
def test_ekfac_is_the_dense_matrix_of_its_definition(chunk, monkeypatch):
    factors, g, F, gradients = computed()
    if chunk:
        monkeypatch.setattr(sys.modules["jaxgrad.curvature.ekfac"], "chunk_size", lambda each, count: chunk)
        F = quick_jit(curvature.ekfac)(factors, g)
    v = jax.tree.map(lambda a: jnp.asarray(RNG.normal(size=a.shape)), PARAMS)
    assert_close(F.trace(), (matrix(gradients) ** 2).sum(1).mean())
    solution, product = quick_jit(lambda F, v: (F.solve(v, curvature.relative(0.01)), F.product(v)))(F, v)
    mu = 0.01 * (matrix(gradients) ** 2).sum(1).mean()
    for name, block in F.blocks.items():
        if name == "b":
            values = (np.asarray(gradients["b"]) ** 2).mean(0)
            assert_close(solution["b"], v["b"] / (values + mu))
            continue
        G = np.asarray(block.layout.to_matrix(gradients[name]))
        V = np.asarray(block.layout.to_matrix(v[name]))
        for k, (L, R) in enumerate(zip(factors[name].left, factors[name].right, strict=True)):
            U = np.kron(np.linalg.eigh(L)[1], np.linalg.eigh(R)[1])
            values = ((G[:, k].reshape(6, -1) @ U) ** 2).mean(0)
            dense = U @ np.diag(values) @ U.T
            assert_close(block.layout.to_matrix(product[name])[k].ravel(), dense @ V[k].ravel(), 1e-8)
            expected = np.linalg.solve(dense + mu * np.eye(len(U)), V[k].ravel())
            assert_close(block.layout.to_matrix(solution[name])[k].ravel(), expected, 1e-8)


def test_ekfac_is_nearer_to_the_fisher_matrix_than_the_kronecker_product():
    factors, _, F, gradients = computed()
    block, factors = F.blocks["W"], factors["W"]
    G = np.asarray(factors.layout.to_matrix(gradients["W"])).reshape(6, -1)
    U = np.kron(block.left[0], block.right[0])
    fisher, kron = G.T @ G / 6, np.kron(factors.left[0], factors.right[0])
    assert_close(U @ U.T, np.eye(20))
    assert np.linalg.norm(fisher - U * np.ravel(block.values) @ U.T) < np.linalg.norm(fisher - kron)


def test_influence_through_ekfac_matches_its_dense_definition():
    _, g, F, G = computed()
    solve = lambda v: F.solve(v, 0.05)  # noqa: E731
    found = quick_jit(lambda g: attribution.influence_through(solve, g, g[1:4]))(g)
    solved = quick_jit(jax.vmap(solve))(jax.tree.map(lambda a: a[1:4], G))
    assert_close(found, matrix(solved) @ matrix(G).T / 6)
    assert attribution.influence_through(solve, g, g[:0]).shape == (0, 6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_half_precision_accumulates_in_float32(dtype):
    W, x = jnp.asarray(RNG.normal(size=(16, 9)), dtype), jnp.asarray(RNG.normal(size=(3, 40, 9)), dtype)
    small = lambda W, x: jnp.tanh(x @ W.T).sum()  # noqa: E731
    factors = curvature.kfac(small)(W, x)
    F = curvature.ekfac(factors, jg.per_example_grad(small)(W, x))
    assert factors.left.dtype == factors.right.dtype == F.blocks.values.dtype == jnp.float32
    assert F.solve(W, 1.0).dtype == dtype
    wide = np.asarray(x, np.float64)
    assert_close(factors.right[0], np.einsum("btk,btl->kl", wide, wide) / 120, 2.0**-8)


def test_sharded_examples_give_the_same_factors():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.device_put(BATCH, jax.NamedSharding(mesh, jax.P("data")))
    found = quick_jit(curvature.kfac(loss, biases="apart"))(PARAMS, *spread)
    jax.tree.map(assert_close, found, computed()[0])


@pytest.mark.usefixtures("plain_types")
def test_errors_name_the_call():
    with pytest.raises(ValueError, match=r'^kfac: expected shared="expand" or "reduce", got'):
        curvature.kfac(loss, shared="mean")
    g = jg.per_example_grad(lambda W, x: jnp.tanh(W @ x).sum())(jnp.ones((16, 9)), jnp.ones((4, 9)))
    with pytest.raises(ValueError, match=r"^ekfac: expected factors in the parameters' tree"):
        curvature.ekfac([None, None], g)
    with pytest.raises(TypeError, match=r"^ekfac: expected PerExampleGrads"):
        curvature.ekfac(None, jnp.ones(3))
    F = curvature.ekfac(None, g)
    with pytest.raises(ValueError, match=r"^EKFAC\.solve: expected a damping > 0, got 0"):
        F.solve(jnp.ones((16, 9)), 0)
    with pytest.raises(ValueError, match=r"^EKFAC\.product: expected a tree like the parameters'"):
        F.product([jnp.ones((16, 9))])
