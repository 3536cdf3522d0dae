"""The models of the tables in plain JAX, in float32: the loss(params, *example) of one example, params and a batch."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec


class Model(NamedTuple):
    name: str
    loss: Callable[..., jax.Array]
    params: Any
    batch: tuple[Any, ...]
    goal: float

    @property
    def batch_size(self) -> int:
        """The number of examples, B."""
        return len(jax.tree.leaves(self.batch)[0])

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the batch's materialized gradients."""
        return self.batch_size * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.params))

    def first(self, B: int) -> tuple[Any, ...]:
        """The arguments of the loss, with only the first B examples of the batch."""
        return (self.params, *jax.tree.map(lambda a: a[:B], self.batch))

    def astype(self, dtype: Any) -> "Model":
        """The same model with every floating-point array cast to a dtype."""

        def cast(a: jax.Array) -> jax.Array:
            return a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a

        return self._replace(params=jax.tree.map(cast, self.params), batch=jax.tree.map(cast, self.batch))


def models() -> Iterator[Model]:
    """The models. The goal of each is for norms + clipped sum, as a multiple of a plain gradient's time."""
    yield mlp()
    for D, T, B in ((512, 16, 64), (512, 128, 8), (256, 64, 32)):
        yield transformer(D, T, B)
    yield conv_net()
    yield gru()
    yield embedding()
    yield language_model()


class Draw:
    """Random weights, data and ids, the same in every run."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)

    def weight(self, *shape: int) -> jax.Array:
        return jnp.asarray(self.rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1])), jnp.float32)

    def data(self, *shape: int) -> jax.Array:
        return jnp.asarray(self.rng.normal(size=shape), jnp.float32)

    def ids(self, high: int, *shape: int) -> jax.Array:
        return jnp.asarray(self.rng.integers(0, high, shape), jnp.int32)


def cross_entropy(logits: jax.Array, label: jax.Array) -> jax.Array:
    return jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, label[..., None], -1)[..., 0]


def mlp_outputs(params: Any, x: jax.Array) -> jax.Array:
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["W"] + layer["b"])
    return x @ params[-1]["W"] + params[-1]["b"]


def mlp(sizes: tuple[int, ...] = (256, 512, 512, 512, 10), B: int = 256) -> Model:
    draw = Draw()
    params = [{"W": draw.weight(m, n), "b": jnp.zeros(n)} for m, n in itertools.pairwise(sizes)]

    def loss(params: Any, x: jax.Array, label: jax.Array) -> jax.Array:
        return cross_entropy(mlp_outputs(params, x), label)

    name = f"MLP {'-'.join(map(str, sizes))}, B={B}"
    return Model(name, loss, params, (draw.data(B, sizes[0]), draw.ids(sizes[-1], B)), 1.0)


def block_params(draw: Draw, D: int) -> dict[str, jax.Array]:
    return {
        "qkv": draw.weight(D, 3 * D),
        "out": draw.weight(D, D),
        "up": draw.weight(D, 4 * D),
        "down": draw.weight(4 * D, D),
        "scale_1": jnp.ones(D),
        "scale_2": jnp.ones(D),
        "b_up": jnp.zeros(4 * D),
        "b_down": jnp.zeros(D),
    }


def normalized(h: jax.Array, scale: jax.Array) -> jax.Array:
    h = h - h.mean(-1, keepdims=True)
    return h * lax.rsqrt((h * h).mean(-1, keepdims=True) + 1e-5) * scale


def block(p: dict[str, jax.Array], h: jax.Array, heads: int = 8) -> jax.Array:
    T, D = h.shape
    q, k, v = jnp.split(normalized(h, p["scale_1"]) @ p["qkv"], 3, axis=-1)
    q, k, v = (a.reshape(T, heads, D // heads) for a in (q, k, v))
    scores = jnp.einsum("thd,shd->hts", q, k) / math.sqrt(D // heads)
    scores = jnp.where(np.tril(np.ones((T, T), bool)), scores, -1e9)
    h = h + jnp.einsum("hts,shd->thd", jax.nn.softmax(scores), v).reshape(T, D) @ p["out"]
    up = jax.nn.gelu(normalized(h, p["scale_2"]) @ p["up"] + p["b_up"])
    return h + up @ p["down"] + p["b_down"]


def transformer(D: int, T: int, B: int) -> Model:
    draw = Draw()

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.mean(block(params, x) ** 2)

    return Model(f"transformer block D={D} T={T}, B={B}", loss, block_params(draw, D), (draw.data(B, T, D),), 1.0)


def conv_net_outputs(p: Any, h: jax.Array) -> jax.Array:
    for k, stride in ((1, 1), (2, 2), (3, 2)):
        y = lax.conv_general_dilated(
            h[None], p[f"k{k}"], (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        h = jax.nn.relu(y[0] + p[f"b{k}"])
    return h.mean((0, 1)) @ p["W"] + p["b"]


def conv_net(B: int = 128) -> Model:
    draw = Draw()
    params = {
        "k1": draw.weight(3, 3, 1, 16),
        "k2": draw.weight(3, 3, 16, 32),
        "k3": draw.weight(3, 3, 32, 64),
        "b1": jnp.zeros(16),
        "b2": jnp.zeros(32),
        "b3": jnp.zeros(64),
        "W": draw.weight(64, 10),
        "b": jnp.zeros(10),
    }

    def loss(p: Any, image: jax.Array, label: jax.Array) -> jax.Array:
        return cross_entropy(conv_net_outputs(p, image), label)

    return Model(f"conv net 28×28 to 64 channels, B={B}", loss, params, (draw.data(B, 28, 28, 1), draw.ids(10, B)), 1.5)


def gru(H: int = 256, T: int = 64, B: int = 32) -> Model:
    draw = Draw()
    params = {"x": draw.weight(H, 3 * H), "h": draw.weight(H, 3 * H), "b": jnp.zeros(3 * H), "out": draw.weight(H, 10)}

    def loss(p: Any, xs: jax.Array, label: jax.Array) -> jax.Array:
        def step(h: jax.Array, x: jax.Array) -> tuple[jax.Array, None]:
            xr, xz, xn = jnp.split(x @ p["x"] + p["b"], 3)
            hr, hz, hn = jnp.split(h @ p["h"], 3)
            z = jax.nn.sigmoid(xz + hz)
            n = jnp.tanh(xn + jax.nn.sigmoid(xr + hr) * hn)
            return (1 - z) * n + z * h, None

        h, _ = lax.scan(step, jnp.zeros(H, xs.dtype), xs)
        return cross_entropy(h @ p["out"], label)

    return Model(f"GRU H={H} T={T}, B={B}", loss, params, (draw.data(B, T, H), draw.ids(10, B)), 1.1)


def embedding(V: int = 50_000, E: int = 256, T: int = 32, B: int = 64) -> Model:
    draw = Draw()
    params = {"E": draw.data(V, E), "W": draw.weight(E, 10)}

    def loss(p: Any, ids: jax.Array, label: jax.Array) -> jax.Array:
        return cross_entropy(jnp.tanh(p["E"][ids].mean(0)) @ p["W"], label)

    return Model(f"embedding {V} × {E} T={T}, B={B}", loss, params, (draw.ids(V, B, T), draw.ids(10, B)), 1.1)


def language_model(V: int = 4096, D: int = 256, T: int = 64, B: int = 16) -> Model:
    draw = Draw()
    params = {"E": draw.weight(V, D), "blocks": [block_params(draw, D) for _ in range(2)], "scale": jnp.ones(D)}

    def loss(p: Any, ids: jax.Array) -> jax.Array:
        h = p["E"][ids[:-1]] * math.sqrt(D)
        for layer in p["blocks"]:
            h = block(layer, h)
        return cross_entropy(normalized(h, p["scale"]) @ p["E"].T, ids[1:]).mean()

    return Model(f"tied language model V={V} D={D} T={T}, B={B}", loss, params, (draw.ids(V, B, T + 1),), 1.1)


def deep_language_model(L: int = 6, V: int = 4096, D: int = 256, T: int = 512, B: int = 4) -> Model:
    """A language model whose layers are stacked along an axis, scanned over, and recomputed in the backward pass."""
    draw = Draw()
    blocks = [block_params(draw, D) for _ in range(L)]
    layers = jax.tree.map(lambda *a: jnp.stack(a), *blocks)
    params = {"E": draw.weight(V, D), "out": draw.weight(D, V), "layers": layers, "scale": jnp.ones(D)}

    def loss(p: Any, ids: jax.Array) -> jax.Array:
        step = jax.checkpoint(lambda h, layer: (block(layer, h), None))
        h, _ = lax.scan(step, p["E"][ids[:-1]] * math.sqrt(D), p["layers"])
        return cross_entropy(normalized(h, p["scale"]) @ p["out"], ids[1:]).mean()

    name = f"language model, scan over {L} layers with checkpoint, D={D} T={T}, B={B}"
    return Model(name, loss, params, (draw.ids(V, B, T + 1),), 1.9)


def deep_transformer(L: int, D: int, T: int, B: int) -> Model:
    """The layers of `deep_language_model` alone. Its arrays are only shapes."""

    def loss(layers: Any, x: jax.Array) -> jax.Array:
        step = jax.checkpoint(lambda h, layer: (block(layer, h), None))
        return jnp.mean(lax.scan(step, x, layers)[0] ** 2)

    one = jax.eval_shape(lambda: {name: jnp.zeros(a.shape) for name, a in block_params(Draw(), D).items()})
    layers = jax.tree.map(lambda a: jax.ShapeDtypeStruct((L, *a.shape), a.dtype), one)
    name = f"transformer, scan over {L} layers with checkpoint, D={D} T={T}, B={B}"
    return Model(name, loss, layers, (jax.ShapeDtypeStruct((B, T, D), jnp.float32),), 2.0)


def gpt_2_small(T: int, B: int, L: int = 12, V: int = 50304, D: int = 768, heads: int = 12) -> Model:
    """A language model of the sizes of GPT-2 small, for many chips. Its arrays are only shapes.

    The parameters are in float32, and it computes in bfloat16. Sharding constraints keep the activations of an example
    on one chip; they need a mesh (`jax.set_mesh`) and the name of its axis of examples.
    """

    def on_one_chip(a: jax.Array) -> jax.Array:
        return lax.with_sharding_constraint(a, PartitionSpec())

    def loss(p: Any, ids: jax.Array) -> jax.Array:
        p = jax.tree.map(lambda a: a.astype(jnp.bfloat16), p)
        step = jax.checkpoint(lambda h, layer: (on_one_chip(block(layer, h, heads)), None))
        h, _ = lax.scan(step, on_one_chip(p["E"][ids[:-1]] + p["positions"]), p["layers"])
        logits = on_one_chip(normalized(h, p["scale"]) @ p["E"].T)
        return cross_entropy(logits.astype(jnp.float32), ids[1:]).mean()

    def shape(*dims: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, jnp.float32)

    one = jax.eval_shape(lambda: {name: jnp.zeros(a.shape) for name, a in block_params(Draw(), D).items()})
    layers = jax.tree.map(lambda a: shape(L, *a.shape), one)
    params = {"E": shape(V, D), "positions": shape(T, D), "layers": layers, "scale": shape(D)}
    name = f"language model, scan over {L} layers with checkpoint, D={D} V={V} T={T}, B={B}, computes in bfloat16"
    return Model(name, loss, params, (jax.ShapeDtypeStruct((B, T + 1), jnp.int32),), 2.0)
