"""Product: what one example's gradient is a sum of, and, with an example axis in front, the gradients of a batch.

A product is Σ left · right over the positions. The axes of its two sides have labels:

    G  in both sides and in the parameter   a group: heads, stacked layers
    T  in both sides only                   a position, which is summed over
    F  in left and in the parameter         fan-out
    K  in right and in the parameter        fan-in

A side is an array seen as it is; or through ids, as one-hot vectors (left: ids that name rows); or through windows
(right: an image under a convolution's kernel). A right side of None is 1: the materialized gradient. `Place` says where
the products are in the parameter. The interpreter has an axis for each label; `arranged` then merges neighbors, so that
the arrays of a batch are [B, G, T, F] and [B, G, T, K], without the axes that have no label.

`explain` names the kinds:

    Outer(left [B,G,T,F], right [B,G,T,K])   a weight that enters through a matrix product
    Rows(ids [B,T], values [B,T,K])          values added to rows of a table: an embedding
    Windows(left, image)                     a convolution
    Dense(value [B,*shape])                  a materialized gradient: biases, scales, anything small
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxgrad.per_example.algebra.layout import Layout
from jaxgrad.per_example.algebra.place import Labels, Place, labels_of, put
from jaxgrad.per_example.algebra.windows import Window, unfold
from jaxgrad.precision import widening, working_dtype


class Unfolded(NamedTuple):
    """A spatial axis of the image, which unfolds to two axes: the place in the window, and its position.

    Attributes:
        axis: the label of the axis.
        place, position: the labels of the two axes.
        window: how place and position index the axis.
    """

    axis: int
    place: int
    position: int
    window: Window


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("left", "right"),
    meta_fields=(
        *("left_labels", "right_labels", "place", "sizes", "dtype", "row"),
        *("windows", "precision", "stepped", "reason", "over"),
    ),
)
@dataclass(frozen=True)
class Product:
    """Σ left · right over the labels that are not in `place`.

    Attributes:
        left: an array; with `row`, integers that name rows: one out of range adds nothing.
        right: an array; with `windows`, an image; None for 1.
        left_labels, right_labels: the labels of their axes in order, of which neighbors may be merged in the array.
        place: where the product is in an array of zeros.
        sizes: the size of each label.
        dtype: the parameter's dtype, in which sums and materialized gradients are returned; None in the interpreter.
        row: the label that `left` stands for as one-hot vectors; None if left is seen as it is.
        windows: the axes of `right` that are not unfolded yet; `place` and `left` use the labels of the unfolded axes.
        precision: the precision of the product, as in `jax.lax.dot_general`.
        stepped: whether a loop produced the sides, step by step: in memory their positions then come first.
        reason: in the interpreter, why it was materialized; None if it was not.
        over: mesh axes over which the devices' products are summed, inside shard_map.

    Example:
        >>> g = jg.per_example_grad(lambda W, x: jnp.tanh(W @ x).sum())(jnp.ones((30, 20)), jnp.ones((4, 20)))
        >>> (f,) = g.factors
        >>> f.kind, f.left.shape, f.right.shape, f.shape
        ('Outer', (4, 30), (4, 20), (30, 20))
    """

    left: Any  # an Array, or its jax.ShapeDtypeStruct
    right: Any
    left_labels: Labels
    right_labels: Labels
    place: Place
    sizes: tuple[int, ...]
    dtype: Any = None
    row: int | None = None
    windows: tuple[Unfolded, ...] = ()
    precision: Any = None
    stepped: bool = False
    reason: Any = None
    over: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """The name of its kind: "Outer", "Rows", "Windows" or "Dense"."""
        if self.row is not None:
            return "Rows"
        return "Windows" if self.windows else "Dense" if self.right is None else "Outer"

    # --- the labels

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array of zeros that it is in."""
        return tuple(axis.size for axis in self.place)

    @property
    def out(self) -> Labels:
        """The labels of the result, in the order of its axes."""
        return labels_of(self.place)

    @functools.cached_property
    def roles(self) -> tuple[Labels, Labels, Labels, Labels]:
        """The labels that are G, T, F and K, each in the order of the side's axes."""
        out, places = set(self.out), tuple(w.place for w in self.windows)
        left = (self.row, *self.left_labels) if self.row is not None else self.left_labels
        right = (*places, *self.right_labels)
        both = [x for x in left if x in right or (x not in out and self.windows)]
        G, T = tuple(x for x in both if x in out), tuple(x for x in both if x not in out)
        F, K = (tuple(x for x in side if x in out and x not in G) for side in (left, right))
        return G, T, F, K

    @property
    def layout(self) -> Layout:
        """Where the entries of [G, F, K] are in the parameter."""
        G, _, F, K = self.roles
        return Layout(self.place, self.sizes, (G, F, K), self.dtype)

    def count(self, labels: Sequence[int]) -> int:
        """The product of the labels' sizes."""
        return math.prod(self.sizes[x] for x in labels)

    # --- sizes in memory

    @property
    def held(self) -> int:
        """The number of entries in the two sides."""
        return self.left.size + (0 if self.right is None else self.right.size)

    @property
    def held_at_each_position(self) -> int:
        """The same, if the right side of a lookup is repeated at every position."""
        if self.row is None:
            return self.held
        return self.left.size * (1 + self.count([x for x in self.right_labels if x not in self.left_labels]))

    @property
    def is_scaled_array(self) -> bool:
        """Whether it is a materialized array times a number."""
        return self.row is None and not self.windows and not self.right_labels

    # --- the sides of a batch

    @property
    def positions(self) -> int:
        """T, the number of positions; of a lookup, the number of ids."""
        return self.count(self.left_labels if self.row is not None else self.roles[1])

    @property
    def is_vectors(self) -> bool:
        """Whether the two sides are one vector each, so that the norm is the product of theirs."""
        return self.kind == "Outer" and self.positions == 1 and not self.roles[0]

    def sides(self) -> tuple[Array, Array]:
        """left [B, G, T, F] and right [B, G, T, K] of a product of arrays, which are not copied."""
        assert self.row is None
        assert not self.windows
        G, T, F, K = (self.count(labels) for labels in self.roles)
        B = self.left.shape[0]
        right = jnp.ones((B, 1, 1, 1), self.left.dtype) if self.right is None else self.right
        return self.left.reshape(B, G, T, F), right.reshape(B, G, T, K)

    def with_sides(self, left: Array, right: Array) -> "Product":
        """The same product with these sides in place of those that `sides` returned."""
        return dataclasses.replace(self, left=left.reshape(self.left.shape), right=right.reshape(self.right.shape))

    @property
    def repeated(self) -> bool:
        """True if the values of a lookup are held once for several positions."""
        return not set(self.left_labels) <= set(self.right_labels)

    @property
    def rows(self) -> int:
        """The number of rows that the ids of a lookup name."""
        assert self.row is not None
        return self.sizes[self.row]

    def turned(self) -> "Product":
        """The product with its sides exchanged."""
        return dataclasses.replace(
            self, left=self.right, right=self.left, left_labels=self.right_labels, right_labels=self.left_labels
        )


def spread(p: Product) -> Product:
    """The product of one example with an axis for each label of its sides, which `arranged` may have merged."""
    left, right = (
        a if a is None else a.reshape([p.sizes[x] for x in labels])
        for a, labels in ((p.left, p.left_labels), (p.right, p.right_labels))
    )
    return dataclasses.replace(p, left=left, right=right)


def squeezed(p: Product) -> Product:
    """The product of one example without axes of size 1; a window's own axes and a table's rows may have size 1."""
    kept = {w.axis for w in p.windows} | {p.row}

    def few(labels: Sequence[int]) -> Labels:
        return tuple(x for x in labels if p.sizes[x] != 1 or x in kept)

    labels, labels_ = few(p.left_labels), few(p.right_labels)
    if (labels, labels_) != (p.left_labels, p.right_labels):
        p = spread(dataclasses.replace(p, left_labels=labels, right_labels=labels_))
    if any(few(axis.labels) != axis.labels for axis in p.place):
        place = (axis._replace(steps=tuple(step for step in axis.steps if few(step[:1]))) for axis in p.place)
        p = dataclasses.replace(p, place=tuple(place))
    return p


def unfolded(p: Product) -> Product:
    """The product of one example with its windows unfolded, and its sides in the order (G, T, F) and (G, T, K)."""
    if not p.windows:
        return p
    p = spread(p)
    G, T, F, K = p.roles
    C, places = tuple(x for x in T if x in p.right_labels), [w.place for w in p.windows]
    N = tuple(x for x in K if x not in places)
    positions = tuple(w.position for w in p.windows if w.position in T)
    order = (*G, *C, *(w.axis for w in p.windows), *N)
    image = p.right.transpose([p.right_labels.index(x) for x in order])
    # Without the axis of size 1, the compiler would keep one padded image for this and for the sum over the batch.
    image = image.reshape(1, *image.shape[: len(order) - len(N)], p.count(N))
    image = unfold(image, [w.window for w in p.windows])
    left_labels, right_labels = (*G, *C, *positions, *F), (*G, *C, *positions, *K)
    return dataclasses.replace(
        p,
        left=p.left.transpose([p.left_labels.index(x) for x in left_labels]),
        right=image.reshape([p.sizes[x] for x in right_labels]),
        left_labels=left_labels,
        right_labels=right_labels,
        windows=(),
    )


def form(p: Product, dtype: jax.typing.DTypeLike) -> Array:
    """Materialize the product of one example in `dtype`, accumulated in float32 or wider."""
    work, p = working_dtype(dtype), unfolded(spread(p))
    if p.row is None:
        right = jnp.ones((), p.left.dtype) if p.right is None else p.right
        value = einsum(p.left, p.left_labels, right, p.right_labels, p.out, work, p.precision)
        labels = p.out
    else:
        others = tuple(x for x in p.right_labels if x not in p.left_labels)
        present = [x for x in p.left_labels if x in p.right_labels]
        values = p.right.transpose([p.right_labels.index(x) for x in (*present, *others)])
        values = values.reshape(
            [p.sizes[x] if x in present else 1 for x in p.left_labels] + [p.sizes[x] for x in others]
        )
        values = jnp.broadcast_to(values, (*p.left.shape, *values.shape[p.left.ndim :]))
        values = values.reshape(p.left.size, *values.shape[p.left.ndim :]).astype(work)
        ids = jnp.where((p.left < 0) | (p.left >= p.rows), p.rows, p.left).ravel()
        value = jnp.zeros((p.rows, *values.shape[1:]), work).at[ids].add(values, mode="drop")
        labels = (p.row, *others)
    value = jax.lax.psum(value.astype(dtype), p.over) if p.over else value.astype(dtype)
    return put(value, labels, p.place, p.sizes)


def einsum(
    a: Array,
    a_labels: Labels,
    b: Array,
    b_labels: Labels,
    out: Labels,
    work: jax.typing.DTypeLike,
    precision: Any = None,
) -> Array:
    """Contract two operands over the labels that are not in `out`, as one dot_general."""
    work, summed = jnp.dtype(work), {*a_labels, *b_labels} - {*out}
    if a.dtype != b.dtype or (not summed and a.dtype.itemsize < work.itemsize):  # not every dot_general widens
        a, b = a.astype(work), b.astype(work)

    def product(a: Array, b: Array) -> Array:
        operands = (a, list(a_labels), b, list(b_labels), list(out))
        return jnp.einsum(*operands, precision=precision, preferred_element_type=work)

    return widening(product, a, b) if a.dtype.itemsize < 4 else product(a, b)
