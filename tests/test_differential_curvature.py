"""Compiled curvature and attribution: in float32, under jit, at real sizes, against NumPy in float64.

The other tests are small and in float64, where a bug in a compiler's vectorized code might not show.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.two_layers import (
    Claim,
    Claims,
    H,
    Size,
    TwoLayers,
    check,
    direction,
    gradients,
    lengths,
    loss,
    model,
    root_of_squares,
    single,
    solved,
    two_layers,
)

import jaxgrad as jg
from jaxgrad import attribution, curvature, streams

claims = Claims()


def outputs(size: Size) -> int:
    return size.B * size.O


# --- Curvature -------------------------------------------------------------------------------------------------------


def root_rows(data: TwoLayers) -> tuple[np.ndarray, ...]:
    """Rows [B·O, parameters] of the softmax's Gauss-Newton matrix and r [B·O], each with its magnitude."""
    (S, r), scale, large = data.root(), data.size.O**0.5, data.large
    S = S.swapaxes(1, 2) * scale
    magnitudes = data.magnitudes(S * large[:, None, None]), (np.abs(r) * large[:, None]).ravel() * scale
    return data.gradients(S), magnitudes[0], r.ravel() * scale, magnitudes[1]


def gauss_newton_of(params, x, y, loss=curvature.softmax):
    return curvature.gauss_newton(model, loss)(params, x, y)


@claims(outputs)
def gauss_newton(data):
    G, M, r, r_ = root_rows(data)

    def function(*a):
        found = gauss_newton_of(*a)
        return found.rows.norms(), found.residuals.ravel()

    return Claim(function, (lengths(G), r), (lengths(M), r_))


def curved(data: TwoLayers, H: np.ndarray, sizes: np.ndarray) -> tuple[Any, Any, np.ndarray]:
    """mean_b JᵀHJ v, its magnitude, and v; `sizes` are the magnitudes of the terms whose difference is H."""
    v, B, O = direction(data), *data.logits.shape  # noqa: E741
    every = np.broadcast_to(np.eye(O), (B, O, O))
    Jv, Jv_ = data.gradients(every) @ v, data.magnitudes(every) @ np.abs(v)
    u, u_ = np.einsum("bop,bp->bo", H, Jv.reshape(B, O)), np.einsum("bop,bp->bo", sizes, Jv_.reshape(B, O))
    total = lambda u, rows: data.split(rows(u[:, None]).sum(0) / B)  # noqa: E731
    return total(u, data.gradients), total(u_, data.magnitudes), v


def softmax_curvature(data: TwoLayers) -> tuple[np.ndarray, np.ndarray]:
    p, own = data.p, np.eye(data.size.O)
    across = p[:, :, None] * p[:, None, :]
    return own * p[:, :, None] - across, data.large[:, None, None] * (own * p[:, :, None] + across)


@claims(outputs)
def gauss_newton_vector_product(data):
    expected, magnitude, v = curved(data, *softmax_curvature(data))
    product = curvature.gauss_newton_vector_product(model, curvature.softmax)
    return Claim(lambda p, x, y: product(p, single(data.split(v)), x, y), expected, magnitude)


@claims(outputs)
def gauss_newton_vector_product_squared(data):
    identity = np.broadcast_to(np.eye(data.size.O), (*data.logits.shape, data.size.O))
    expected, magnitude, v = curved(data, identity, identity)
    product = curvature.gauss_newton_vector_product(model, curvature.squared)
    return Claim(
        lambda p, x, y: product(p, single(data.split(v)), x, jnp.zeros(data.logits.shape)), expected, magnitude
    )


@claims(outputs)
def fisher_vector_product_of_gauss_newton(data):
    expected, magnitude, v = curved(data, *softmax_curvature(data))
    return Claim(
        lambda *a: curvature.fisher_vector_product(gauss_newton_of(*a), single(data.split(v))), expected, magnitude
    )


def entropy(f, y):
    return jax.nn.logsumexp(f) - jnp.where(jnp.arange(f.size) == y, f, jnp.zeros_like(f)).sum()


@claims(outputs, 2560)
def gauss_newton_of_a_function(data):
    """For a loss that is saturated on most examples, whose Hessian p - p² is mostly rounding error."""
    data = two_layers(data.size, 10.0)
    H, sizes = softmax_curvature(data)
    expected, magnitude, v = curved(data, H, sizes + np.eye(data.size.O))
    params = data.params

    def function(_, x, y):
        return curvature.fisher_vector_product(gauss_newton_of(params, x, y, entropy), single(data.split(v)))

    return Claim(function, expected, magnitude)


@claims()
def fisher_vector_product(data):
    G, M, v, B = data.G, data.M, direction(data), data.size.B
    function = lambda *a: curvature.fisher_vector_product(gradients(*a), single(data.split(v)))  # noqa: E731
    return Claim(function, data.split(G.T @ (G @ v) / B), data.split(2 * M.T @ (M @ np.abs(v)) / B))


def damping(G: np.ndarray, share: float = 0.01) -> tuple[float, float]:
    """(μ, μn), where μ is `share` times the largest eigenvalue of GᵀG/n."""
    mu = float(np.float32(share * np.linalg.norm(G @ G.T, 2) / len(G)))
    return mu, mu * len(G)


def with_residuals(data: TwoLayers) -> tuple[np.ndarray, ...]:
    """The rows and residuals of plain gradients: the gradients and 1, each with its magnitude."""
    ones = np.ones(data.size.B)
    return data.G, data.M, ones, 0 * ones


def step(data: TwoLayers, G: np.ndarray, M: np.ndarray, r: np.ndarray, r_: np.ndarray, rows: Any) -> Claim:
    mu, ridge = damping(G)
    w, w_ = solved(G @ G.T, (M**2).sum(1), ridge, r, r_)
    moved = root_of_squares(w, M) + root_of_squares(w_, G)
    return Claim(lambda *a: curvature.natural_gradient(rows(*a), mu), data.split(G.T @ w), data.split(moved))


@claims()
def natural_gradient(data):
    return step(data, *with_residuals(data), gradients)


@claims(outputs, 1000)
def natural_gradient_of_gauss_newton(data):
    return step(data, *root_rows(data), gauss_newton_of)


@claims()
def fisher_solve(data):
    G, M, v = data.G, data.M, direction(data)
    mu, ridge = damping(G)
    w, w_ = solved(G @ G.T, (M**2).sum(1), ridge, G @ v, root_of_squares(v, M.T))
    return Claim(
        lambda *a: curvature.fisher_solve(gradients(*a), single(data.split(v)), mu),
        data.split((v - G.T @ w) / mu),
        data.split((np.abs(v) + root_of_squares(w, M) + root_of_squares(w_, G)) / mu),
    )


@claims(outputs, 640)
def damped_solve(data):
    G = root_rows(data)[0]
    _, ridge = damping(G)
    right = np.float64(np.float32(np.random.default_rng(2).normal(size=(len(G), 3))))
    K = np.float32(G @ G.T)
    solution = solved(np.float64(K), np.diag(K), ridge, right, 0.0)
    return Claim(lambda *_: curvature.damped_solve(jnp.asarray(K), single(right), ridge), *solution)


@claims()
def kfac_factors(data):
    """The left and the right side of the first layer."""
    B, delta, delta_ = data.size.B, data.G[:, :H], data.M[:, :H]
    x = np.float64(data.x)

    def function(*a):
        found = curvature.kfac_factors(gradients(*a))["in"]
        return sorted((found.left[0], found.right[0]), key=len)

    moments = lambda d, x: [d.T @ d / B, x.T @ x / B]  # noqa: E731
    return Claim(function, moments(delta, x), moments(2 * delta_, np.abs(x)))


@claims()
def output_losses(data):
    """Values, products and roots of the closed forms, at rounded logits."""
    z = np.float64(np.float32(data.logits))
    u = np.float64(np.float32(np.random.default_rng(3).normal(size=z.shape)))
    rounded = data._replace(logits=z)
    (S, r), (Hs, sizes) = rounded.root(), softmax_curvature(rounded)
    m, large = z[:, 0], 1 + np.abs(z).max()
    slope = 1 / (2 * np.cosh(m / 2)) ** 2
    value = -np.log(rounded.p[np.arange(len(z)), data.y])
    forms = (curvature.softmax, curvature.squared, curvature.logistic)

    def function(_, x, y):
        z_, u_, m_, v_ = (single(a) for a in (z, u, m, u[:, 0]))
        given = ((z_, y, u_), (z_, jnp.zeros_like(z_), u_), (m_, jnp.ones_like(m_), v_))
        found = [
            (jax.vmap(f.value)(z, y), jax.vmap(f.product)(z, y, u)) for f, (z, y, u) in zip(forms, given, strict=True)
        ]
        return found, jax.vmap(forms[0].root)(z_, y), jax.vmap(forms[2].root)(m_, jnp.ones_like(m_))

    v = u[:, 0]
    softmax = (value, np.einsum("bop,bp->bo", Hs, u)), (large + value, np.einsum("bop,bp->bo", sizes, np.abs(u)))
    squared = ((z**2).sum(1) / 2, u), ((z**2).sum(1), np.abs(u))
    logistic = (np.log1p(np.exp(-m)), slope * v), (large * np.log1p(np.exp(-m)), large * slope * np.abs(v))
    roots = np.sqrt(slope)[:, None, None], -np.exp(-m / 2)[:, None]
    expected = [softmax[0], squared[0], logistic[0]], (S, r), roots
    magnitude = (
        [softmax[1], squared[1], logistic[1]],
        (large * np.abs(S), large * np.abs(r)),
        tuple(large * np.abs(a) for a in roots),
    )
    return Claim(function, expected, magnitude)


# --- Attribution -----------------------------------------------------------------------------------------------------


@claims()
def self_influence(data):
    return Claim(lambda *a: attribution.self_influence(gradients(*a)), (data.G**2).sum(1), 2 * (data.M**2).sum(1))


def own(data: TwoLayers, G: np.ndarray, M: np.ndarray, r: np.ndarray, r_: np.ndarray, rows: Any) -> Claim:
    """self_influence of rows G, where an example's gradient is the mean of its R rows times r."""
    (mu, ridge), B, R = damping(G), data.size.B, len(G) // data.size.B
    W, W_ = solved(G @ G.T, (M**2).sum(1), ridge, G @ G.T, 2 * M @ M.T)
    blocks = lambda A: np.einsum("bkbl->bkl", A.reshape(B, R, B, R))  # noqa: E731
    W, W_, r, r_ = blocks(W), blocks(W_), r.reshape(B, R), r_.reshape(B, R)
    form = lambda a, W, b: B / R * np.einsum("bk,bkl,bl->b", a, W, b)  # noqa: E731
    moved = form(np.abs(r), W_, np.abs(r)) + 2 * form(r_, np.abs(W), np.abs(r))
    return Claim(lambda *a: attribution.self_influence(rows(*a), mu), form(r, W, r), moved)


def across(data: TwoLayers, G: np.ndarray, M: np.ndarray, r: np.ndarray, r_: np.ndarray, rows: Any) -> Claim:
    """influence on every eighth example."""
    (mu, ridge), tests = damping(G), slice(None, None, 8)
    T, T_ = data.G[tests], data.M[tests]
    W, W_ = solved(G @ G.T, (M**2).sum(1), ridge, G @ T.T, 2 * M @ T_.T)
    by_example = lambda A: A.T.reshape(len(T), data.size.B, -1).sum(2)  # noqa: E731
    expected = by_example(W * r[:, None])
    moved = by_example(W_ * np.abs(r)[:, None] + np.abs(W) * r_[:, None])
    return Claim(lambda *a: attribution.influence(rows(*a), gradients(*a)[tests], mu), expected, moved)


@claims()
def self_influence_damped(data):
    return own(data, *with_residuals(data), gradients)


@claims(outputs, 640)
def self_influence_of_gauss_newton(data):
    return own(data, *root_rows(data), gauss_newton_of)


@claims()
def influence(data):
    return across(data, *with_residuals(data), gradients)


@claims(outputs, 640)
def influence_of_gauss_newton(data):
    return across(data, *root_rows(data), gauss_newton_of)


@claims()
def cosine_similarity(data):
    n, m = lengths(data.G), lengths(data.M)
    expected = data.G @ data.G.T / np.outer(n, n)
    return Claim(lambda *a: attribution.cosine_similarity(gradients(*a)), expected, 3 * np.outer(m / n, m / n))


@claims()
def noise_scale(data):
    G, B = data.G, data.size.B
    noise = G.var(0, ddof=1).sum()
    signal = (G.mean(0) ** 2).sum() - noise / B
    size = 4 * (data.M**2).sum(1).mean()
    of_scale = size / signal * (1 + noise / signal)
    return Claim(
        lambda *a: tuple(attribution.noise_scale(gradients(*a))),
        (noise, signal, noise / signal),
        (size, size, of_scale),
    )


@claims()
def grand(data):
    twice = lambda params, x, y: attribution.grand(loss)([params, params], x, y)  # noqa: E731
    return Claim(twice, lengths(data.G), lengths(data.M))


@claims()
def tracin(data):
    function = lambda params, x, y: attribution.tracin(loss)([params], [0.5], (x, y), (x[::4], y[::4]))  # noqa: E731
    return Claim(function, data.G[::4] @ data.G.T / 2, data.M[::4] @ data.M.T)


def kernel(data: TwoLayers, count: int) -> tuple[np.ndarray, np.ndarray]:
    """[B, count, O, O], and its magnitude."""
    B, O = data.logits.shape  # noqa: E741
    every = np.broadcast_to(np.eye(O), (B, O, O))
    J, J_ = data.gradients(every), data.magnitudes(every)
    form = lambda A: (A @ A[: count * O].T).reshape(B, O, count, O).swapaxes(1, 2)  # noqa: E731
    return form(J), 2 * form(J_)


@claims(lambda s: s.B * s.O * (1 + s.O // 20))
def ntk(data):
    return Claim(lambda params, x, _: jg.attribution.ntk(model)(params, x, x[:16]), *kernel(data, 16))


@claims(outputs)
def ntk_in_blocks(data):
    return Claim(lambda params, x, _: jg.attribution.ntk(model, block_size=48)(params, x, x[:8]), *kernel(data, 8))


@claims()
def influence_in_blocks(data):
    found = across(data, *with_residuals(data), gradients)
    mu, _ = damping(data.G)
    function = lambda params, x, y: streams.influence(loss, mu)(  # noqa: E731
        params, streams.Batches(x, y, size=100), streams.Batches(x[::8], y[::8], size=100)
    )
    return found._replace(function=function, jitted=False)


@pytest.mark.every(51)
@pytest.mark.parametrize(("name", "size"), claims.runs)
def test_curvature_and_attribution(name, size):
    data = two_layers(size)
    check(claims[name](data), data)
