"""The windows of an image that a convolution's kernel sees: one at every position, with a place for each kernel entry.

Along one spatial axis, place p of the window at position t is entry p · stride + t · dilation of the padded image. The
gradient of the kernel at place p is the product, summed over all positions, of the cotangents with the entries at p.
The image is held as it is; unfolded, it would be larger by the number of places.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxgrad.per_example.algebra.platforms import by_platform


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
