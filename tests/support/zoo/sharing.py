"""Weights that are used several times, made of one another, scaled, cast or masked."""

import jax
import jax.numpy as jnp
import numpy as np

from support.zoo.base import Draws, collection, paths

ENTRIES, entry = collection()
draws = Draws(4)
w, x, positive = draws.weight, draws.normal, draws.positive


@entry({"W": w(12, 13)}, (x(4, 13), x(4, 13)), paths("W"))
def siamese(p, x, y):
    return jnp.sum((jnp.tanh(p["W"] @ x) - jnp.tanh(p["W"] @ y)) ** 2)


@entry({"W": w(12, 12), "b": x(12)}, (x(4, 12),), paths("W"))
def three_uses(p, x):
    for _ in range(3):
        x = jnp.tanh(p["W"] @ x + p["b"])
    return x.sum()


@entry({"W": w(13, 12)}, (x(4, 12),), paths("W"))
def four_uses_both_ways_round(p, x):
    h = jnp.tanh(p["W"] @ x)
    h = jnp.tanh(p["W"].T @ h)
    return jax.nn.logsumexp(p["W"] @ h) + jnp.tanh(h @ p["W"].T)[0]


@entry({"W": w(14, 14)}, (x(3, 14),), paths("W"))
def five_uses(p, x):
    h = [x]
    for _ in range(5):
        h.append(jnp.sin(p["W"] @ sum(h)))
    return sum(h) @ h[-1]


@entry({"W": w(12, 9), "b": x(12), "c": x(9)}, (x(4, 9),), paths("W"))
def tied_autoencoder(p, x):
    return jnp.sum((p["W"].T @ jnp.tanh(p["W"] @ x + p["b"]) + p["c"] - x) ** 2)


@entry({"W": w(12, 9)}, (x(4, 12),), paths("W"))
def weight_and_its_transpose_on_a_vector(p, x):
    return jnp.sum(jnp.tanh(p["W"] @ (p["W"].T @ x)))


@entry({"W": w(12, 9)}, (x(4, 12),), paths("W"))
def weight_times_its_transpose(p, x):
    return jnp.sum(jnp.tanh((p["W"] @ p["W"].T) @ x))


@entry({"W": w(12, 12)}, (x(4, 12),), paths("W"))
def weight_times_itself(p, x):
    return jnp.sum(jnp.tanh((p["W"] @ p["W"]) @ x))


@entry({"W": w(12, 9)}, (x(4, 9),))
def weight_squared_elementwise(p, x):
    return jnp.sum(jnp.tanh((p["W"] * p["W"]) @ x)) + jnp.sum(p["W"] ** 3) * x[0]


FROZEN = w(11, 13)


@entry({"A": w(11, 6), "B": w(6, 13)}, (x(4, 2, 13),), paths("A", "B"))
def low_rank_update_of_a_frozen_weight(p, x):
    return jnp.sum(jnp.tanh(x @ (FROZEN + p["A"] @ p["B"]).T))


@entry({"W": w(11, 13), "A": w(11, 6), "B": w(6, 13)}, (x(4, 13),), paths("W", "A", "B"))
def low_rank_update_of_a_trained_weight(p, x):
    return (
        jnp.sum(jnp.tanh(p["W"] @ x + 0.5 * (p["A"] @ (p["B"] @ x))))
        + jax.nn.softplus((p["W"] + p["A"] @ p["B"]) @ x).sum()
    )


@entry({"W": FROZEN, "A": w(11, 6), "B": w(6, 13)}, (x(4, 13),), paths("A", "B"))
def low_rank_update_of_a_stopped_weight(p, x):
    return jnp.sum(jnp.tanh((jax.lax.stop_gradient(p["W"]) + p["A"] @ p["B"]) @ x))


@entry({"P": w(9, 10), "Q": w(10, 11), "R": w(11, 12)}, (x(3, 12), x(3, 9)), paths(*"PQR"))
def chain_of_products(p, x, y):
    return jax.nn.softplus(y @ (p["P"] @ p["Q"] @ p["R"]) @ x)


@entry({"V": w(11, 9), "g": positive(11)}, (x(4, 9),))
def weight_norm(p, x):
    W = p["g"][:, None] * p["V"] / jnp.linalg.norm(p["V"], axis=1, keepdims=True)
    return jnp.sum(jnp.tanh(W @ x))


@entry({"V": w(11, 9), "u": x(11), "s": np.float64(1.3)}, (x(4, 9),))
def spectral_norm_by_one_power_step(p, x):
    v = p["V"].T @ p["u"]
    u = p["V"] @ (v / jnp.linalg.norm(v))
    return jnp.sum(jnp.tanh(p["s"] * p["V"] / (u @ u) @ x))


@entry({"W": w(11, 9), "s": positive(11), "t": positive(9)}, (x(4, 9),), paths("W"))
def rows_and_columns_scaled(p, x):
    return jnp.sum(jnp.tanh((p["W"] * p["s"][:, None]) @ x)) + jnp.sum(jnp.sin((p["W"] * p["t"]) @ x))


@entry({"W": w(11, 9), "V": w(8, 11)}, (x(4, 2, 9),), paths("W", "V"), rtol=2e-5)
def computed_in_float32(p, x):
    W, V, x = (a.astype(jnp.float32) for a in (p["W"], p["V"], x))
    return jnp.sum(jnp.tanh(jnp.tanh(x @ W.T) @ V.T).astype(jnp.float64) ** 2)


@entry({"W": w(11, 9)}, (x(4, 9),), paths("W"), rtol=5e-2)
def computed_in_bfloat16(p, x):
    h = (p["W"].astype(jnp.bfloat16) @ x.astype(jnp.bfloat16)).astype(jnp.float64)
    return jnp.sum(jnp.tanh(h) ** 2)


@entry({"W": w(11, 9), "V": w(11, 9)}, (x(4, 9),), paths("W", "V"))
def negated_and_scaled_by_numbers(p, x):
    return jnp.sum(jnp.tanh(-p["W"] @ x + (p["V"] / 3 - 2 * p["W"]) @ x))


@entry({"W": w(11, 9)}, (x(4, 9), positive(4)), paths("W"))
def scaled_by_a_number_of_the_example(p, x, temperature):
    return jnp.sum(jnp.tanh(p["W"] / temperature @ x) * temperature) + jax.nn.logsumexp((temperature * p["W"]) @ x)


MASK = draws.booleans(11, 9)


@entry({"W": w(11, 9), "V": w(11, 9)}, (x(4, 9),))
def masked_weights(p, x):
    return jnp.sum(jnp.tanh((p["W"] * MASK.astype(float)) @ x + jnp.where(MASK, p["V"], 0) @ x))


@entry({"W": w(11, 9)}, (x(4, 9), draws.booleans(4, 11, 9)))
def weights_dropped_by_the_example(p, x, mask):
    return jnp.sum(jnp.tanh(jnp.where(mask, p["W"], 0) @ x))


@entry({"W": w(11, 9), "V": w(11, 9)}, (x(4, 9), draws.booleans(4)), paths("W", "V"))
def one_of_two_weights(p, x, first):
    return jnp.sum(jnp.tanh(jnp.where(first, p["W"], p["V"]) @ x))


@entry({"W": w(11, 9), "b": x(11)}, (x(4, 9),))
def regularized(p, x):
    return jnp.sum(jnp.tanh(p["W"] @ x + p["b"])) + 0.01 * sum(jnp.sum(v**2) for v in p.values()) * x[0]


@entry({"W": w(11, 9)}, (x(4, 9),))
def regularizer_alone(p, x):
    return 0.5 * jnp.sum(p["W"] ** 2) * x[0] + jnp.linalg.norm(p["W"]) * x[1] + jnp.abs(p["W"]).sum() * x[2]


@entry({"W": w(9, 11), "V": w(9, 11)}, (x(4, 9), x(4, 11)), paths("W", "V"))
def sum_of_weights(p, x, y):
    return jax.nn.softplus(x @ (p["W"] + p["V"]) @ y) + jnp.sum(jnp.tanh(x @ (p["W"] - 0.3 * p["V"])))


@entry({"W": w(12, 12)}, (x(4, 12),), paths("W"))
def symmetric_part(p, x):
    return jnp.sum(jnp.tanh((p["W"] + p["W"].T) / 2 @ x))


@entry({"W": w(9, 11), "new": w(9, 11)}, (x(4, 9),), paths("W"))
def stopped_weight_as_target(p, x):
    return jnp.sum((jnp.tanh(x @ p["W"]) - jax.lax.stop_gradient(jnp.tanh(x @ p["new"]))) ** 2)
