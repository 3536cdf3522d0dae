"""The exercise in float32 under jit at real sizes, against float64, so that a compiler's bug at one of them shows.

The tolerance follows from how rounding errors propagate: for a sum of n products, n · 2⁻²⁴ times the sum of their
absolute values; for β, the errors of z and of wᵀs together; for δ, the relative errors of β and z together.
"""

from typing import NamedTuple

import jax
import numpy as np
import pytest

from jaxgrad import network
from jaxgrad.network import autodiff, closed_form, derivation

U = 2.0**-24
SIZES = [(64, 10, 64), (256, 100, 64), (1000, 10, 512), (1000, 100, 512), (256, 512, 10), (64, 1000, 3)]  # B, H, D


@pytest.fixture(autouse=True)
def jax_defaults():
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


class Exact(NamedTuple):
    """Results in float64, and the errors that float32 may have."""

    loss: np.ndarray
    loss_off: np.ndarray
    delta: np.ndarray
    dw: np.ndarray
    relative: np.ndarray


def data(B, H, D):
    rng = np.random.default_rng(B + H + D)
    f32 = lambda *shape, scale=1.0: (scale * rng.normal(size=shape)).astype(np.float32)  # noqa: E731
    params = network.Params(f32(H, D, scale=D**-0.5), f32(H), f32(H, scale=4 * H**-0.5))
    return params, f32(B, D), np.sign(f32(B))


def exact(params, X, y):
    W, b, w = (np.asarray(a, np.float64) for a in params)
    X, y = X.astype(np.float64), y.astype(np.float64)
    H, D = W.shape
    z, z_off = X @ W.T + b, U * (D + 2) * (np.abs(X) @ np.abs(W).T + np.abs(b))
    s = 1 / (1 + np.exp(-z))
    slope = s * (1 - s)
    beta = -y * (s @ w)
    beta_off = U * (H + 6) * (s @ np.abs(w)) + (slope * z_off) @ np.abs(w)
    pi = 1 / (1 + np.exp(-beta))
    loss = np.logaddexp(0, beta)
    delta = -(pi * y)[:, None] * slope * w
    relative = beta_off[:, None] + z_off + 24 * U
    return Exact(loss, beta_off * pi + 8 * U * loss, delta, -(pi * y)[:, None] * s, relative)


def assert_within(found, expected, off):
    found = np.asarray(found)
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    worst = np.max(np.abs(found - expected) / np.maximum(off, 1e-37))
    assert worst <= 1, f"off by {worst:.2f} of what is allowed"


@pytest.mark.every(11)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("module", [closed_form, autodiff], ids=["by hand", "jax.grad"])
def test_gradients_of_batches(module, size):
    params, X, y = data(*size)
    e = exact(params, X, y)
    B = size[0]
    W = np.abs(np.asarray(params.W, np.float64))

    each = jax.jit(module.batched_grad)(params, X, y)
    assert_within(each.b, e.delta, np.abs(e.delta) * e.relative)
    assert_within(each.w, e.dw, np.abs(e.dw) * e.relative.max(1, keepdims=True))
    assert_within(
        each.W, e.delta[:, :, None] * X[:, None], (np.abs(e.delta) * e.relative)[:, :, None] * np.abs(X)[:, None]
    )
    input_grads = jax.jit(module.batched_input_grad)(params, X, y)
    terms = np.abs(e.delta) * (e.relative + (size[1] + 2) * U)
    assert_within(input_grads, e.delta @ np.asarray(params.W, np.float64), terms @ W)

    value, mean = jax.jit(module.value_and_grad)(params, X, y)
    assert_within(value, e.loss.mean(), (e.loss_off + (B + 2) * U * e.loss).mean())
    summed = np.abs(e.delta) * (e.relative + (B + 2) * U)
    assert_within(mean.W, e.delta.T @ X / B, summed.T @ np.abs(X) / B)
    assert_within(mean.b, e.delta.mean(0), summed.mean(0))


@pytest.mark.every(5)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_factors_norms_and_sums(size):
    params, X, y = data(*size)
    e = exact(params, X, y)
    g = jax.jit(closed_form.factored_grads)(params, X, y)
    squares = (e.delta**2).sum(1) * ((X.astype(np.float64) ** 2).sum(1) + 1) + (e.dw**2).sum(1)
    assert_within(
        jax.jit(lambda g: g.norms())(g), np.sqrt(squares), np.sqrt(squares) * (e.relative.max(1) + size[2] * U)
    )
    summed = np.abs(e.delta) * (e.relative + (size[0] + 2) * U)
    assert_within(jax.jit(lambda g: g.sum())(g).W, e.delta.T @ X, summed.T @ np.abs(X))


@pytest.mark.every(2)
@pytest.mark.parametrize("size", SIZES[:3], ids=str)
def test_hessian_products_by_hand_and_by_jax_grad_agree(size):
    params, X, y = data(*size)
    V = jax.tree.map(lambda a: np.cos(np.arange(a.size)).reshape(a.shape).astype(np.float32), params)
    by_hand = jax.jit(closed_form.hessian_vector_product)(params, V, X, y)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: a.astype(np.float64), (params, V, X, y))
        want = autodiff.hessian_vector_product(*wide)
    for found, expected in zip(by_hand, want, strict=True):
        scale = np.abs(expected).max()
        np.testing.assert_allclose(found, expected, atol=U * 4 * sum(size) * scale)


@pytest.mark.every(3)
@pytest.mark.parametrize("size", SIZES[:3], ids=str)
def test_the_derivation_s_forms(size):
    params, X, y = data(*size)
    e = exact(params, X, y)
    forms = (derivation.matrix_form, derivation.component_form_summed, derivation.logistic_form)
    for form in forms:
        found = jax.jit(jax.vmap(form, (None, 0, 0)))(params, X[:64], y[:64])
        allowed = (np.abs(e.delta) * (e.relative + 2 * sum(size[1:]) * U))[:64, :, None] * np.abs(X[:64])[:, None]
        assert_within(found, (e.delta[:, :, None] * X[:, None])[:64], allowed)
