"""The gradient of a convolution's kernel."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxgrad import _jax
from jaxgrad.per_example.algebra.place import axis_of
from jaxgrad.per_example.algebra.product import Product, Unfolded, squeezed
from jaxgrad.per_example.algebra.windows import Window
from jaxgrad.per_example.interpreter.rules.record import Record
from jaxgrad.per_example.interpreter.values import Value, array_of
from jaxgrad.per_example.interpreter.views import note_squeezed


def _convolution(eqn: _jax.Equation, values: Sequence[Value]) -> Product | None:
    """The gradient of a kernel: the cotangents slide over the image, and each entry of the kernel is a product.

    Under vmap a convolution of two batched operands would become one with a group for each example.
    """
    p, out = eqn.params, eqn.outvars[0].aval
    image, cotangent = (jnp.asarray(array_of(value)) for value in values)
    numbers, groups, batch_groups = p["dimension_numbers"], p["feature_group_count"], p["batch_group_count"]
    (n, c, *spatial), (o, i, *window) = numbers.lhs_spec, numbers.rhs_spec
    places = [out.shape[k] for k in numbers.out_spec[2:]]
    positions, N = [cotangent.shape[k] for k in window], image.shape[n] // batch_groups
    if 0 in (image.size, cotangent.size) or not places or (groups > 1 and batch_groups > 1):
        return None
    if N == 1 and cotangent.shape[i] > 1 and math.prod(places) > math.prod(positions):
        return None  # it is the gradient of an image
    G, C, free, F = range(4)
    S = range(len(places))
    at, place, axis = (range(4 + k * len(S), 4 + (k + 1) * len(S)) for k in range(3))  # labels
    sizes = {place[d]: n for d, n in enumerate(places)}
    left, left_labels = _divided(
        cotangent, {o: (groups * batch_groups, G, F), i: (1, G, C)} | {k: (1, G, at[d]) for d, k in enumerate(window)}
    )
    right, right_labels = _divided(
        image,
        {n: (batch_groups, G, free), c: (groups, G, C)} | {k: (1, G, axis[d]) for d, k in enumerate(spatial)},
    )
    for a, labels in ((left, left_labels), (right, right_labels)):
        sizes |= dict(zip(labels, a.shape, strict=True))
    result: dict[int, tuple[int, ...]] = dict(
        zip(numbers.out_spec, [(free,), (G, F), *((k,) for k in place)], strict=True)
    )
    edges = [(lo, hi, d - 1) for (lo, hi), d in zip(p["padding"], p["lhs_dilation"], strict=True)]
    shapes = zip(places, positions, p["window_strides"], p["rhs_dilation"], edges, strict=True)
    windows = tuple(Unfolded(axis[d], place[d], at[d], Window(*shape)) for d, shape in enumerate(shapes))
    every = tuple(sizes.get(x, 1) for x in range(4 + 3 * len(S)))
    dims = tuple(axis_of(result[k], every) for k in range(out.ndim))
    found = squeezed(
        Product(left, right, left_labels, right_labels, dims, every, windows=windows, precision=p["precision"])
    )
    note_squeezed(found.left, cotangent)
    return found


def _divided(a: Array, parts: dict[int, tuple[int, int, int]]) -> tuple[Array, tuple[int, ...]]:
    """Split each axis by its (number of groups, group label, rest label); one group gets no axis of its own."""
    shape: list[int] = []
    labels: list[int] = []
    for k, n in enumerate(a.shape):
        groups, group, rest = parts[k]
        if groups > 1:
            shape, labels = [*shape, groups], [*labels, group]
        shape, labels = [*shape, n // groups], [*labels, rest]
    return a.reshape(shape), tuple(labels)


RECORDS = {lax.conv_general_dilated_p: Record(makes=_convolution, operands=lambda eqn: (), bilinear=True)}
