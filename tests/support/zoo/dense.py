"""Matrices in products: every way to write one."""

from itertools import pairwise

import jax
import jax.numpy as jnp
from jax import lax

from support.zoo.base import Draws, collection, paths

ENTRIES, entry = collection()
draws = Draws(1)
w, x, positive = draws.weight, draws.normal, draws.positive


@entry({"W": w(11, 9), "b": x(11), "w": x(11)}, (x(4, 9), draws.signs(4)), paths("W"))
def exercise(p, x, y):
    return jnp.log(1 + jnp.exp(-y * p["w"] @ jax.nn.sigmoid(p["W"] @ x + p["b"])))


@entry(
    [{"W": w(12, 9), "b": x(12)}, {"W": w(10, 12), "b": x(10)}, {"W": w(7, 10), "b": x(7)}],
    (x(5, 9), draws.ids(7, 5)),
    ("[0]['W']", "[1]['W']", "[2]['W']"),
)
def mlp(layers, x, label):
    *hidden, last = layers
    for layer in hidden:
        x = jnp.tanh(layer["W"] @ x + layer["b"])
    logits = last["W"] @ x + last["b"]
    return jax.nn.logsumexp(logits) - logits[label]


def layer_norm(scale, shift, h):
    h = h - h.mean(-1, keepdims=True)
    return scale * h / jnp.sqrt((h**2).mean(-1, keepdims=True) + 1e-5) + shift


def rms_norm(scale, h):
    return scale * h * lax.rsqrt((h**2).mean(-1, keepdims=True) + 1e-6)


def stack_of_layers(*widths):
    return [{"W": w(k, f), "b": x(f), "scale": positive(k), "shift": x(k)} for k, f in pairwise(widths)]


@entry(stack_of_layers(9, 12, 10, 13, 8), (x(4, 9), x(4, 8)), tuple(f"[{i}]['W']" for i in range(4)))
def deep_layer_norm(layers, x, target):
    for layer in layers:
        x = jnp.tanh(layer_norm(layer["scale"], layer["shift"], x) @ layer["W"] + layer["b"])
    return jnp.mean((x - target) ** 2)


@entry(
    {"W": w(9, 14), "V": w(14, 9), "scale": positive(9), "last": positive(9)}, (x(3, 2, 9), x(3, 9)), paths("W", "V")
)
def residual_rms_norm(p, x, target):
    x = x + jax.nn.silu(rms_norm(p["scale"], x) @ p["W"]) @ p["V"]
    return jnp.sum((rms_norm(p["last"], x).mean(0) - target) ** 2)


@entry({"W": w(11, 12), "V": w(12, 9), "scale": positive(12), "shift": x(12)}, (x(4, 5, 11), x(4, 9)), paths("W", "V"))
def group_norm(p, x, target):
    h = x @ p["W"]
    groups = h.reshape(5, 3, 4)
    groups = groups - groups.mean((0, 2), keepdims=True)
    groups = groups * lax.rsqrt(groups.var((0, 2), keepdims=True) + 1e-5)
    h = jax.nn.gelu(p["scale"] * groups.reshape(5, 12) + p["shift"])
    return jnp.sum((jax.nn.softplus(h @ p["V"]).mean(0) - target) ** 2)


@entry({"W": w(15, 14), "b": x(14)}, (x(4, 2, 3, 15), x(4, 3, 14)), paths("W"))
def rank_3_input(p, x, y):
    return jnp.sum(jnp.tanh(x @ p["W"] + p["b"]) * y)


@entry({"W": w(15, 14), "b": x(14)}, (x(3, 2, 1, 3, 15),), paths("W"))
def rank_4_input(p, x):
    return jax.nn.logsumexp(x @ p["W"] + p["b"])


@entry({"W": w(9, 11), "V": w(10, 9)}, (x(4, 9), x(4, 10)), paths("W", "V"))
def transposed(p, x, y):
    return jnp.sum(jnp.tanh(p["W"].T @ x)) + jnp.sum(jnp.tanh(y @ p["V"]) * jax.nn.softplus(p["V"].T @ y))


@entry({"A": w(12, 11), "B": w(11, 12), "C": w(11, 12)}, (x(4, 11),), paths("A", "B", "C"))
def einsum_matrix_vector(p, x):
    h = jnp.tanh(jnp.einsum("fk,k->f", p["A"], x))
    h = jnp.tanh(jnp.einsum("f,kf->k", h, p["B"]))
    return jnp.einsum("k,kf->", jnp.tanh(h), p["C"]) + jax.nn.logsumexp(jnp.einsum("kf,k->f", p["C"], h))


@entry({n: w(12, 12) for n in "ABCDEF"}, (x(3, 4, 12),), paths(*"ABCDEF"))
def einsum_matrix_matrix(p, x):
    h = jnp.tanh(jnp.einsum("tk,fk->tf", x, p["A"]))
    h = jnp.tanh(jnp.einsum("kf,tk->ft", p["B"], h))
    h = jnp.tanh(jnp.einsum("kt,kf->ft", h, p["C"]))
    h = jnp.tanh(jnp.einsum("fk,kt->tf", p["D"], h))
    h = jnp.tanh(jnp.einsum("tk,kf->ft", h, p["E"]))
    return jnp.sum(jnp.einsum("kt,fk->tf", h, p["F"]) ** 2)


@entry({"W": w(5, 9, 8), "V": w(8, 5, 10)}, (x(4, 5, 3, 9),), paths("W", "V"))
def batch_of_matrix_products(p, x):
    h = jnp.tanh(x @ p["W"])
    return jax.nn.logsumexp(jnp.einsum("htk,khf->fth", h, p["V"]))


@entry({"W": w(3, 4, 11), "V": w(10, 4, 3)}, (x(4, 2, 3, 4),), paths("W", "V"))
def contraction_over_several_axes(p, x):
    return jnp.sum(jnp.tanh(jnp.einsum("tij,ijf->tf", x, p["W"]))) + jax.nn.logsumexp(
        jnp.tensordot(x, p["V"], axes=((1, 2), (2, 1)))
    )


@entry({"W": w(4, 5), "v": x(3)}, (x(4, 3), x(4, 5)))
def no_contraction(p, x, y):
    return jnp.sum(jnp.tanh(jnp.einsum("t,fk->tfk", x, p["W"]))) + jnp.sum(jnp.outer(p["v"], y) ** 2 * y)


@entry({"W": w(3, 9, 8), "V": w(3, 8, 10)}, (x(4, 2, 3, 9),), paths("W", "V"))
def weight_of_every_head(p, x):
    h = jax.nn.gelu(jnp.einsum("thd,hde->the", x, p["W"]))
    return jnp.sum(jnp.einsum("the,hef->tf", h, p["V"]) ** 2)


@entry({"W": w(3, 4, 5, 2), "V": w(5, 3, 2, 4)}, (x(4, 2, 3, 4),), paths("W", "V"))
def weights_of_rank_4(p, x):
    h = jnp.tanh(jnp.einsum("tab,abcd->tcd", x, p["W"]))
    return jax.nn.softplus(jnp.einsum("tcd,cadb->tab", h, p["V"])).sum()


@entry({"W": w(4, 12, 5)}, (x(3, 2, 12, 3), x(3, 5)), paths("W"))
def free_axes_on_both_sides(p, x, y):
    return jnp.sum(jnp.tanh(jnp.einsum("tab,cad->tcbd", x, p["W"])) @ y)


@entry({"W": w(8, 3, 9), "V": w(4, 10, 9)}, (x(4, 9, 2, 3), x(4, 10, 4, 2)), paths("W", "V"))
def dot_general_batch_dimensions(p, x, y):
    h = lax.dot_general(p["W"], x, (((2,), (0,)), ((1,), (2,))))
    k = lax.dot_general(y, p["V"], (((0,), (1,)), ((1,), (0,))))
    return jnp.sum(jnp.tanh(h)) + jax.nn.logsumexp(k)


@entry({"W": w(12, 9)}, (x(4, 2, 9),), paths("W"))
def preferred_element_type(p, x):
    return jnp.sum(jnp.tanh(lax.dot_general(x, p["W"], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float64)))


@entry({"W": w(9, 12), "V": w(12, 8)}, (x(4, 2, 9),), paths("W", "V"), rtol=1e-5)
def accumulated_wider_than_multiplied(p, x):
    h = jnp.tanh(jnp.matmul(x.astype(jnp.float32), p["W"].astype(jnp.float32), preferred_element_type=jnp.float64))
    return jnp.sum(jnp.einsum("tk,kf->tf", h, p["V"], preferred_element_type=jnp.float64) ** 2)


@entry({"W": w(9, 11), "T": w(8, 5, 7), "b": x(5)}, (x(4, 9), x(4, 11), x(4, 8), x(4, 7)), paths("W", "T"))
def bilinear(p, x, y, u, v):
    return jax.nn.softplus(x @ p["W"] @ y) + jnp.sum(jnp.tanh(jnp.einsum("i,ijk,k->j", u, p["T"], v) + p["b"]) ** 2)


@entry({"W": w(9, 11), "V": w(10, 9)}, (x(4, 11),), paths("W", "V"))
def elementwise_product_and_sum(p, x):
    h = jnp.tanh((p["W"] * x[None, :]).sum(1))
    return jax.nn.logsumexp((h * p["V"]).sum(-1))


@entry({"W": w(9, 11)}, (x(4, 9), x(4, 11)), paths("W"))
def elementwise_column_and_row(p, col, row):
    return jax.nn.softplus((p["W"] * col[:, None] * row).sum()) * row[0]


@entry({"W": w(12, 11), "b": x(12)}, (x(4, 11),), paths("W"))
def sums_along_one_axis_of_a_weight(p, x):
    return jnp.sum(p["W"].sum(1) * x[0] + p["b"] * (p["W"] @ x)) + jnp.sum(p["W"].mean(0) * x) ** 2


@entry({"W": w(9, 1), "V": w(1, 7), "U": w(1, 1), "b": x(1, 5)}, (x(4, 2, 9),))
def matrices_with_an_axis_of_one(p, x):
    return jnp.sum(jnp.tanh(x @ p["W"] @ p["U"] @ p["V"])) + jnp.sum((x[:, :5] * p["b"]) ** 2 * p["U"])
