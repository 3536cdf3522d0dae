"""Branches, mapped functions, experts, and derivatives inside the loss."""

import jax
import jax.numpy as jnp
from jax import lax

from support.zoo.base import Draws, collection, paths

ENTRIES, entry = collection()
draws = Draws(7)
w, x, positive = draws.weight, draws.normal, draws.positive


# --- branches


@entry({"W": w(11, 9), "V": w(11, 9)}, (x(5, 9),), paths("W", "V"))
def cond(p, x):
    return lax.cond(x[0] > 0, lambda x: jnp.sum(jnp.tanh(p["W"] @ x)), lambda x: jnp.sum(jnp.sin(p["V"] @ x)), x)


@entry({"W": w(11, 9)}, (x(5, 9), draws.booleans(5)), paths("W"))
def cond_with_one_weight_in_both_branches(p, x, flag):
    def first(W, x):
        return jnp.sum(jnp.tanh(W @ x))

    def second(W, x):
        return jax.nn.logsumexp(W[:, ::-1] @ x) * 2

    return lax.cond(flag, first, second, p["W"], x)


@entry({"W": w(11, 9), "V": w(11, 9), "b": x(11)}, (x(5, 9), draws.ids(3, 5)), paths("W", "V"))
def switch(p, x, i):
    branches = [lambda x: p["W"] @ x, lambda x: p["V"] @ x + p["b"], lambda x: jnp.sin(p["W"] @ x) * p["b"]]
    return jnp.sum(jnp.tanh(lax.switch(i, branches, x)))


@entry({"W": w(11, 9), "V": w(9, 8)}, (x(5, 9), x(5, 8)), paths("W", "V"))
def cond_that_returns_a_weight(p, x, y):
    M = lax.cond(y[0] > 0, lambda: p["W"], lambda: -2 * p["W"])
    return jnp.sum(jnp.tanh(M @ x)) + jnp.where(x[0] > 0, jnp.sum(jnp.tanh(p["V"] @ y)), 0.1 * x @ p["V"] @ y)


@entry({"W": w(11, 9)}, (x(5, 9),), paths("W"))
def select_n_of_three(p, x):
    h = p["W"] @ x
    return jnp.sum(jnp.tanh(jnp.select([h > 0.5, h < -0.5], [h, 2 * h + 0.5], h**3)))


# --- mapped functions


@entry({"W": w(11, 12), "b": x(11)}, (x(4, 3, 12),), paths("W"))
def vmap_over_positions(p, x):
    return jnp.sum(jax.vmap(lambda x: jnp.tanh(p["W"] @ x + p["b"]))(x).prod(0))


@entry({"W": w(4, 11, 9), "b": x(4, 11)}, (x(3, 9),), paths("W"))
def vmap_over_weights(p, x):
    return jax.nn.logsumexp(jax.vmap(lambda W, b: jnp.sum(jnp.tanh(W @ x + b)))(p["W"], p["b"]))


@entry({"W": w(11, 4, 9), "V": w(4, 8, 11)}, (x(3, 4, 9),), paths("W", "V"))
def vmap_over_weights_and_positions(p, x):
    def head(W, V, x):
        return jnp.tanh(V @ jnp.tanh(W @ x))

    return jnp.sum(jax.vmap(head, in_axes=(1, 0, 0), out_axes=1)(p["W"], p["V"], x) ** 2)


@entry({"W": w(11, 12)}, (x(3, 2, 2, 12),), paths("W"))
def vmap_of_vmap(p, x):
    return jnp.sum(jnp.tanh(jax.vmap(jax.vmap(lambda x: p["W"] @ x, in_axes=0, out_axes=1))(x)))


# --- experts


@entry({"W": w(5, 17, 19)}, (draws.ids(5, 4, 3), x(4, 3, 19)), paths("W"))
def an_expert_for_every_token(p, e, x):
    return jnp.sum(jnp.tanh(jnp.einsum("tfk,tk->tf", p["W"][e], x)))


@entry({"W": w(19, 5, 17)}, (draws.ids(9, 4, 2), x(4, 2, 19)), paths("W"))
def an_expert_for_every_token_or_none(p, e, x):
    W = jnp.take(p["W"], e, axis=1, mode="fill", fill_value=0)
    return jnp.sum(jnp.tanh(jnp.einsum("ktf,tk->tf", W, x))) + jnp.sum(jnp.take(p["W"], e, axis=1, mode="clip")[0])


@entry({"W": w(5, 17, 19)}, (draws.ids(5, 4, 2, 2), x(4, 2, 19)), paths("W"))
def two_experts_for_every_token(p, e, x):
    return jnp.sum(jnp.tanh(jnp.einsum("tnfk,tk->tf", p["W"][e], x)))


@entry({"router": w(4, 9), "W": w(4, 11, 9), "V": w(4, 8, 11)}, (x(3, 9),), paths("W", "V"))
def experts_by_einsum(p, x):
    gate = jax.nn.softmax(p["router"] @ x)
    h = jnp.tanh(jnp.einsum("efk,k->ef", p["W"], x))
    return jnp.sum(jnp.tanh(jnp.einsum("e,egf,ef->g", gate, p["V"], h)))


@entry({"router": w(9, 4), "W": w(4, 9, 11), "b": x(4, 11)}, (x(3, 2, 9),), paths("W"))
def experts_by_vmap(p, x):
    gate = jax.nn.softmax(x @ p["router"])
    h = jax.vmap(lambda W, b: jnp.tanh(x @ W + b))(p["W"], p["b"])
    return jax.nn.logsumexp(jnp.einsum("te,etf->tf", gate, h))


@entry({"W": w(5, 11, 9)}, (x(3, 9), jax.nn.softmax(x(3, 5))))
def mixture_of_weights(p, x, mixture):
    return jnp.sum(jnp.tanh(jnp.einsum("e,efk->fk", mixture, p["W"]) @ x))


@entry({"H": w(8, 7, 10), "b": w(8, 7)}, (x(4, 10), x(4, 7)), paths("H"))
def hypernetwork(p, z, x):
    return jnp.sum(jnp.tanh((p["H"] @ z + p["b"]) @ x))


@entry({"H": w(10, 56), "V": w(12, 8)}, (x(4, 10), x(4, 7)), paths("H", "V"))
def hypernetwork_reshaped(p, z, x):
    W = jnp.tanh(z @ p["H"]).reshape(8, 7)
    return jnp.sum(jnp.tanh(p["V"] @ jnp.tanh(W @ x)))


# --- derivatives inside the loss


def field(p, z):
    h = jnp.tanh(p["features"] @ z)
    h = jnp.tanh(p["W"] @ h + p["b"])
    return p["v"] @ jnp.tanh(p["V"] @ h)


FIELD = {"features": w(13, 3), "W": w(14, 13), "b": x(14), "V": w(12, 14), "v": x(12)}


@entry(FIELD, (x(4, 3), x(4)), paths("W", "V"))
def derivative_along_a_direction(p, z, source):
    u, u_t = jax.jvp(lambda z: field(p, z), (z,), (jnp.array([1.0, 0.0, 0.0]),))
    return (u_t + jnp.sin(u) - source) ** 2


@entry(FIELD, (x(4, 3), x(4)), paths("W", "V"))
def second_derivative_along_a_direction(p, z, source):
    def along(s):
        return field(p, z + s * jnp.array([0.6, -0.8, 0.1]))

    u_ss = jax.jvp(lambda s: jax.jvp(along, (s,), (1.0,))[1], (0.0,), (1.0,))[1]
    return (u_ss - source) ** 2


@entry(FIELD, (x(4, 3),), paths("W", "V"))
def gradient_of_the_input(p, z):
    u, u_z = jax.value_and_grad(lambda z: field(p, z))(z)
    return (u_z[0] + u * u_z[1] - 0.1 * u_z[2]) ** 2


@entry({"W": w(14, 12), "V": w(13, 14), "v": x(13)}, (x(3, 12), x(3, 12)), paths("W", "V"))
def gradient_penalty(p, real, fake):
    def critic(x):
        return p["v"] @ jnp.tanh(p["V"] @ jnp.tanh(p["W"] @ x))

    slope = jax.grad(critic)(0.3 * real + 0.7 * fake)
    return 10 * (jnp.sqrt(slope @ slope) - 1) ** 2


@entry({"W": w(9, 9), "V": w(7, 9)}, (x(4, 9), x(4, 9)))
def jacobian_of_the_input(p, x, v):
    h, back = jax.vjp(lambda x: jnp.tanh(p["W"] @ x), x)
    J = jax.jacfwd(lambda x: jnp.tanh(p["V"] @ x))(back(v)[0])
    return jnp.sum(J**2) + jnp.linalg.slogdet(jnp.eye(9) + 0.1 * jax.jacrev(lambda h: jnp.tanh(p["W"] @ h))(h))[1]


@entry({"W": w(11, 9), "U": w(9, 11)}, (x(4, 9), x(4, 9)), paths("U"))
def one_step_of_an_inner_fit(p, x, y):
    def inner(W):
        return jnp.sum((jnp.tanh(W @ x)[:9] - y) ** 2)

    W = p["W"] - 0.1 * jax.grad(inner)(p["W"])
    return jnp.sum(jnp.tanh(p["U"] @ jnp.tanh(W @ y)))
