"""Flax's linen modules, and brax's networks, which are made of them."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from benchmarks.models import Draw, cross_entropy
from benchmarks.third_party.built import Built, cast

KEY = jax.random.key(0)


def one_device() -> jax.sharding.Mesh:
    """A mesh on which every kernel with metadata goes through a sharding constraint."""
    return jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])


class Block(nn.Module):
    width: int
    heads: int = 4
    partitioned: bool = False

    @nn.compact
    def __call__(self, h: Any, mask: Any) -> Any:
        init = nn.initializers.lecun_normal()
        kernel = nn.with_partitioning(init, (None, "model"), one_device()) if self.partitioned else init
        h = h + nn.MultiHeadDotProductAttention(self.heads, kernel_init=init)(nn.LayerNorm()(h), mask=mask)
        up = nn.gelu(nn.Dense(4 * self.width, kernel_init=kernel)(nn.LayerNorm()(h)))
        return h + nn.Dense(self.width, kernel_init=kernel)(up)


class GPT(nn.Module):
    """A decoder with learned positions and an embedding that is tied to the output layer."""

    vocabulary: int
    width: int
    depth: int
    partitioned: bool = False

    @nn.compact
    def __call__(self, ids: Any) -> Any:
        embed = nn.Embed(self.vocabulary, self.width)
        positions = self.param("positions", nn.initializers.normal(0.02), (64, self.width))
        h = embed(ids) + positions[: ids.shape[-1]]
        mask = nn.make_causal_mask(ids)
        for _ in range(self.depth):
            h = Block(self.width, partitioned=self.partitioned)(h, mask)
        return embed.attend(nn.LayerNorm()(h))


def language_model(module: nn.Module, B: int = 8, T: int = 16, V: int = 512) -> Built:
    draw = Draw()
    ids = draw.ids(V, B, T + 1)
    params = module.init(KEY, ids[:1, :-1])["params"]

    def loss(params: Any, ids: Any) -> jax.Array:
        return cross_entropy(module.apply({"params": params}, ids[None, :-1])[0], ids[1:]).mean()

    return Built(loss, params, (ids,))


def gpt(dtype: Any) -> Built:
    return language_model(GPT(512, 128, 2))


def partitioned_gpt(dtype: Any) -> Built:
    return language_model(GPT(512, 128, 2, partitioned=True))


class ScannedGPT(nn.Module):
    """Layers that are stacked by nn.scan and rematerialized."""

    @nn.compact
    def __call__(self, ids: Any) -> Any:
        mask = nn.make_causal_mask(ids)
        h = nn.Embed(512, 128)(ids)
        body = nn.remat(Block, prevent_cse=False)
        layers = nn.scan(
            lambda block, h, mask: (block(h, mask), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=3,
        )
        h, _ = layers(body(128), h, mask)
        return nn.Dense(512)(nn.RMSNorm()(h))


def scanned_gpt(dtype: Any) -> Built:
    return language_model(ScannedGPT())


def classifier(module: nn.Module, *shape: int, B: int = 8, **kwargs: Any) -> Built:
    """A classifier from a module with state, which the loss does not update."""
    draw = Draw()
    batch = (draw.data(B, *shape), draw.ids(10, B))
    variables = dict(module.init(KEY, batch[0][:1], **kwargs))
    params = variables.pop("params")

    def loss(params: Any, x: Any, label: Any) -> jax.Array:
        state = cast(variables, x.dtype)
        return cross_entropy(module.apply({"params": params, **state}, x[None], **kwargs)[0], label)

    return Built(loss, params, batch)


class WeightNormed(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        for _ in range(3):
            x = nn.gelu(nn.WeightNorm(nn.Dense(256))(x))
        return nn.Dense(10)(x)


def weight_norm(dtype: Any) -> Built:
    return classifier(WeightNormed(), 256)


class SpectralNormed(nn.Module):
    @nn.compact
    def __call__(self, x: Any, update_stats: bool) -> Any:
        for width in (32, 64, 128):
            x = nn.leaky_relu(nn.SpectralNorm(nn.Conv(width, (3, 3), (2, 2)))(x, update_stats=update_stats), 0.2)
        x = nn.SpectralNorm(nn.Dense(256))(x.reshape(len(x), -1), update_stats=update_stats)
        return nn.Dense(10)(nn.leaky_relu(x, 0.2))


def spectral_norm(dtype: Any) -> Built:
    return classifier(SpectralNormed(), 16, 16, 3, update_stats=False)


class ResNet(nn.Module):
    """Residual blocks with group norm."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Conv(32, (3, 3))(x)
        for width, stride in ((32, 1), (64, 2), (128, 2)):
            y = nn.Conv(width, (3, 3), (stride, stride), use_bias=False)(nn.relu(nn.GroupNorm(8)(x)))
            y = nn.Conv(width, (3, 3), use_bias=False)(nn.relu(nn.GroupNorm(8)(y)))
            x = nn.Conv(width, (1, 1), (stride, stride), use_bias=False)(x) + y
        return nn.Dense(10)(nn.relu(nn.GroupNorm(8)(x)).mean((1, 2)))


def resnet(dtype: Any) -> Built:
    return classifier(ResNet(), 16, 16, 3)


class BidirectionalLSTM(nn.Module):
    dtype: Any

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Bidirectional(
            nn.RNN(nn.OptimizedLSTMCell(128, param_dtype=self.dtype)),
            nn.RNN(nn.OptimizedLSTMCell(128, param_dtype=self.dtype)),
        )(x)
        return nn.Dense(10)(nn.RNN(nn.GRUCell(128, param_dtype=self.dtype))(x)[:, -1])


def lstm(dtype: Any) -> Built:
    return classifier(BidirectionalLSTM(dtype), 24, 64)


def brax_ppo(dtype: Any, B: int = 16) -> Built:
    """PPO's loss for one step of experience: its policy, value and entropy terms."""
    from brax.training.agents.ppo import networks as ppo

    networks = ppo.make_ppo_networks(
        64, 8, policy_hidden_layer_sizes=(128,) * 4, value_hidden_layer_sizes=(256,) * 5, activation=nn.swish
    )
    params = {"policy": networks.policy_network.init(KEY), "value": networks.value_network.init(KEY)}
    actions = networks.parametric_action_distribution

    def loss(params: Any, observed: Any, action: Any, advantage: Any, target: Any, log_prob: Any) -> jax.Array:
        logits = networks.policy_network.apply(None, params["policy"], observed)
        rho = jnp.exp(actions.log_prob(logits, action) - log_prob)
        surrogate = jnp.minimum(rho * advantage, jnp.clip(rho, 0.7, 1.3) * advantage)
        value = networks.value_network.apply(None, params["value"], observed)
        entropy = actions.entropy(logits, jax.random.key(1))
        return 0.25 * (target - value) ** 2 - surrogate - 1e-2 * entropy

    draw = Draw()
    batch = (draw.data(B, 64), draw.data(B, 8), draw.data(B), draw.data(B), draw.data(B) - 8)
    return Built(loss, params, batch)


def brax_sac(dtype: Any, B: int = 16) -> Built:
    """The loss of SAC's two critics, with layer norm."""
    from brax.training.agents.sac import networks as sac

    networks = sac.make_sac_networks(64, 8, hidden_layer_sizes=(256, 256), q_network_layer_norm=True)
    params = networks.q_network.init(KEY)

    def loss(params: Any, observed: Any, action: Any, target: Any) -> jax.Array:
        q = networks.q_network.apply(None, params, observed, action)
        return 0.5 * jnp.mean((q - target) ** 2)

    draw = Draw()
    return Built(loss, params, (draw.data(B, 64), draw.data(B, 8), draw.data(B)))
