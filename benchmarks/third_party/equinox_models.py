"""Equinox's modules, and the networks of pdequinox, which are made of them."""

import itertools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from benchmarks.models import Draw, cross_entropy
from benchmarks.third_party.built import Built, cast, squared_error

KEY = jax.random.key(0)


def trained(module: Any, loss: Callable[..., Any], *batch: Any) -> Built:
    """A loss of (module, *example) whose params are the module's floating-point arrays."""
    params, static = eqx.partition(module, eqx.is_inexact_array)
    return Built(lambda params, *example: loss(eqx.combine(params, static), *example), params, batch)


class Encoder(eqx.Module):
    """A transformer with eqx.nn's attention and rotary positions."""

    embedding: Any
    attention: list[Any]
    norms: list[Any]
    mlps: list[Any]
    head: Any

    def __init__(self, V: int, D: int, depth: int, key: Any) -> None:
        keys = iter(jax.random.split(key, 2 * depth + 2))
        self.embedding = eqx.nn.Embedding(V, D, key=next(keys))
        self.attention = [eqx.nn.MultiheadAttention(4, D, key=next(keys)) for _ in range(depth)]
        self.norms = [eqx.nn.LayerNorm(D) for _ in range(2 * depth)]
        self.mlps = [eqx.nn.MLP(D, D, 4 * D, 1, jax.nn.gelu, key=next(keys)) for _ in range(depth)]
        self.head = eqx.nn.Linear(D, V, key=next(keys))

    def __call__(self, ids: Any) -> Any:
        h = jax.vmap(self.embedding)(ids)
        rope = eqx.nn.RotaryPositionalEmbedding(h.shape[-1] // 4)
        mask = jnp.tril(jnp.ones((len(ids), len(ids)), bool))
        for k, attention in enumerate(self.attention):
            rotate = lambda q, k, v: (*(jax.vmap(rope, 1, 1)(a).astype(a.dtype) for a in (q, k)), v)  # noqa: E731
            normed = jax.vmap(self.norms[2 * k])(h)
            h = h + attention(normed, normed, normed, mask=mask, process_heads=rotate)
            h = h + jax.vmap(self.mlps[k])(jax.vmap(self.norms[2 * k + 1])(h))
        return jax.vmap(self.head)(h)


def transformer(dtype: Any, B: int = 8, T: int = 16, V: int = 512) -> Built:
    return trained(
        Encoder(V, 128, 2, KEY), lambda m, ids: cross_entropy(m(ids[:-1]), ids[1:]).mean(), Draw().ids(V, B, T + 1)
    )


class Recurrent(eqx.Module):
    cell: Any
    head: Any

    def __call__(self, xs: Any) -> Any:
        h, _ = jax.lax.scan(lambda h, x: (self.cell(x, h), None), jnp.zeros(self.cell.hidden_size, xs.dtype), xs)
        return self.head(h)


def gru(dtype: Any, B: int = 8) -> Built:
    draw = Draw()
    module = Recurrent(eqx.nn.GRUCell(64, 128, key=KEY), eqx.nn.Linear(128, 10, key=KEY))
    return trained(module, lambda m, xs, y: cross_entropy(m(xs), y), draw.data(B, 24, 64), draw.ids(10, B))


def weight_norm(dtype: Any, B: int = 8) -> Built:
    """A conv net with eqx.nn.WeightNorm around its layers."""
    keys = jax.random.split(KEY, 4)
    module = eqx.nn.Sequential(
        [
            eqx.nn.WeightNorm(eqx.nn.Conv1d(8, 64, 5, padding=2, key=keys[0])),
            eqx.nn.Lambda(jax.nn.silu),
            eqx.nn.WeightNorm(eqx.nn.Conv1d(64, 128, 5, stride=2, padding=2, key=keys[1])),
            eqx.nn.Lambda(jax.nn.silu),
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.WeightNorm(eqx.nn.Linear(16 * 128, 64, key=keys[2])),
            eqx.nn.Lambda(jax.nn.silu),
            eqx.nn.Linear(64, 10, key=keys[3]),
        ]
    )
    draw = Draw()
    return trained(module, lambda m, x, y: cross_entropy(m(x), y), draw.data(B, 8, 32), draw.ids(10, B))


def spectral_norm(dtype: Any, B: int = 8) -> Built:
    """eqx.nn.SpectralNorm with its inference-time state."""

    class Discriminator(eqx.Module):
        layers: list[Any]
        head: Any

        def __call__(self, x: Any, state: Any) -> Any:
            for layer in self.layers:
                x, state = layer(x, state)
                x = jax.nn.leaky_relu(x)
            return self.head(x)[0]

    def make(key: Any) -> Any:
        keys = jax.random.split(key, 7)
        widths = (256, 256, 256, 256)
        layers = [
            eqx.nn.SpectralNorm(eqx.nn.Linear(m, n, key=keys[k]), "weight", inference=True, key=keys[k + 3])
            for k, (m, n) in enumerate(itertools.pairwise(widths))
        ]
        return Discriminator(layers, eqx.nn.Linear(256, 1, key=keys[6]))

    module, state = eqx.nn.make_with_state(make)(KEY)
    draw = Draw()

    def loss(m: Any, x: Any, sign: Any) -> jax.Array:
        return jax.nn.softplus(-sign * m(x, cast(state, x.dtype)))

    return trained(module, loss, draw.data(B, 256), jnp.sign(draw.data(B)))


def unet(dtype: Any, B: int = 8) -> Built:
    """pdequinox.ClassicUNet, which predicts the next state of a field in two dimensions."""
    import pdequinox

    module = pdequinox.arch.ClassicUNet(2, 2, 2, hidden_channels=32, num_levels=2, key=KEY)
    draw = Draw()
    return trained(module, lambda m, x, y: squared_error(m(x), y), draw.data(B, 2, 16, 16), draw.data(B, 2, 16, 16))


def fourier_operator(dtype: Any, B: int = 8) -> Built:
    """pdequinox.ClassicFNO in one dimension, which has complex spectral weights."""
    import pdequinox

    module = pdequinox.arch.ClassicFNO(1, 3, 1, hidden_channels=64, num_modes=12, num_blocks=4, key=KEY)
    draw = Draw()
    return trained(module, lambda m, x, y: squared_error(m(x), y), draw.data(B, 3, 64), draw.data(B, 1, 64))


def dilated_resnet(dtype: Any, B: int = 8) -> Built:
    import pdequinox

    module = pdequinox.arch.DilatedResNet(2, 2, 2, hidden_channels=64, num_blocks=1, key=KEY)
    draw = Draw()
    return trained(module, lambda m, x, y: squared_error(m(x), y), draw.data(B, 2, 16, 16), draw.data(B, 2, 16, 16))
