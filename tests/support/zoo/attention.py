"""Attention."""

import jax
import jax.numpy as jnp

from support.zoo.base import Draws, collection, paths
from support.zoo.dense import layer_norm

ENTRIES, entry = collection()
draws = Draws(2)
w, x, positive = draws.weight, draws.normal, draws.positive


def attend(q, k, v, mask=None):
    """q [T,H,D], k and v [S,H,D]."""
    scores = jnp.einsum("thd,shd->hts", q, k) / jnp.sqrt(q.shape[-1])
    if mask is not None:
        scores = jnp.where(mask, scores, -1e9)
    return jnp.einsum("hts,shd->thd", jax.nn.softmax(scores, axis=-1), v)


def qkvo(width, inner):
    return {"q": w(width, inner), "k": w(width, inner), "v": w(width, inner), "o": w(inner, width)}


@entry(qkvo(14, 15), (x(3, 4, 14),), paths(*"qkvo"))
def heads_by_reshape(p, x):
    q, k, v = ((x @ p[name]).reshape(4, 3, 5) for name in "qkv")
    return jnp.sum(jnp.tanh(attend(q, k, v).reshape(4, 15) @ p["o"]))


@entry({"qkv": w(14, 45), "b": x(45), "o": w(15, 14)}, (x(4, 5, 14), x(4, 14)), paths("qkv", "o"))
def heads_sliced_from_one_product(p, x, target):
    qkv = x @ p["qkv"] + p["b"]
    out = [
        attend(*(qkv[:, None, 15 * i + 5 * head : 15 * i + 5 * (head + 1)] for i in range(3)))[:, 0]
        for head in range(3)
    ]
    return jnp.sum((jnp.concatenate(out, -1) @ p["o"] - target) ** 2)


@entry({"qkv": w(14, 45), "o": w(15, 14)}, (x(4, 3, 14),), paths("qkv", "o"))
def heads_sliced_from_one_weight(p, x):
    q, k, v = (x @ p["qkv"][:, 15 * i : 15 * (i + 1)] for i in range(3))
    heads = attend(*(jnp.stack(jnp.split(h, 3, axis=1), axis=1) for h in (q, k, v)))
    return jax.nn.logsumexp(heads.reshape(3, 15) @ p["o"])


@entry({"qkv": w(3, 12, 2, 9), "o": w(2, 9, 12)}, (x(3, 4, 12),), paths("qkv", "o"))
def heads_as_axes_of_the_weights(p, x):
    q, k, v = jnp.einsum("tm,imhd->ithd", x, p["qkv"])
    return jnp.sum(jnp.tanh(jnp.einsum("thd,hdm->tm", attend(q, k, v), p["o"])))


BLOCK = {
    "attention": qkvo(14, 15),
    "mlp": {"up": w(14, 24), "bias": x(24), "down": w(24, 14)},
    "norms": [(positive(14), x(14)), (positive(14), x(14))],
}
MATRICES = (*(f"['attention']['{n}']" for n in "qkvo"), "['mlp']['up']", "['mlp']['down']")


def block(p, x, mask):
    T = len(x)
    h = layer_norm(*p["norms"][0], x)
    q, k, v = ((h @ p["attention"][n]).reshape(T, 3, 5) for n in "qkv")
    x = x + attend(q, k, v, mask).reshape(T, 15) @ p["attention"]["o"]
    h = layer_norm(*p["norms"][1], x)
    return x + jax.nn.gelu(h @ p["mlp"]["up"] + p["mlp"]["bias"]) @ p["mlp"]["down"]


@entry(BLOCK, (x(3, 4, 14), x(3, 14)), MATRICES)
def transformer_block(p, x, target):
    return jnp.mean((block(p, x, jnp.tril(jnp.ones((4, 4), bool)))[-1] - target) ** 2)


@entry(qkvo(14, 15), (x(4, 4, 14), draws.ids(4, 4) + 1), paths(*"qkvo"))
def masked_beyond_the_length(p, x, length):
    q, k, v = ((x @ p[name]).reshape(4, 3, 5) for name in "qkv")
    valid = jnp.arange(4) < length
    out = attend(q, k, v, valid[None, None, :]).reshape(4, 15) @ p["o"]
    return jnp.sum(jnp.where(valid[:, None], jnp.tanh(out), 0))


@entry(qkvo(14, 15), (x(4, 2, 14), x(4, 4, 14), draws.booleans(4, 2, 4)), paths(*"qkvo"))
def cross_attention_with_a_boolean_mask(p, x, y, mask):
    q = (x @ p["q"]).reshape(2, 3, 5)
    k, v = ((y @ p[name]).reshape(4, 3, 5) for name in "kv")
    return jnp.sum(jax.nn.softplus(attend(q, k, v, mask[None]).reshape(2, 15) @ p["o"]))


@entry({"q": w(3, 12, 9), "k": w(12, 9), "v": w(12, 9), "o": w(3, 9, 12)}, (x(3, 3, 12),), paths(*"qkvo"))
def one_key_for_all_heads(p, x):
    q = jnp.einsum("tm,hmd->htd", x, p["q"])
    k, v = x @ p["k"], x @ p["v"]
    out = jax.nn.softmax(q @ k.T / 3, axis=-1) @ v
    return jnp.sum(jnp.tanh(jnp.einsum("htd,hdm->tm", out, p["o"])))


@entry({"r": w(9, 4, 4), "W": w(9, 12), "V": w(12, 9)}, (x(3, 4, 9),), paths("W", "V"))
def bias_of_every_pair_of_positions(p, x):
    h = jnp.tanh(x @ p["W"])
    scores = jnp.tanh(jnp.einsum("tk,sk->ts", h, h)) + p["r"].sum(0)
    return jnp.sum(jnp.tanh(jax.nn.softmax(scores) @ h @ p["V"]))
