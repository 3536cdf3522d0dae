"""Flax's nnx modules, and Mamba 2 of mamba2-jax, which is made of them."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.models import Draw, cross_entropy
from benchmarks.third_party.built import Built, cast, squared_error


def classifier(module: nnx.Module, *shape: int, B: int = 8) -> Built:
    draw = Draw()
    graph, params, rest = nnx.split(module, nnx.Param, ...)

    def loss(params: Any, x: Any, label: Any) -> jax.Array:
        model = nnx.merge(graph, params, cast(rest, x.dtype))
        return cross_entropy(model(x[None])[0], label)

    return Built(loss, params, (draw.data(B, *shape), draw.ids(10, B)))


class Encoder(nnx.Module):
    """A block of a vision transformer; `sharded` gives every kernel the metadata of a mesh."""

    def __init__(self, width: int, rngs: nnx.Rngs, sharded: bool) -> None:
        init = nnx.initializers.xavier_uniform()
        kernel = nnx.with_partitioning(init, (None, "model")) if sharded else init
        self.norm_1, self.norm_2 = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, kernel_init=kernel, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, kernel_init=kernel, rngs=rngs)

    def __call__(self, h: Any) -> Any:
        h = h + self.attention(self.norm_1(h))
        return h + self.down(nnx.gelu(self.up(self.norm_2(h))))


class VisionTransformer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, width: int = 128, sharded: bool = False) -> None:
        self.patches = nnx.Conv(3, width, (4, 4), (4, 4), padding="VALID", rngs=rngs)
        self.token = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (1, 1, width)))
        self.positions = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (1, 17, width)))
        self.blocks = nnx.List([Encoder(width, rngs, sharded) for _ in range(3)])
        self.head = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        h = self.patches(x).reshape(len(x), 16, -1)
        h = jnp.concatenate([jnp.broadcast_to(self.token[...], (len(x), 1, h.shape[-1])), h], 1) + self.positions[...]
        for block in self.blocks:
            h = block(h)
        return self.head(h[:, 0])


def vision_transformer(dtype: Any) -> Built:
    return classifier(VisionTransformer(nnx.Rngs(0)), 16, 16, 3)


def sharded_vision_transformer(dtype: Any) -> Built:
    """The vision transformer on a mesh of one device: every kernel goes through a sharding constraint."""
    jax.set_mesh(jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,)))
    return classifier(VisionTransformer(nnx.Rngs(0), sharded=True), 16, 16, 3)


class ConvNet(nnx.Module):
    """Batch norm with fixed statistics, depthwise convolutions, and LoRA on the head."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.stem = nnx.Conv(3, 64, (3, 3), rngs=rngs)
        self.depthwise = nnx.List([nnx.Conv(64, 64, (3, 3), feature_group_count=64, rngs=rngs) for _ in range(3)])
        self.pointwise = nnx.List([nnx.Conv(64, 64, (1, 1), use_bias=False, rngs=rngs) for _ in range(3)])
        self.norms = nnx.List([nnx.BatchNorm(64, use_running_average=True, rngs=rngs) for _ in range(3)])
        self.hidden = nnx.LoRALinear(1024, 256, lora_rank=8, rngs=rngs)
        self.head = nnx.Linear(256, 10, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        h = nnx.max_pool(self.stem(x), (2, 2), (2, 2))
        for depthwise, pointwise, norm in zip(self.depthwise, self.pointwise, self.norms, strict=True):
            h = h + nnx.relu(norm(pointwise(depthwise(h))))
        h = nnx.avg_pool(h, (2, 2), (2, 2)).reshape(len(x), -1)
        return self.head(nnx.relu(self.hidden(h)))


def conv_net(dtype: Any) -> Built:
    return classifier(ConvNet(nnx.Rngs(0)), 16, 16, 3)


class Recurrent(nnx.Module):
    def __init__(self, dtype: Any, rngs: nnx.Rngs) -> None:
        self.rnn = nnx.RNN(nnx.GRUCell(64, 128, dtype=dtype, param_dtype=dtype, rngs=rngs))
        self.head = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.head(self.rnn(x)[:, -1])


def gru(dtype: Any) -> Built:
    return classifier(Recurrent(dtype, nnx.Rngs(0)), 24, 64)


def mamba(dtype: Any, B: int = 8, T: int = 32) -> Built:
    """A language model of two blocks of Mamba 2."""
    import mamba2_jax

    config = mamba2_jax.Mamba2Config(
        vocab_size=512, hidden_size=128, state_size=32, head_dim=32, chunk_size=16, num_hidden_layers=2
    )
    graph, params, rest = nnx.split(mamba2_jax.create_random_model(config), nnx.Param, ...)

    def loss(params: Any, ids: Any) -> jax.Array:
        logits = nnx.merge(graph, params, rest)(ids[None, :-1])["logits"]
        return cross_entropy(logits[0], ids[1:]).mean()

    return Built(loss, params, (Draw().ids(512, B, T + 1),))


def mamba_forecaster(dtype: Any, B: int = 8) -> Built:
    """A Mamba 2 model that forecasts a series."""
    import mamba2_jax

    module = mamba2_jax.create_random_forecaster(
        8, d_model=128, n_layers=2, output_dim=1, forecast_horizon=8, d_state=32, headdim=32, chunk_size=16
    )
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    draw = Draw()

    def loss(params: Any, x: Any, y: Any) -> jax.Array:
        return squared_error(nnx.merge(graph, params, rest)(x[None])[0, :, 0], y)

    return Built(loss, params, (draw.data(B, 32, 8), draw.data(B, 8)))
