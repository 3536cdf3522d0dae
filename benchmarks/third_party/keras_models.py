"""Keras on JAX: functional models, one of keras.applications, regularizers and spectral normalization."""

import os

os.environ["KERAS_BACKEND"] = "jax"

from typing import Any

import jax
import jax.numpy as jnp
import keras
from keras import layers

from benchmarks.models import Draw, cross_entropy
from benchmarks.third_party.built import Built


def classified(make: Any, dtype: Any, batch: tuple[Any, ...], regularized: bool = False) -> Built:
    """The loss of a Keras model, computed with `stateless_call`."""
    keras.config.set_floatx(jnp.dtype(dtype).name)
    keras.utils.set_random_seed(0)
    model = make()
    state = [v.value for v in model.non_trainable_variables]

    def loss(params: Any, x: Any, label: Any) -> jax.Array:
        logits, _, losses = model.stateless_call(params, state, x[None], training=False, return_losses=True)
        penalty = sum(losses) if regularized else 0.0
        return cross_entropy(logits[0], label) + penalty

    return Built(loss, [v.value for v in model.trainable_variables], batch)


def transformer(dtype: Any, B: int = 8, T: int = 16) -> Built:
    """Keras's own example of a text classifier."""

    def make() -> Any:
        ids = keras.Input((T,), dtype="int32")
        h = layers.Embedding(512, 128)(ids)
        for _ in range(2):
            h = layers.LayerNormalization()(h + layers.MultiHeadAttention(4, 32)(h, h))
            up = layers.Dense(512, activation="gelu")(h)
            h = layers.LayerNormalization()(h + layers.Dense(128)(layers.Dropout(0.1)(up)))
        return keras.Model(ids, layers.Dense(10)(layers.GlobalAveragePooling1D()(h)))

    draw = Draw()
    return classified(make, dtype, (draw.ids(512, B, T), draw.ids(10, B)))


def recurrent(dtype: Any, B: int = 8) -> Built:
    def make() -> Any:
        x = keras.Input((24, 64))
        h = layers.Bidirectional(layers.LSTM(128, return_sequences=True))(x)
        return keras.Model(x, layers.Dense(10)(layers.GRU(128)(h)))

    draw = Draw()
    return classified(make, dtype, (draw.data(B, 24, 64), draw.ids(10, B)))


def mobile_net(dtype: Any, B: int = 8) -> Built:
    """keras.applications.MobileNetV3Small at 0.35 of its width."""

    def make() -> Any:
        return keras.applications.MobileNetV3Small(
            input_shape=(32, 32, 3),
            alpha=0.35,
            minimalistic=False,
            weights=None,
            classes=10,
            classifier_activation=None,
        )

    draw = Draw()
    return classified(make, dtype, (draw.data(B, 32, 32, 3), draw.ids(10, B)))


def penalized(dtype: Any, B: int = 8) -> Built:
    """A conv net whose loss has a kernel_regularizer for every layer."""

    def make() -> Any:
        x = keras.Input((16, 16, 3))
        l2 = keras.regularizers.L2(1e-3)
        h = x
        for width in (32, 64, 128):
            h = layers.Conv2D(width, 3, 2, "same", activation="relu", kernel_regularizer=l2)(h)
        h = layers.Dense(256, activation="relu", kernel_regularizer=keras.regularizers.L1L2(1e-4, 1e-3))(
            layers.Flatten()(h)
        )
        return keras.Model(x, layers.Dense(10, kernel_regularizer=l2)(h))

    draw = Draw()
    return classified(make, dtype, (draw.data(B, 16, 16, 3), draw.ids(10, B)), regularized=True)


def spectral_norm(dtype: Any, B: int = 8) -> Built:
    """layers.SpectralNormalization around every layer, in inference mode."""

    def make() -> Any:
        x = keras.Input((16, 16, 3))
        h = x
        for width in (32, 64, 128):
            h = layers.SpectralNormalization(layers.Conv2D(width, 3, 2, "same", activation="leaky_relu"))(h)
        return keras.Model(x, layers.SpectralNormalization(layers.Dense(10))(layers.Flatten()(h)))

    draw = Draw()
    return classified(make, dtype, (draw.data(B, 16, 16, 3), draw.ids(10, B)))
