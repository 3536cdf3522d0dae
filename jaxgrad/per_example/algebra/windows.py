"""The windows of an image that a convolution's kernel sees: one at every position, with a place for each kernel entry.

Along one spatial axis, place p of the window at position t is entry p · stride + t · dilation of the padded image. The
gradient of the kernel at place p is the product, summed over all positions, of the cotangents with the entries at p.
The image is held as it is; unfolded, it would be larger by the number of places.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxgrad.per_example.algebra.chunks import Blocks
from jaxgrad.per_example.algebra.platforms import by_platform
from jaxgrad.precision import working_dtype

UNFOLDED_BYTES = 2 * 2**20
"""How many bytes are unfolded at once on a processor: about the size of its cache."""


class Window(NamedTuple):
    """The windows along one spatial axis.

    Attributes:
        places: number of places in the window.
        positions: number of positions of the window.
        stride: distance between places.
        dilation: distance between positions.
        padding: (before, after, between) the image's entries; negative edges crop.
    """

    places: int
    positions: int
    stride: int
    dilation: int
    padding: tuple[int, int, int]

    def entries(self, place: int) -> tuple[int, int]:
        """(first, end) of the padded entries that are at this place in some window."""
        return place * self.stride, place * self.stride + (self.positions - 1) * self.dilation + 1


PLACES = 64
"""Up to this many places in a window, an accelerator unfolds all axes at once: that takes one slice for each."""


def unfold(image: Array, windows: Sequence[Window]) -> Array:
    """[*others, *spatial, N] → [*others, *positions, places · N]; the places of the first axis come slowest.

    A processor unfolds one axis at a time, starting with the last; an accelerator all axes at once.
    """
    others = image.ndim - 1 - len(windows)
    edges = [(0, 0, 0)] * others + [w.padding for w in windows] + [(0, 0, 0)]
    image = lax.pad(image, jnp.zeros((), image.dtype), edges)
    if len(windows) < 2 or math.prod(w.places for w in windows) > PLACES:
        return _one_axis_at_a_time(image, tuple(windows))
    unfolded: Array = by_platform(_one_axis_at_a_time, _all_axes_at_once, tuple(windows))(image)
    return unfolded


def _one_axis_at_a_time(image: Array, windows: tuple[Window, ...]) -> Array:
    for axis, w in reversed(list(enumerate(windows, image.ndim - 1 - len(windows)))):
        parts = [lax.slice_in_dim(image, *w.entries(place), w.dilation, axis) for place in range(w.places)]
        image = jnp.concatenate(parts, -1)
    return image


def _all_axes_at_once(image: Array, windows: tuple[Window, ...]) -> Array:
    others = image.ndim - 1 - len(windows)
    whole = [slice(None)] * others
    places = itertools.product(*(range(w.places) for w in windows))
    parts = [
        image[(*whole, *(slice(*w.entries(k), w.dilation) for w, k in zip(windows, place, strict=True)))]
        for place in places
    ]
    return jnp.concatenate(parts, -1)


class Unfolding(NamedTuple):
    """How the two operands of a convolution become the sides of a product, for one example or a batch of them.

    Attributes:
        left: the cotangents' axes in the order (group, others, positions, fan-out), and the number of axes in each.
        image: the image's axes in the order (group, others, spatial, channels), and the number of axes in each.
        windows: one `Window` for each spatial axis.
    """

    left: tuple[tuple[int, ...], tuple[int, ...]]
    image: tuple[tuple[int, ...], tuple[int, ...]]
    windows: tuple[Window, ...]

    def sides(self, left: Array, image: Array) -> tuple[Array, Array]:
        """[B, …], [B, …] → left [B, G, T, F] and right [B, G, T, K]; K runs over (places, channels)."""
        left, image = self._ordered(left, image)
        B, G, *_, F = left.shape
        T = math.prod(left.shape[2:-1])
        right = unfold(image, self.windows)
        return left.reshape(B, G, T, F), right.reshape(B, G, T, right.shape[-1])

    def summed(self, left: Array, image: Array) -> Array:
        """Σ_b Σ_t left ⊗ right [G, F, K], by one convolution that sums over examples and positions."""
        left, image = self._ordered(left, image)
        B, G, C, F = *left.shape[:3], left.shape[-1]
        image = jnp.moveaxis(image, 1, 0).reshape(G * B * C, *image.shape[3:])
        left = jnp.moveaxis(left, 1, -2).reshape(B * C, *left.shape[3:-1], G * F)
        last = 1 + len(self.windows)
        total = lax.conv_general_dilated(
            image,
            left,
            window_strides=[w.stride for w in self.windows],
            padding=[w.padding[:2] for w in self.windows],
            lhs_dilation=[w.padding[2] + 1 for w in self.windows],
            rhs_dilation=[w.dilation for w in self.windows],
            dimension_numbers=lax.ConvDimensionNumbers(
                (last, 0, *range(1, last)), (last, 0, *range(1, last)), (last - 1, last, *range(last - 1))
            ),
            feature_group_count=G,
            preferred_element_type=working_dtype(image.dtype, left.dtype),
        )
        total = total.reshape(math.prod(total.shape[:-1]), G, F)
        return total.transpose(1, 2, 0)

    def at_once(self, count: int, left: Array, image: Array) -> Blocks:
        """How many of `count` examples to unfold at once."""
        shapes = jax.eval_shape(self.sides, *(jax.ShapeDtypeStruct((1, *a.shape[1:]), a.dtype) for a in (left, image)))
        return Blocks.of(shapes[1].size * shapes[1].dtype.itemsize, count, UNFOLDED_BYTES)

    def _ordered(self, left: Array, image: Array) -> tuple[Array, Array]:
        return _merged(left, *self.left), _merged(image, *self.image)


def _merged(a: Array, order: tuple[int, ...], counts: tuple[int, ...]) -> Array:
    """[B, …] with the other axes in this order; the first, second and last of the four runs become one axis each."""
    a = a.transpose(0, *(1 + k for k in order))
    first, second, spatial, _ = itertools.accumulate(counts)
    sizes = a.shape[1:]
    runs = (sizes[:first], sizes[first:second], sizes[spatial:])
    G, C, last = (functools.reduce(int.__mul__, run, 1) for run in runs)
    return a.reshape(a.shape[0], G, C, *sizes[second:spatial], last)
