"""Parts of a parameter, parameters put together, and linear maps that only move entries about."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from support.zoo.base import Draws, collection, paths

ENTRIES, entry = collection()
draws = Draws(5)
w, x = draws.weight, draws.normal
PERMUTATION = np.array([3, 0, 10, 7, 1, 9, 2, 8, 4, 6, 5])


@entry({"W": w(16, 12), "b": x(16)}, (x(4, 12),), paths("W"))
def first_rows(p, x):
    return jnp.sum(jnp.tanh(p["W"][:7] @ x + p["b"][:7])) + jax.nn.logsumexp(p["W"][4:, 2:11] @ x[:9])


@entry({"A": w(9, 7), "B": w(9, 8), "C": w(4, 15)}, (x(3, 2, 13),), paths(*"ABC"))
def concatenated(p, x):
    W = jnp.concatenate([jnp.concatenate([p["A"], p["B"]], axis=1), p["C"]])
    return jnp.sum(jnp.tanh(x @ W))


@entry({"A": w(9, 11), "B": w(9, 11), "C": w(9, 11)}, (x(4, 9),), paths(*"ABC"))
def stacked(p, x):
    return jnp.sum(jnp.tanh(jnp.stack([p["A"], p["B"], p["C"]]).transpose(0, 2, 1) @ x).prod(0))


@entry({"W": w(9, 24)}, (x(4, 9),), paths("W"))
def split_into_heads(p, x):
    a, b, c = jnp.split(p["W"], 3, axis=1)
    return jnp.sum(jnp.tanh(x @ a) * jax.nn.sigmoid(x @ b) + jnp.sin(x @ c))


@entry({"W": w(9, 16)}, (x(4, 9),), paths("W"))
def reshaped_with_its_axes_read_in_another_order(p, x):
    return jnp.sum(jnp.tanh(lax.reshape(p["W"], (4, 4, 9), dimensions=(1, 0)) @ x))


@entry({"W": w(13, 9)}, (x(4, 9),), paths("W"))
def dynamic_slice_at_a_known_place(p, x):
    return jnp.sum(jnp.tanh(lax.dynamic_slice(p["W"], (2, 0), (10, 9)) @ x))


@entry({"W": w(15, 9)}, (x(4, 9), draws.ids(6, 4)))
def dynamic_slice_where_the_example_says(p, x, start):
    return jnp.sum(jnp.tanh(lax.dynamic_slice(p["W"], (start, 0), (10, 9)) @ x))


@entry({"W": w(15, 9)}, (x(4, 9), np.array([-40, -16, 2, 9])))
def dynamic_slice_far_out_of_range(p, x, start):
    return jnp.sum(jnp.tanh(lax.dynamic_slice_in_dim(p["W"], start, 10) @ x))


@entry({"W": w(5, 11, 11), "b": x(5, 11)}, (x(4, 11),), paths("W"))
def layers_of_a_stack_in_a_python_loop(p, x):
    for i in range(5):
        x = jnp.tanh(p["W"][i] @ x + p["b"][i])
    return x.sum()


@entry({"W": w(5, 11, 9), "b": x(5, 11)}, (x(4, 9), draws.ids(5, 4)), paths("W"))
def layer_that_the_example_chooses(p, x, i):
    return jnp.sum(jnp.tanh(p["W"][i] @ x + p["b"][i]))


@entry({"W": w(12, 3, 4), "V": w(60)}, (x(4, 12), x(4, 5)), paths("W"))
def reshaped(p, x, y):
    return jnp.sum(jnp.tanh(x @ p["W"].reshape(12, 12))) + jax.nn.logsumexp(p["V"].reshape(12, 5) @ y)


@entry({"W": w(11, 12)}, (x(4, 132), x(4, 8)))
def flattened(p, x, y):
    return jax.nn.softplus(p["W"].ravel() @ x) + jnp.sum(jnp.tanh(p["W"].reshape(-1, 12, 1)[..., 0][:8].T @ y))


@entry({"W": w(6, 4, 11)}, (x(4, 24),), paths("W"))
def axes_permuted_and_merged(p, x):
    return jnp.sum(jnp.tanh(x @ p["W"].transpose(1, 0, 2).reshape(24, 11)))


@entry({"W": w(11, 10), "V": w(11, 10)}, (x(4, 10),), paths("W", "V"))
def rolled_and_flipped(p, x):
    return jnp.sum(jnp.tanh(jnp.roll(p["W"], 3, axis=0) @ x)) + jax.nn.logsumexp(jnp.flip(p["V"], axis=1) @ x)


@entry({"W": w(15, 9), "V": w(15, 9)}, (x(4, 9),), paths("W", "V"))
def strided(p, x):
    return jnp.sum(jnp.tanh(p["W"][::2] @ x)) + jax.nn.logsumexp(p["V"][::-1, 1::2] @ x[:4])


@entry({"W": w(11, 9)}, (x(4, 9), x(4, 11)))
def permuted_by_a_constant(p, x, y):
    return jnp.sum(jnp.tanh(p["W"][PERMUTATION] @ x) * y)


@entry({"W": w(9, 10)}, (x(4, 11), x(4, 9)), paths("W"))
def padded(p, x, y):
    return jax.nn.softplus(y @ jnp.pad(p["W"], ((0, 0), (1, 0))) @ x)


@entry({"W": w(7, 9)}, (x(4, 3, 7), x(4, 9)), paths("W"))
def broadcast_along_positions(p, x, y):
    tiled = jnp.broadcast_to(p["W"], (3, 7, 9))
    return jnp.sum(jnp.tanh(jnp.einsum("tk,tkf->tf", x, tiled)) * y)


@entry({"A": w(3, 4), "B": w(5, 2)}, (x(4, 8),))
def kronecker(p, x):
    return jnp.sum(jnp.tanh(jnp.kron(p["A"], p["B"]) @ x))


@entry({"W": w(9, 11), "V": w(9, 9), "d": x(9)}, (x(4, 9),), paths("W"))
def diagonal_matrix(p, x):
    return jnp.sum(jnp.tanh(x @ jnp.diag(p["d"]) @ p["W"])) + jnp.sum(jnp.diag(p["V"]) * x)


@entry({"W": w(9, 11)}, (x(4, 3, 9),), paths("W"))
def only_some_positions(p, x):
    h = x @ p["W"]
    return jnp.sum(jnp.tanh(h[0] * h[2])) + jax.nn.logsumexp(h[1:, ::2])


@entry({"up": w(9, 12), "down": w(6, 10)}, (x(4, 9),), paths("up", "down"))
def gated(p, x):
    gate, value = jnp.split(x @ p["up"], 2, axis=-1)
    return jnp.sum(jnp.tanh((jax.nn.silu(gate) * value) @ p["down"]))


@entry({"W": w(6, 7)}, (x(4, 6), x(4, 7)))
def single_entries(p, x, y):
    return jnp.tanh(p["W"][1, 2] * x[0] + p["W"][-1, 0] * y[1]) + jnp.sum(p["W"][3] * y) * p["W"][0, 0]
