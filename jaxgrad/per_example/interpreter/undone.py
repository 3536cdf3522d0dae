"""An unevaluated product in one example's gradient: its two operands, and how their axes form those of the result.

Every axis has a label. A label in both operands and in `dims` is a group (G); a label in both operands and not in
`dims` is a position (T), which is summed over; a label in one operand and in `dims` is a free axis (F or K). Operations
that the program applies to the product are applied to the labels and operands instead: see `moves` and `linear`.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxgrad.per_example.algebra.windows import Window, unfold
from jaxgrad.precision import working_dtype

Labels = tuple[int, ...]
Box = tuple[tuple[int, int, int], ...]  # (start, stride, full size) for each axis


class Unfolded(NamedTuple):
    """A spatial axis of the image `right`, which unfolds to two axes: the place in the window, and its position.

    Attributes:
        axis: the label of the axis.
        place, position: the labels of the two axes.
        window: how place and position index the axis.
    """

    axis: int
    place: int
    position: int
    window: Window


class Reason(NamedTuple):
    """Why a gradient is evaluated as `vmap(jax.grad)` would: the primitive, its line in the source, and the cause."""

    primitive: str
    source: str
    why: str


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("left", "right"),
    meta_fields=(
        *("left_labels", "right_labels", "dims", "box", "row"),
        *("windows", "precision", "stepped", "reason", "over"),
    ),
)
@dataclass(frozen=True)
class Term:
    """An unevaluated product: Σ left · right over the labels not in `dims`.

    With a row, it is instead a lookup's gradient: `right`, added to the rows that `left` names. With windows, it is a
    convolution of the two operands, in which `right` is the image.

    Attributes:
        left, right: the operands; in a lookup `left` holds the row numbers (one out of range adds nothing), and `right`
            may have size 1 along positions at which it is the same.
        left_labels, right_labels: a label for each of their axes.
        dims: for each axis of the result, the labels that are merged into it, slowest first; none for an axis of
            size 1.
        box: where the result is placed in a larger array of zeros; None if it is the whole array.
        row: (label, number of rows) for a lookup; None for a product.
        windows: the axes of `right` that are not unfolded yet; `dims` and `left` use the labels of the unfolded axes.
        precision: the precision of the product, as in `jax.lax.dot_general`.
        stepped: whether a loop computed the operands, step by step.
        reason: why this term was materialized; None if it is a product.
        over: mesh axes over which the devices' products are summed, inside shard_map.
    """

    left: Any
    right: Any
    left_labels: Labels
    right_labels: Labels
    dims: tuple[Labels, ...]
    box: Box | None = None
    row: tuple[int, int] | None = None
    windows: tuple[Unfolded, ...] = ()
    precision: Any = None
    stepped: bool = False
    reason: Reason | None = None
    over: tuple[str, ...] = ()

    def size_of(self, label: int) -> int:
        """The size of the axis with this label."""
        if self.row is not None and label == self.row[0]:
            return self.row[1]
        for unfolded in self.windows:
            if label == unfolded.place:
                return unfolded.window.places
        if label in self.left_labels:
            return self.left.shape[self.left_labels.index(label)]
        return self.right.shape[self.right_labels.index(label)]

    @property
    def sizes(self) -> tuple[int, ...]:
        """The shape of the product itself, without the zeros around it."""
        return tuple(math.prod(self.size_of(label) for label in labels) for labels in self.dims)

    @property
    def shape(self) -> tuple[int, ...]:
        """The result's shape."""
        return self.sizes if self.box is None else tuple(full for _, _, full in self.box)

    @property
    def out(self) -> Labels:
        """The labels of the result."""
        return tuple(label for labels in self.dims for label in labels)

    @property
    def held(self) -> int:
        """The number of entries in the two operands."""
        return self.left.size + self.right.size

    @property
    def held_at_each_position(self) -> int:
        """The same, if a lookup's `right` is repeated at every position."""
        if self.row is None:
            return self.held
        return self.left.size * (1 + math.prod(self.size_of(x) for x in self.right_labels if x not in self.left_labels))

    @property
    def carried(self) -> bool:
        """Whether the term is a materialized array times 1."""
        return self.right.size == 1 and not self.right_labels

    def fresh(self) -> int:
        """A label that is not in use."""
        hidden = [label for w in self.windows for label in w[:3]]
        return max((*self.left_labels, *self.right_labels, *self.out, *hidden), default=-1) + 1

    def place(self, dim: int) -> tuple[int, int, int]:
        """The (start, stride, full size) of one axis."""
        return (0, 1, self.sizes[dim]) if self.box is None else self.box[dim]

    def whole(self, dim: int) -> bool:
        """Whether the product covers this axis of the result."""
        return self.place(dim) == (0, 1, self.sizes[dim])


def replace(term: Term, **changes: object) -> Term:
    """The term with some fields changed; a box that covers the whole result becomes None."""
    term = dataclasses.replace(term, **changes)  # type: ignore[arg-type]
    if term.box is not None and all(b == (0, 1, n) for b, n in zip(term.box, term.sizes, strict=True)):
        term = dataclasses.replace(term, box=None)
    return term


def carried_out(array: Array, reason: Reason | None) -> Term:
    """An array as a term: its product with 1."""
    labels = tuple(range(array.ndim))
    return Term(array, jnp.ones((), array.dtype), labels, (), tuple((k,) for k in labels), reason=reason)


def product(
    left: Array,
    right: Array,
    contracted: Sequence[tuple[int, int]],
    batch: Sequence[tuple[int, int]],
    precision: Any = None,
) -> Term:
    """dot_general of two arrays; `contracted` and `batch` are pairs (axis of left, axis of right)."""
    left_labels = tuple(range(left.ndim))
    shared = {r: k for k, r in (*contracted, *batch)}
    right_labels = tuple(shared.get(k, left.ndim + k) for k in range(right.ndim))
    met = {k for k, _ in (*contracted, *batch)}
    free = [k for k in left_labels if k not in met] + [k for k in right_labels if k not in met]
    return Term(
        left, right, left_labels, right_labels, tuple((k,) for k in [b for b, _ in batch] + free), precision=precision
    )


def lookup(ids: Array, values: Array, positions: Sequence[int], dims: Sequence[int | None], rows: int) -> Term:
    """`values`, added to rows of a table of zeros.

    Args:
        ids: integers, with an axis for each axis of positions; one out of range adds nothing.
        positions: the axes of values that are positions, in the order of ids' axes.
        dims: for each axis of the table, the corresponding axis of values; None for the rows.
        rows: the number of rows of the table.
    """
    labels = tuple(range(values.ndim))
    out = tuple((values.ndim,) if k is None else (k,) for k in dims)
    return Term(ids, values, tuple(positions), labels, out, row=(values.ndim, rows))


def unfolded(term: Term) -> Term:
    """The same term with its windows unfolded."""
    if not term.windows:
        return term
    spatial = [term.right_labels.index(w.axis) for w in term.windows]
    others = [k for k in range(term.right.ndim) if k not in spatial]
    image = unfold(term.right.transpose(*others, *spatial)[..., None], [w.window for w in term.windows])
    right = image.reshape(*image.shape[:-1], *(w.window.places for w in term.windows))
    labels = [term.right_labels[k] for k in others]
    labels += [w.position for w in term.windows] + [w.place for w in term.windows]
    return dataclasses.replace(term, right=right, right_labels=tuple(labels), windows=())


# --- Materializing -----------------------------------------------------------------------------------------------


def form(term: Term, dtype: jax.typing.DTypeLike) -> Array:
    """Materialize the product in `dtype`, accumulated in float32 at least."""
    work, term = working_dtype(dtype), unfolded(term)
    if term.row is None:
        value = einsum(term.left, term.left_labels, term.right, term.right_labels, term.out, work, term.precision)
        return _placed(value.astype(dtype).reshape(term.sizes), term)
    row, rows = term.row
    positions = term.left_labels
    others = tuple(label for label in term.right_labels if label not in positions)
    values = term.right.transpose([term.right_labels.index(label) for label in (*positions, *others)])
    values = jnp.broadcast_to(values, (*term.left.shape, *values.shape[term.left.ndim :]))
    values = values.reshape(term.left.size, *(term.size_of(label) for label in others)).astype(work)
    ids = jnp.where((term.left < 0) | (term.left >= rows), rows, term.left).ravel()
    table = jnp.zeros((rows, *values.shape[1:]), work).at[ids].add(values, mode="drop")
    labels = (row, *others)
    table = table.sum([k for k, label in enumerate(labels) if label not in term.out])  # these axes have size 1
    labels = tuple(label for label in labels if label in term.out)
    table = table.transpose([labels.index(label) for label in term.out])
    return _placed(table.astype(dtype).reshape(term.sizes), term)


def _placed(value: Array, term: Term) -> Array:
    if term.over:
        value = lax.psum(value, term.over)
    if term.box is None:
        return value
    edges = [
        (start, full - start - (n - 1) * stride - 1 if n else full - start, stride - 1)
        for (start, stride, full), n in zip(term.box, term.sizes, strict=True)
    ]
    return lax.pad(value, jnp.zeros((), value.dtype), edges)


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
    if a.dtype != b.dtype:
        a, b = a.astype(work), b.astype(work)
    operands = (a, list(a_labels), b, list(b_labels), list(out))
    return jnp.einsum(*operands, precision=precision, preferred_element_type=jnp.dtype(work))
