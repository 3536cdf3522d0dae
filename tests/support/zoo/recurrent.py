"""Weights in loops: closed over, scanned over, both, forwards and backwards."""

import jax
import jax.numpy as jnp
from jax import lax

from support.zoo.base import Draws, collection, paths

ENTRIES, entry = collection()
draws = Draws(8)
w, x = draws.weight, draws.normal


@entry({"W": w(13, 13), "U": w(13, 11), "b": x(13)}, (x(4, 5, 11),), paths("W", "U"))
def vanilla_rnn(p, xs):
    def step(h, x):
        h = jnp.tanh(p["W"] @ h + p["U"] @ x + p["b"])
        return h, h

    h, hs = lax.scan(step, jnp.zeros(13), xs)
    return jnp.sum(h * hs[1])


@entry({"W": w(36, 12), "U": w(36, 11), "b": x(36), "head": w(7, 12)}, (x(3, 4, 11), draws.ids(7, 3)), paths("W", "U"))
def gru(p, xs, label):
    def step(h, x):
        rx, zx, nx = jnp.split(p["U"] @ x + p["b"], 3)
        rh, zh, nh = jnp.split(p["W"] @ h, 3)
        r, z = jax.nn.sigmoid(rx + rh), jax.nn.sigmoid(zx + zh)
        return (1 - z) * jnp.tanh(nx + r * nh) + z * h, None

    h, _ = lax.scan(step, jnp.zeros(12), xs)
    logits = p["head"] @ h
    return jax.nn.logsumexp(logits) - logits[label]


@entry({"W": w(48, 23), "b": x(48), "start": x(12)}, (x(3, 4, 11),), paths("W"))
def lstm(p, xs):
    def step(state, x):
        h, c = state
        i, f, g, o = jnp.split(p["W"] @ jnp.concatenate([h, x]) + p["b"], 4)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    (_, c), hs = lax.scan(step, (p["start"], jnp.zeros(12)), xs)
    return jnp.sum(c) + jnp.sum(hs**2)


@entry({"W": w(13, 13), "U": w(11, 13)}, (x(4, 4, 11),), paths("W", "U"))
def backwards(p, xs):
    return lax.scan(lambda h, x: (jnp.tanh(h @ p["W"] + x @ p["U"]),) * 2, jnp.ones(13), xs, reverse=True)[1].sum()


@entry({"W": w(14, 14), "U": w(14, 12)}, (x(3, 3, 12),), paths("W", "U"))
def one_weight_in_both_directions(p, xs):
    def run(reverse):
        return lax.scan(
            lambda h, x: (jnp.tanh(p["W"] @ h + p["U"] @ x), h), jnp.ones(14), xs, reverse=reverse, unroll=2
        )

    return run(False)[0] @ run(True)[0]


@entry({"W": w(4, 11, 11), "b": x(4, 11)}, (x(4, 11),), paths("W"))
def scanned_over_layers(p, x):
    x, _ = lax.scan(lambda x, layer: (x + jnp.tanh(layer["W"] @ x + layer["b"]), None), x, p)
    return jax.nn.logsumexp(x)


@entry({"W": w(3, 12, 12), "U": w(12, 12)}, (x(4, 12),), paths("W", "U"))
def scanned_over_and_closed_over(p, x):
    return lax.scan(lambda h, W: (jnp.tanh(W @ h + p["U"] @ h), h.sum()), x, p["W"])[1] @ x[:3]


@entry({"W": w(14, 14), "U": w(14, 13)}, (x(3, 2, 3, 13),), paths("W", "U"))
def nested_scans(p, xs):
    def inner(h, x):
        return jnp.tanh(p["W"] @ h + p["U"] @ x), None

    def outer(h, xs):
        h, _ = lax.scan(inner, h, xs)
        return h, h[0]

    h, ys = lax.scan(outer, jnp.zeros(14), xs)
    return h.sum() + ys @ ys


@entry({"W": w(2, 3, 11, 11)}, (x(3, 11),), paths("W"))
def scanned_over_groups_of_layers(p, x):
    def inner(h, W):
        return jnp.sin(W @ h), None

    return lax.scan(lambda h, W: (lax.scan(inner, h, W)[0] + h, None), x, p["W"])[0].sum()


@entry({"W": w(12, 11)}, (x(4, 3, 11),), paths("W"))
def lax_map(p, xs):
    return jnp.sum(lax.map(lambda x: jnp.tanh(p["W"] @ x), xs).prod(0))


@entry({"W": w(12, 12), "b": x(12)}, (x(4, 12),), paths("W"))
def fori_loop(p, x):
    return lax.fori_loop(0, 4, lambda i, h: jnp.tanh(p["W"] @ h + p["b"] * i), x).sum()


@entry({"W": w(3, 11, 11)}, (x(4, 11),))
def fori_loop_that_indexes_layers(p, x):
    return lax.fori_loop(0, 3, lambda i, h: jnp.tanh(p["W"][i] @ h), x).sum()


@entry({"W": w(9, 9)}, (x(4, 9),))
def weight_carried_by_the_scan(p, x):
    def step(carry, _):
        W, h = carry
        return (0.9 * W, jnp.tanh(W @ h)), None

    return lax.scan(step, (p["W"], x), None, length=3)[0][1].sum()


@entry({"W": w(12, 11), "V": w(12, 10)}, (x(4, 3, 11), x(4, 3, 10)), paths("W", "V"))
def associative_scan(p, xs, ys):
    decay, values = jax.nn.sigmoid(xs @ p["W"].T), ys @ p["V"].T
    _, hs = lax.associative_scan(lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1]), (decay, values))
    return jnp.sum(jnp.tanh(hs))


@entry({"W": w(13, 13), "U": w(13, 11)}, (x(4, 4, 11), draws.ids(4, 4) + 1), paths("W", "U"))
def stopped_at_the_length(p, xs, length):
    def step(h, at):
        i, x = at
        return jnp.where(i < length, jnp.tanh(p["W"] @ h + p["U"] @ x), h), None

    return lax.scan(step, jnp.zeros(13), (jnp.arange(4), xs))[0].sum()


@entry({"W": w(13, 13), "U": w(13, 11)}, (x(4, 4, 11),), paths("W", "U"))
def checkpointed_step(p, xs):
    @jax.checkpoint
    def step(h, x):
        return jnp.tanh(p["W"] @ h + p["U"] @ x), None

    return jax.nn.logsumexp(lax.scan(step, jnp.zeros(13), xs)[0])


@entry({"W": w(13, 13), "U": w(13, 11), "V": w(13, 13)}, (x(4, 3, 11),), paths("W", "U", "V"))
def cond_inside_a_scan(p, xs):
    def step(h, x):
        h = lax.cond(x[0] > 0, lambda h: p["W"] @ h, lambda h: p["V"] @ h, h)
        return jnp.tanh(h + p["U"] @ x), None

    return lax.scan(step, jnp.ones(13), xs)[0].sum()
