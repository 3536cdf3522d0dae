"""Literals of every kind, as every operand that can be one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from support.zoo.base import Draws, collection, paths

ENTRIES, entry = collection()
draws = Draws(11)
w, x = draws.weight, draws.normal


@entry({"W": w(9, 9), "V": w(9, 7)}, (x(4, 3, 9),), paths("W", "V"))
def causal_mask(p, x):
    scores = x @ p["W"] @ x.T + jnp.triu(jnp.full((3, 3), -1e9), 1)
    return jnp.sum(jnp.tanh(jax.nn.softmax(scores) @ x @ p["V"]))


@entry({"W": w(9, 9)}, (x(4, 9),), paths("W"))
def scan_from_a_number(p, x):
    return lax.scan(lambda h, _: (jnp.tanh(p["W"] @ h + x), None), jnp.full(9, 0.5), length=3)[0].sum()


@entry({"W": w(9, 7)}, (x(4, 7),), paths("W"))
def label_smoothing(p, x):
    return -jnp.sum(jax.nn.log_softmax(p["W"] @ x) * jnp.full(9, 0.02).at[1].set(0.84))


@entry({"W": w(9, 7)}, (x(4, 7),), paths("W"))
def truths_that_are_full(p, x):
    h = jnp.where(jnp.full(9, True), jnp.tanh(p["W"] @ x), jnp.full(9, False).astype(float))
    return jnp.sum(h) * np.float64(0.5) + jnp.float32(2) * h[0] ** np.int32(2)


@entry({"w": np.float64(1.5), "W": w(9, 7)}, (x(4, 7),), paths("W"))
def powers_of_a_number(p, x):
    return p["w"] ** 3 + jnp.sum(jnp.tanh(p["W"] @ x) ** 2) + 2 ** x[0]


@entry({"W": w(9, 7)}, (x(4, 7),), paths("W"))
def branches_that_are_numbers(p, x):
    a = jnp.sum((p["W"] @ x) ** 2)
    small = lax.cond(a < 1e-3, lambda: 1e-3, lambda: jnp.sqrt(a))
    return small + lax.cond(x[0] > 0, lambda b: 0.0, lambda b: b * 2, a)


@entry({"W": w(9, 7)}, (x(4, 7),), paths("W"))
def custom_rule_with_a_number(p, x):
    def scaled(c):
        @jax.custom_vjp
        def f(h):
            return c * h

        f.defvjp(lambda h: (c * h, None), lambda _, g: (g * c,))
        return f

    return jnp.sum(scaled(2.0)(jnp.tanh(p["W"] @ x)) + scaled(np.float64(3))(p["W"] @ x))


def linear_recurrence(p, x):
    a, u = p[0], x @ p[1]
    decay = jnp.broadcast_to(jax.nn.sigmoid(a), u.shape)
    combine = lambda l, r: (l[0] * r[0], r[0] * l[1] + r[1])  # noqa: E731, E741
    return jnp.sum(jnp.tanh(lax.associative_scan(combine, (decay, u))[1]))


for T in (1, 2, 3, 4, 5, 8, 9):  # parts of size zero from T = 4 on
    loss = functools.wraps(linear_recurrence)(lambda p, x: linear_recurrence(p, x))
    loss.__name__ = f"linear_recurrence_of_length_{T}"
    entry((x(16), w(21, 16)), (x(3, T, 21),), paths() if T == 9 else ("[1]",))(loss)
