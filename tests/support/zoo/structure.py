"""Trees of parameters, transformed and custom functions, and arguments of every kind."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from support.zoo.base import Draws, collection, paths

ENTRIES, entry = collection()
draws = Draws(10)
w, x, positive = draws.weight, draws.normal, draws.positive


# --- trees


class Layer(NamedTuple):
    W: Any
    b: Any = None


@entry(
    {"body": [(Layer(w(11, 9), x(11)), {}), (Layer(w(10, 11)), {"scale": x()})], "head": (w(10, 8), None, [])},
    (x(4, 9),),
    ("['body'][0][0].W", "['body'][1][0].W", "['head'][0]"),
)
def nested_tree(p, x):
    (first, _), (second, extra) = p["body"]
    h = jnp.tanh(first.W @ x + first.b)
    return jnp.sum(jnp.tanh(extra["scale"] * second.W @ h @ p["head"][0]))


@entry(w(11, 9), (x(4, 9),), ("",))
def parameter_that_is_an_array(W, x):
    return jnp.sum(jnp.tanh(W @ x))


@entry({"W": w(9, 11), "empty": np.zeros((9, 0)), "none": np.zeros((0,))}, (x(4, 9),), paths("W"))
def parameters_of_size_zero(p, x):
    W = jnp.concatenate([p["W"], p["empty"]], axis=1)
    return jnp.sum(jnp.tanh(x @ W)) + p["none"].sum()


@entry({"W": w(9, 11), "unused": w(6, 5), "flat": x()}, (x(4, 9),), paths("W"))
def unused_parameters(p, x):
    return jnp.sum(jnp.tanh(x @ p["W"])) + 0 * p["flat"]


@entry({"W": w(9, 11), "V": w(11, 8)}, (x(4, 9), x(4, 8)), paths("W", "V"))
def some_examples_without_gradient(p, x, y):
    return jnp.where(y[0] > 0, jnp.sum(jnp.tanh(jnp.tanh(x @ p["W"]) @ p["V"] - y)), y[1])


# --- transformed functions


@entry({"W": w(11, 9), "V": w(11, 11), "b": x(11)}, (x(4, 9),), paths("W", "V"))
def jit_three_deep(p, x):
    @jax.jit
    def outer(p, x):
        @jax.jit
        def middle(p, h):
            return jax.jit(lambda V, h: jnp.tanh(V @ h))(p["V"], h) + p["b"]

        return middle(p, jnp.tanh(p["W"] @ x))

    return jax.nn.logsumexp(outer(p, x))


@jax.jit
def dense_block(W, b, x):
    return jnp.tanh(W @ x + b)


@entry({"W": w(12, 12), "V": w(12, 12), "b": x(12)}, (x(4, 12),), paths("W", "V"))
def one_jitted_block_called_thrice(p, x):
    h = dense_block(p["W"], p["b"], x)
    return dense_block(p["V"], h, dense_block(p["W"], p["b"], h)).sum()


@functools.partial(jax.jit, static_argnums=2)
def power(W, x, times):
    for _ in range(times):
        x = jnp.sin(W @ x)
    return x


@entry({"W": w(12, 12)}, (x(4, 12),), paths("W"))
def static_argument(p, x):
    return power(p["W"], x, 2) @ power(p["W"], x, 1)


@entry({"W": w(12, 9), "V": w(10, 12)}, (x(4, 9),), paths("W", "V"))
def checkpointed(p, x):
    return jnp.sum(jax.checkpoint(lambda p, x: jnp.tanh(p["V"] @ jnp.tanh(p["W"] @ x)))(p, x))


@entry({"W": w(12, 9), "V": w(10, 12)}, (x(4, 9),), paths("W", "V"))
def checkpointed_with_a_policy(p, x):
    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable)
    def block(x):
        return jnp.tanh(p["V"] @ jnp.tanh(p["W"] @ x))

    return jax.nn.logsumexp(block(x))


@jax.custom_jvp
def clipped_log(x):
    return jnp.log(jnp.maximum(x, 0.1))


@clipped_log.defjvp
def _(primals, tangents):
    return clipped_log(*primals), tangents[0] / (0.2 + primals[0])


@entry({"W": w(11, 9)}, (x(4, 9),), paths("W"))
def custom_jvp_of_data(p, x):
    return jnp.sum(clipped_log(jax.nn.softplus(p["W"] @ x)))


@jax.custom_vjp
def linear(W, b, x):
    return W @ x + b


linear.defvjp(lambda W, b, x: (W @ x + b, (W, x)), lambda kept, d: (jnp.outer(d, kept[1]), d, kept[0].T @ d))


@entry({"W": w(11, 9), "b": x(11), "V": w(8, 11)}, (x(4, 9),), paths("V"))
def custom_vjp_of_a_layer(p, x):
    return jnp.sum(jnp.tanh(p["V"] @ jnp.tanh(linear(p["W"], p["b"], x))))


@jax.custom_vjp
def wrong_vjp(W, x):
    return W @ x


wrong_vjp.defvjp(
    lambda W, x: (W @ x, (W, x)),
    lambda kept, d: (jnp.sign(kept[0]) * d[:, None] + 0.1 * jnp.outer(d, kept[1]), 3 * kept[1]),
)


@entry({"W": w(11, 9), "V": w(9, 9)}, (x(4, 9),), paths("V"))
def custom_vjp_that_is_not_the_derivative(p, x):
    return jnp.sum(jnp.tanh(wrong_vjp(p["W"], jnp.tanh(p["V"] @ x))))


@jax.custom_vjp
def quantized(x):
    return jnp.round(4 * x) / 4


quantized.defvjp(lambda x: (quantized(x), None), lambda _, d: (d,))


@entry({"W": w(11, 9), "V": w(8, 11)}, (x(4, 9),), paths("V"))
def straight_through(p, x):
    h = jnp.tanh(quantized(p["W"]) @ x)
    return jnp.sum(jnp.tanh(p["V"] @ quantized(h)))


def root(W, h, x):
    return jnp.tanh(0.5 * W @ h + x)


@jax.custom_vjp
def fixed_point(W, x):
    def unfinished(state):
        return (state[1] < 60) & (jnp.abs(state[0] - root(W, state[0], x)).max() > 1e-14)

    return lax.while_loop(unfinished, lambda s: (root(W, s[0], x), s[1] + 1), (jnp.zeros_like(x), 0))[0]


def _fixed_point_backwards(kept, d):
    W, x, h = kept
    _, back = jax.vjp(root, W, h, x)
    _, u = lax.while_loop(lambda s: s[0] < 80, lambda s: (s[0] + 1, d + back(s[1])[1]), (0, d))
    return back(u)[::2]


fixed_point.defvjp(lambda W, x: ((h := fixed_point(W, x)), (W, x, h)), _fixed_point_backwards)


@entry({"W": w(9, 9) / 3, "U": w(9, 8)}, (x(3, 8),), paths("U"))
def equilibrium_by_while_loop(p, x):
    return jnp.sum(fixed_point(p["W"], p["U"] @ x) ** 2)


@entry({"W": w(11, 9), "V": w(10, 11)}, (x(4, 9),), paths("W", "V"))
def stopped_data(p, x):
    h = jnp.tanh(p["W"] @ x)
    return jnp.sum(jnp.tanh(p["V"] @ lax.stop_gradient(h)) * h[:10])


# --- arguments


@entry({"W": w(11, 9), "V": w(8, 11)}, (x(4, 9), jax.random.split(jax.random.key(0), 4)), paths("W", "V"))
def dropout_by_keys(p, x, key):
    first, second = jax.random.split(key)
    h = jnp.tanh(p["W"] @ x)
    h = jnp.where(jax.random.bernoulli(first, 0.7, h.shape), h / 0.7, 0)
    return jnp.sum(jnp.tanh(p["V"] @ h + 0.1 * jax.random.normal(second, (8,))))


@entry({"W": w(11, 9)}, (x(9, 4), x(11)), paths("W"), in_axes=(1, None))
def examples_on_the_second_axis_and_a_shared_array(p, x, scale):
    return jnp.sum(jnp.tanh(p["W"] @ x) * scale)


@entry(
    {"W": w(9, 11), "V": w(8, 11)},
    ({"a": x(4, 9), "b": [x(8, 4), x(11)]}, draws.booleans(4)),
    paths("W", "V"),
    in_axes=({"a": 0, "b": [1, None]}, 0),
)
def examples_as_trees(p, example, flag):
    u, v = example["b"]
    return jnp.sum(jnp.tanh(example["a"] @ p["W"]) * v) + jnp.where(flag, jnp.sum(jnp.tanh(u @ p["V"])), 0)


@entry({"W": w(9, 11), "V": w(6, 11)}, ((x(4, 9), x(6)), x(4)), paths("W", "V"), in_axes=((0, None), 0))
def one_batched_and_one_shared_in_a_tuple(p, pair, y):
    return jnp.sum(jnp.tanh(pair[0] @ p["W"] * y)) * jnp.sum(jnp.tanh(pair[1] @ p["V"]))


@entry(
    {"W": w(9, 11), "E": w(13, 7)},
    (x(4, 9), draws.ids(13, 4).astype(np.int32), draws.booleans(4, 11), 1 + draws.ids(3, 4).astype(np.uint8)),
    paths("W", "E"),
)
def integers_and_booleans(p, x, i, mask, count):
    h = jnp.where(mask, x @ p["W"], -1.0)
    return jax.nn.logsumexp(h) * count + jnp.sum(jnp.tanh(p["E"][i] * count + mask[:7]))


@entry({"W": w(9, 11).astype(np.float64)}, (x(4, 9).astype(np.float32),), paths("W"))
def examples_of_another_dtype(p, x):
    return jnp.sum(jnp.tanh(x @ p["W"]))


@entry({"W": w(9, 11), "b": x(11)}, (x(1, 9),), paths("W"))
def one_example(p, x):
    return jnp.sum(jnp.tanh(x @ p["W"] + p["b"]))


@entry({"W": w(7, 5), "b": x(5)}, (np.zeros((3, 7)), x(3, 5)))
def zero_examples_leave_only_the_bias(p, x, y):
    return jnp.sum(jnp.tanh(x @ p["W"] + p["b"]) * y)


@entry({"W": w(9, 11)}, (x(4, 9),), paths("W"))
def complex_numbers_on_the_way(p, x):
    h = jnp.fft.rfft(x @ p["W"])
    return jnp.sum(jnp.tanh(jnp.abs(h) ** 2))
