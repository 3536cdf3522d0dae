"""Convolutions. A kernel's gradient is a product; it is materialized if the windows are larger than the kernel."""

import jax
import jax.numpy as jnp
from jax import lax

from support.zoo.base import Draws, collection, paths

ENTRIES, entry = collection()
draws = Draws(9)
w, x = draws.weight, draws.normal

NHWC = ("NHWC", "HWIO", "NHWC")


def conv(x, kernel, strides=(1, 1), padding="SAME", dimension_numbers=NHWC, **options):
    """One image, without the axis of images."""
    y = lax.conv_general_dilated(x[None], kernel, strides, padding, dimension_numbers=dimension_numbers, **options)
    return y[0]


@entry({"k": w(3, 7, 8), "b": x(8)}, (x(4, 6, 7),), products=paths("k"))
def conv_1d(p, x):
    y = lax.conv_general_dilated(x[None], p["k"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
    return jnp.sum(jnp.tanh(y + p["b"]))


@entry({"k": w(3, 2, 8, 9), "b": x(9)}, (x(3, 5, 4, 8),), products=paths("k"))
def conv_2d(p, x):
    return jnp.sum(jnp.tanh(conv(x, p["k"]) + p["b"]))


@entry({"k": w(2, 3, 2, 5, 6)}, (x(3, 3, 4, 2, 5),), products=paths("k"))
def conv_3d(p, x):
    y = lax.conv_general_dilated(x[None], p["k"], (1, 1, 1), "SAME", dimension_numbers=("NDHWC", "DHWIO", "NDHWC"))
    return jax.nn.logsumexp(y)


@entry({"k": w(3, 2, 8, 9)}, (x(4, 6, 5, 8),), products=paths("k"))
def conv_without_padding(p, x):
    return jnp.sum(jnp.tanh(conv(x, p["k"], padding="VALID")))


@entry({"k": w(3, 4, 8, 9), "m": w(3, 4, 9, 7)}, (x(4, 7, 5, 8),), products=paths("k", "m"))
def conv_strided(p, x):
    h = jnp.tanh(conv(x, p["k"], strides=(2, 1)))
    return jnp.sum(jnp.tanh(conv(h, p["m"], strides=(3, 2), padding="VALID")))


@entry({"k": w(3, 2, 8, 9)}, (x(4, 5, 4, 8),), products=paths("k"))
def conv_padded_differently_on_every_side(p, x):
    return jnp.sum(jnp.tanh(conv(x, p["k"], padding=((2, 0), (1, 3)), strides=(2, 2))))


@entry({"k": w(3, 2, 8, 9)}, (x(4, 6, 5, 8),), products=paths("k"))
def conv_cropped(p, x):
    return jnp.sum(jnp.tanh(conv(x, p["k"], padding=((-1, 1), (0, -1)))))


@entry({"k": w(3, 2, 8, 9)}, (x(3, 6, 4, 8),), products=paths("k"))
def conv_dilated_kernel(p, x):
    return jnp.sum(jnp.tanh(conv(x, p["k"], rhs_dilation=(2, 3), padding=((1, 1), (2, 1)))))


@entry({"k": w(3, 4, 8, 9)}, (x(3, 3, 2, 8),), products=paths("k"))
def conv_dilated_image(p, x):
    return jnp.sum(jnp.tanh(conv(x, p["k"], lhs_dilation=(2, 3), padding=((1, 2), (3, 1)), strides=(1, 2))))


@entry({"k": w(3, 2, 4, 10), "b": x(10)}, (x(4, 3, 4, 8),), products=paths("k"))
def conv_in_groups(p, x):
    return jnp.sum(jnp.tanh(conv(x, p["k"], feature_group_count=2, padding="VALID") + p["b"]))


@entry({"image": w(26, 6)}, (x(3, 6, 13),), paths("image"))
def image_of_a_conv_in_batch_groups(p, x):
    return jnp.sum(
        jnp.sin(
            lax.conv_general_dilated(
                p["image"][..., None],
                x[..., None],
                (1,),
                ((0, 1),),
                (1,),
                (1,),
                ("NCW", "IOW", "NWC"),
                batch_group_count=13,
            )
        )
    )


@entry({"k": w(3, 2, 1, 10)}, (x(4, 4, 3, 5),))
def conv_depthwise(p, x):
    return jnp.sum(jnp.tanh(conv(x, p["k"], feature_group_count=5)))


@entry({"depth": w(3, 3, 1, 12), "point": w(1, 1, 12, 13)}, (x(4, 3, 2, 12),))
def conv_depthwise_separable(p, x):
    h = jnp.tanh(conv(x, p["depth"], feature_group_count=12))
    return jnp.sum(jnp.tanh(conv(h, p["point"])))


@entry({"k": w(9, 8, 3, 2), "m": w(10, 9, 2, 3)}, (x(3, 8, 4, 5),), products=paths("k", "m"))
def conv_channels_first(p, x):
    h = jnp.tanh(lax.conv(x[None], p["k"], (1, 1), "SAME"))
    return jax.nn.logsumexp(lax.conv_with_general_padding(h, p["m"], (2, 2), "VALID", None, None))


@entry({"k": w(9, 3, 8, 2), "m": w(2, 9, 3, 7)}, (x(3, 5, 8, 1, 4),), products=paths("k", "m"))
def conv_unusual_layouts(p, x):
    h = lax.conv_general_dilated(x, p["k"], (1, 1), "SAME", dimension_numbers=("HCNW", "OHIW", "WNCH"))
    h = jnp.tanh(h[..., :3])
    y = lax.conv_general_dilated(h, p["m"], (1, 1), "VALID", dimension_numbers=("WNCH", "HIWO", "CWHN"))
    return jnp.sum(jnp.tanh(y))


@entry({"k": w(14, 4, 3, 2)}, (x(3, 8, 4, 3),), products=paths("k"))
def conv_channels_first_in_groups_and_dilated(p, x):
    y = conv(
        x,
        p["k"],
        padding=((2, 1), (1, 1)),
        rhs_dilation=(2, 1),
        feature_group_count=2,
        dimension_numbers=("NCHW", "OIHW", "NCHW"),
    )
    return jnp.sum(jnp.tanh(y))


@entry({"k": w(3, 2, 8, 9), "m": w(2, 3, 9, 7)}, (x(3, 2, 3, 8),), products=paths("k", "m"))
def conv_transposed(p, x):
    h = lax.conv_transpose(x[None], p["k"], (2, 1), "SAME", dimension_numbers=NHWC)
    h = lax.conv_transpose(jnp.tanh(h)[:, :2, :2], p["m"], (1, 1), "VALID", dimension_numbers=NHWC)
    return jnp.sum(jnp.tanh(h))


@entry({"k": w(3, 2, 9, 8)}, (x(3, 2, 3, 8),))
def conv_transposed_with_its_kernel_turned(p, x):
    y = lax.conv_transpose(x[None], p["k"], (2, 1), "SAME", dimension_numbers=NHWC, transpose_kernel=True)
    return jnp.sum(jnp.tanh(y))


@entry(
    {"down": w(3, 3, 5, 12), "middle": w(3, 3, 12, 13), "up": w(2, 2, 13, 11), "last": w(3, 3, 16, 14)},
    (x(3, 4, 2, 5), x(3, 4, 2, 14)),
    products=paths("down", "middle", "up", "last"),
)
def u_net(p, x, target):
    h = jnp.tanh(conv(x, p["down"], strides=(2, 2)))
    h = jnp.tanh(conv(h, p["middle"]))
    h = lax.conv_transpose(h[None], p["up"], (2, 2), "SAME", dimension_numbers=NHWC)[0]
    h = conv(jnp.concatenate([x, jnp.tanh(h)], axis=-1), p["last"])
    return jnp.mean((h - target) ** 2)


def pool(x, start, operation):
    return lax.reduce_window(x, start, operation, (2, 2, 1), (2, 2, 1), "VALID")


@entry(
    {"k": w(3, 3, 7, 8), "m": w(3, 2, 8, 9), "W": w(9, 10)},
    (x(3, 4, 5, 7), draws.ids(10, 3)),
    products=paths("k", "m", "W"),
)
def convnet_with_pooling(p, x, label):
    h = pool(jnp.tanh(conv(x, p["k"])), -jnp.inf, lax.max)
    h = pool(jnp.tanh(conv(h, p["m"])), 0.0, lax.add) / 4
    logits = h.reshape(9) @ p["W"]
    return jax.nn.logsumexp(logits) - logits[label]


@entry({"k": w(1, 1, 14, 13), "b": x(13)}, (x(4, 2, 3, 14),), products=paths("k"))
def conv_one_by_one(p, x):
    return jnp.sum(jnp.tanh(conv(x, p["k"]) + p["b"]))


@entry({"k": w(3, 4, 8, 9)}, (x(4, 2, 4, 3, 8),), products=paths("k"))
def conv_of_several_images(p, x):
    y = lax.conv_general_dilated(x, p["k"], (1, 1), "SAME", dimension_numbers=NHWC)
    return jnp.sum((jnp.tanh(y[0]) - jnp.tanh(y[1])) ** 2)


@entry({"k": w(3, 4, 8, 9)}, (x(4, 2, 4, 3, 8),), products=paths("k"))
def conv_mapped_over_images(p, x):
    return jax.nn.logsumexp(jax.vmap(lambda x: jnp.tanh(conv(x, p["k"])))(x).prod(0))


@entry({"k": w(3, 2, 10, 10)}, (x(3, 4, 3, 10),), products=paths("k"))
def conv_kernel_used_twice(p, x):
    return jnp.sum(jnp.tanh(conv(jnp.tanh(conv(x, p["k"])), p["k"])))


@entry({"k": w(3, 10, 10)}, (x(3, 2, 3, 10),), products=paths("k"))
def conv_inside_a_scan(p, xs):
    def step(h, x):
        h = lax.conv_general_dilated(h[None], p["k"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))[0]
        return jnp.tanh(h + x), None

    return lax.scan(step, jnp.ones((3, 10)), xs)[0].sum()


@entry({"k": w(3, 7, 8), "m": w(2, 8, 9)}, (x(4, 5, 7),), products=paths("k", "m"))
def conv_causal(p, x):
    numbers = ("NWC", "WIO", "NWC")
    h = jnp.tanh(lax.conv_general_dilated(x[None], p["k"], (1,), ((2, 0),), dimension_numbers=numbers))
    h = jnp.pad(h, ((0, 0), (2, 0), (0, 0)))
    h = lax.conv_general_dilated(h, p["m"], (1,), "VALID", rhs_dilation=(2,), dimension_numbers=numbers)
    return jax.nn.logsumexp(h)


@entry({"k": w(8, 3, 7), "g": draws.positive(8)}, (x(4, 6, 7),))
def conv_of_a_normalized_kernel(p, x):
    kernel = p["k"] / jnp.sqrt((p["k"] ** 2).sum((1, 2), keepdims=True)) * p["g"][:, None, None]
    y = lax.conv_general_dilated(x[None], kernel, (1,), "SAME", dimension_numbers=("NWC", "OWI", "NWC"))
    return jnp.sum(jnp.tanh(y))


@entry({"k": w(3), "W": w(11, 9)}, (x(4, 11),), paths("W"))
def conv_of_vectors(p, x):
    return jnp.sum(jnp.tanh(jnp.convolve(x @ p["W"], p["k"], mode="same")))


@entry({"W": w(11, 9)}, (x(4, 11), x(4, 3)), paths("W"))
def conv_with_a_kernel_of_the_example(p, x, kernel):
    return jnp.sum(jnp.tanh(jnp.convolve(x @ p["W"], kernel, mode="valid")))
