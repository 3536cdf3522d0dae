"""Haiku's modules, and a flow of distrax, whose networks are made of them."""

from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.models import Draw, cross_entropy
from benchmarks.third_party.built import Built, cast

KEY = jax.random.key(0)


def classifier(forward: Any, *shape: int, B: int = 8) -> Built:
    """A classifier from forward(x, is_training). The loss does not update its state."""
    draw = Draw()
    batch = (draw.data(B, *shape), draw.ids(10, B))
    model = hk.transform_with_state(forward)
    params, state = model.init(KEY, batch[0][:1], True)

    def loss(params: Any, x: Any, label: Any) -> jax.Array:
        logits, _ = model.apply(params, cast(state, x.dtype), KEY, x[None], False)
        return cross_entropy(logits[0], label)

    return Built(loss, params, batch)


def resnet(dtype: Any) -> Built:
    """hk.nets.ResNet with bottlenecks. Its batch norm uses the running averages."""

    def forward(x: Any, is_training: bool) -> Any:
        return hk.nets.ResNet((1, 1, 1, 1), 10, channels_per_group=(64, 128, 256, 256))(x, is_training)

    return classifier(forward, 32, 32, 3)


def gru(dtype: Any) -> Built:
    def forward(x: Any, is_training: bool) -> Any:
        core = hk.DeepRNN([hk.Linear(128), jnp.tanh, hk.GRU(128), hk.LSTM(128)])
        out, _ = hk.dynamic_unroll(core, x, core.initial_state(len(x)), time_major=False)
        return hk.Linear(10)(out[:, -1])

    return classifier(forward, 24, 64)


def conv_lstm(dtype: Any) -> Built:
    def forward(x: Any, is_training: bool) -> Any:
        core = hk.Conv2DLSTM((8, 8), 32, 3)
        out, _ = hk.dynamic_unroll(core, x, core.initial_state(len(x)), time_major=False)
        return hk.Linear(10)(out[:, -1].mean((1, 2)))

    return classifier(forward, 6, 8, 8, 4)


def spectral_norm(dtype: Any) -> Built:
    """A discriminator whose convolutions and matrices hk.SpectralNorm divides by their largest singular value."""

    def forward(x: Any, is_training: bool) -> Any:
        for width in (32, 64, 128):
            shape = (3, 3, x.shape[-1], width)
            w = hk.get_parameter(f"w_{width}", shape, x.dtype, hk.initializers.VarianceScaling())
            w = hk.SpectralNorm(name=f"norm_{width}")(w, update_stats=is_training)
            x = jax.lax.conv_general_dilated(x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
            x = jax.nn.leaky_relu(x)
        return hk.Linear(10)(x.reshape(len(x), -1))

    return classifier(forward, 16, 16, 3)


def transformer(dtype: Any, B: int = 8, T: int = 16, V: int = 512) -> Built:
    """A language model with hk.MultiHeadAttention and a causal mask, as in Haiku's own example."""

    def forward(ids: Any) -> Any:
        h = hk.Embed(V, 128)(ids) + hk.get_parameter("positions", [T, 128], init=hk.initializers.TruncatedNormal(0.02))
        mask = np.tril(np.ones((1, 1, T, T)))
        for _ in range(2):
            normed = hk.LayerNorm(-1, True, True)(h)
            init = hk.initializers.VarianceScaling(1.0)
            h = h + hk.MultiHeadAttention(4, 32, w_init=init)(normed, normed, normed, mask=mask)
            h = h + hk.nets.MLP([512, 128], activation=jax.nn.gelu)(hk.LayerNorm(-1, True, True)(h))
        return hk.Linear(V)(hk.LayerNorm(-1, True, True)(h))

    ids = Draw().ids(V, B, T + 1)
    model = hk.without_apply_rng(hk.transform(forward))
    params = model.init(KEY, ids[:1, :-1])

    def loss(params: Any, ids: Any) -> jax.Array:
        return cross_entropy(model.apply(params, ids[None, :-1])[0], ids[1:]).mean()

    return Built(loss, params, (ids,))


def vq_vae(dtype: Any, B: int = 8) -> Built:
    """An autoencoder with hk.nets.VectorQuantizer and transposed convolutions."""

    def forward(x: Any) -> Any:
        z = jax.nn.relu(hk.Conv2D(64, 4, 2)(x))
        z = hk.Conv2D(32, 4, 2)(z)
        quantized = hk.nets.VectorQuantizer(32, 128, 0.25)(z, is_training=True)
        y = jax.nn.relu(hk.Conv2DTranspose(64, 4, 2)(quantized["quantize"]))
        y = hk.Conv2DTranspose(3, 4, 2)(y)
        return jnp.mean((x - y) ** 2) + quantized["loss"]

    x = Draw().data(B, 16, 16, 3)
    model = hk.without_apply_rng(hk.transform(forward))
    return Built(lambda params, x: model.apply(params, x[None]), model.init(KEY, x[:1]), (x,))


def coupling_flow(dtype: Any, B: int = 16, D: int = 32) -> Built:
    """distrax.MaskedCoupling with rational-quadratic splines, as in distrax's own example."""
    import distrax

    def density() -> Any:
        layers, mask = [], np.arange(D) % 2 == 0
        for _ in range(3):
            conditioner = hk.Sequential(
                [hk.nets.MLP([128, 128], activate_final=True), hk.Linear(D * 25), hk.Reshape((D, 25), preserve_dims=-1)]
            )
            spline = lambda params: distrax.RationalQuadraticSpline(params, range_min=-4.0, range_max=4.0)  # noqa: E731
            layers.append(distrax.MaskedCoupling(mask, conditioner, spline))
            mask = ~mask
        base = distrax.Independent(distrax.Normal(jnp.zeros(D), jnp.ones(D)), 1)
        return distrax.Transformed(base, distrax.Inverse(distrax.Chain(layers)))

    model = hk.without_apply_rng(hk.transform(lambda x: density().log_prob(x)))
    x = Draw().data(B, D)
    return Built(lambda params, x: -model.apply(params, x[None])[0], model.init(KEY, x[:1]), (x,))
