"""Functions of a weight: their gradients have no small factors in general."""

import jax
import jax.numpy as jnp
from jax import lax

from support.zoo.base import Draws, collection

ENTRIES, entry = collection()
draws = Draws(6)
w, x, positive = draws.weight, draws.normal, draws.positive


@entry({"W": w(9, 7), "V": positive(9, 7)}, (x(4, 7),))
def cumulated(p, x):
    return jnp.sum(jnp.tanh(jnp.cumsum(p["W"], axis=0) @ x)) + jnp.sum(jnp.sin(jnp.cumprod(p["V"], axis=1) @ x))


@entry({"W": w(9, 7), "V": w(9, 7)}, (x(4, 7), x(4, 9)))
def sorted_entries(p, x, y):
    return jnp.sum(jnp.tanh(jnp.sort(p["W"], axis=1) @ x)) + y @ jax.nn.relu(p["V"]) @ x + p["V"].max(1) @ y


@entry({"W": w(9, 9), "V": w(9, 9)}, (x(4, 9),))
def triangular(p, x):
    return jnp.sum(jnp.tanh(jnp.tril(p["W"]) @ x)) + jax.nn.logsumexp(jnp.triu(p["V"], 1) @ x)


@entry({"W": w(9, 7), "V": w(9, 7)}, (x(4, 7),))
def exponential_and_softmax(p, x):
    return jnp.sum(jnp.tanh(jnp.exp(p["W"]) @ x)) + jax.nn.logsumexp(jax.nn.softmax(p["V"], axis=1) @ x)


@entry({"W": w(9, 7)}, (x(4, 7),))
def standardized(p, x):
    W = p["W"] - p["W"].mean(1, keepdims=True)
    return jnp.sum(jnp.tanh(W / (W.std(1, keepdims=True) + 0.1) @ x))


@entry({"W": w(6, 6), "V": w(6, 6)}, (x(4, 6),))
def inverse_and_solve(p, x):
    eye = jnp.eye(6)
    return jnp.sum(jnp.tanh(jnp.linalg.inv(p["W"] + 3 * eye) @ x)) + jnp.sum(jnp.linalg.solve(p["V"] + 3 * eye, x) ** 2)


@entry({"W": w(6, 6), "L": w(6, 6)}, (x(4, 6), x(4, 6)))
def gaussian_log_likelihood(p, x, y):
    sign, logdet = jnp.linalg.slogdet(p["W"] * y + 3 * jnp.eye(6))
    chol = jnp.linalg.cholesky(p["L"] @ p["L"].T + jnp.eye(6))
    z = lax.linalg.triangular_solve(chol, x[:, None], left_side=True, lower=True)[:, 0]
    return sign * logdet + 0.5 * z @ z + jnp.log(jnp.diag(chol)).sum() * y[0]


@entry({"W": w(7, 7)}, (x(4, 7),))
def cayley_orthogonal(p, x):
    skew, eye = p["W"] - p["W"].T, jnp.eye(7)
    return jnp.sum(jnp.tanh(jnp.linalg.solve(eye + skew, eye - skew) @ x))


@entry({"W": w(6, 5)}, (x(4, 6), x(4, 5), positive(4)))
def functions_of_weight_and_example(p, x, y, t):
    W = jnp.tanh(p["W"] * t + x[:, None] * y)
    return jax.nn.softplus(x @ W @ y) + jnp.sum(jnp.exp(-((p["W"] - y) ** 2)))


@entry({"centers": w(7, 5), "weights": x(7)}, (x(4, 5),))
def distances_to_centers(p, x):
    return jnp.exp(-((x - p["centers"]) ** 2).sum(1)) @ p["weights"]


@entry({"W": w(7, 5)}, (x(4, 5), x(4, 7)))
def smallest_of_sums(p, x, y):
    return jnp.sum(jnp.tanh(jnp.min(p["W"] + x, axis=1) * y)) + jnp.sum(jnp.maximum(p["W"], x) @ x)


@entry({"a": x(), "b": x(), "v": x(7)}, (x(4), x(4, 7)))
def scalars(p, x, y):
    return jnp.tanh(p["a"] * x + p["b"]) ** 2 + jnp.sum(jax.nn.softplus(p["v"] * p["a"] + y))
