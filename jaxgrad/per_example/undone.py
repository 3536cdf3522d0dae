"""A product that one example's gradient is, not carried out: its two operands, and which of their axes lie where.

Every axis has a label. A label in `left` and `right` and in `dims` is a group (G), in both and not in `dims` a position
that is summed over (T), in one of them and in `dims` a free axis (F or K). What becomes of the product afterwards
(transposed, reshaped, sliced, put into something larger, scaled, summed over an axis, multiplied by a matrix) is done
to labels and operands. A function here that cannot say its result in this form returns None.
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

from jaxgrad.precision import working_dtype

Labels = tuple[int, ...]
Box = tuple[tuple[int, int, int], ...]  # of each axis (start, stride, full size)


class Reason(NamedTuple):
    """Why a gradient is evaluated as `vmap(jax.grad)` would: at which primitive, and where that is in the source."""

    primitive: str
    source: str
    why: str


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("left", "right"),
    meta_fields=("left_labels", "right_labels", "dims", "box", "row", "precision", "reason"),
)
@dataclass(frozen=True)
class Term:
    """Σ over the labels that are not in `dims` of left · right; or, with a row, right added to the rows that left names.

    Attributes:
        left, right: arrays; in a lookup `left` holds the row numbers (one out of range adds nothing).
        left_labels, right_labels: a label for each of their axes.
        dims: for each axis of the result the labels it is made of, the slowest first; none for an axis of size 1.
        box: where the result lies in something larger; None if it is the whole.
        row: (label, number of rows) of a lookup, None of a product.
        precision: of the product, as in `jax.lax.dot_general`.
        reason: why this term was carried out after all; None if it is a product.
    """

    left: Any
    right: Any
    left_labels: Labels
    right_labels: Labels
    dims: tuple[Labels, ...]
    box: Box | None = None
    row: tuple[int, int] | None = None
    precision: Any = None
    reason: Reason | None = None

    def size_of(self, label: int) -> int:
        """Size of the axis with this label."""
        if self.row is not None and label == self.row[0]:
            return self.row[1]
        if label in self.left_labels:
            return self.left.shape[self.left_labels.index(label)]
        return self.right.shape[self.right_labels.index(label)]

    @property
    def sizes(self) -> tuple[int, ...]:
        """The result's shape, without what lies around its box."""
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
        """How many numbers the two operands are."""
        return self.left.size + self.right.size

    @property
    def carried(self) -> bool:
        """Whether it is an array times 1."""
        return self.right.size == 1 and not self.right_labels

    def fresh(self) -> int:
        """A label that is not in use."""
        return max((*self.left_labels, *self.right_labels, *self.out), default=-1) + 1

    def place(self, dim: int) -> tuple[int, int, int]:
        """(start, stride, full size) of one axis."""
        return (0, 1, self.sizes[dim]) if self.box is None else self.box[dim]

    def whole(self, dim: int) -> bool:
        """Whether the axis is all there."""
        return self.place(dim) == (0, 1, self.sizes[dim])


def replace(term: Term, **changes: object) -> Term:
    """The term with some fields changed; a box that is the whole becomes None."""
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
    """dot_general of two arrays: (axis of left, axis of right) for what is summed, and for what they share."""
    left_labels = tuple(range(left.ndim))
    shared = {r: k for k, r in (*contracted, *batch)}
    right_labels = tuple(shared.get(k, left.ndim + k) for k in range(right.ndim))
    met = {k for k, _ in (*contracted, *batch)}
    free = [k for k in left_labels if k not in met] + [k for k in right_labels if k not in met]
    return Term(
        left, right, left_labels, right_labels, tuple((k,) for k in [b for b, _ in batch] + free), precision=precision
    )


def lookup(ids: Array, values: Array, positions: Sequence[int], dims: Sequence[int | None], rows: int) -> Term:
    """values added to rows of a table.

    Args:
        ids: whole numbers, an axis for each position; one out of range adds nothing.
        positions: the axes of values that are positions, in the order of ids' axes.
        dims: for each axis of the table the axis of values that it is, None for the rows.
        rows: how many rows the table has.
    """
    labels = tuple(range(values.ndim))
    out = tuple((values.ndim,) if k is None else (k,) for k in dims)
    return Term(ids, values, tuple(positions), labels, out, row=(values.ndim, rows))


# --- Carrying it out ---------------------------------------------------------------------------------------------


def form(term: Term, dtype: jax.typing.DTypeLike) -> Array:
    """The product, accumulated in float32 at least, in `dtype`."""
    work = working_dtype(dtype)
    if term.row is None:
        value = _einsum(term.left, term.left_labels, term.right, term.right_labels, term.out, work, term.precision)
        return _placed(value.astype(dtype).reshape(term.sizes), term)
    row, rows = term.row
    positions = term.left_labels
    others = tuple(label for label in term.right_labels if label not in positions)
    values = term.right.transpose([term.right_labels.index(label) for label in (*positions, *others)])
    values = values.reshape(term.left.size, *(term.size_of(label) for label in others)).astype(work)
    ids = jnp.where((term.left < 0) | (term.left >= rows), rows, term.left).ravel()
    table = jnp.zeros((rows, *values.shape[1:]), work).at[ids].add(values, mode="drop")
    labels = (row, *others)
    table = table.sum([k for k, label in enumerate(labels) if label not in term.out])  # of size 1
    labels = tuple(label for label in labels if label in term.out)
    table = table.transpose([labels.index(label) for label in term.out])
    return _placed(table.astype(dtype).reshape(term.sizes), term)


def _placed(value: Array, term: Term) -> Array:
    if term.box is None:
        return value
    edges = [
        (start, full - start - (n - 1) * stride - 1 if n else full - start, stride - 1)
        for (start, stride, full), n in zip(term.box, term.sizes, strict=True)
    ]
    return lax.pad(value, jnp.zeros((), value.dtype), edges)


def _einsum(
    a: Array, a_labels: Labels, b: Array, b_labels: Labels, out: Labels, work: jax.typing.DTypeLike, precision=None
) -> Array:  # type: ignore[no-untyped-def]
    """Two operands contracted over what is not in `out`, as one dot_general."""
    a_only = [label for label in a_labels if label not in b_labels and label not in out]
    b_only = [label for label in b_labels if label not in a_labels and label not in out]
    if a.dtype != b.dtype:
        a, b = a.astype(work), b.astype(work)
    if a_only:
        a = a.sum([a_labels.index(label) for label in a_only])
        a_labels = tuple(label for label in a_labels if label not in a_only)
    if b_only:
        b = b.sum([b_labels.index(label) for label in b_only])
        b_labels = tuple(label for label in b_labels if label not in b_only)
    batch = [label for label in a_labels if label in b_labels and label in out]
    summed = [label for label in a_labels if label in b_labels and label not in out]
    dims = (
        ([a_labels.index(x) for x in summed], [b_labels.index(x) for x in summed]),
        ([a_labels.index(x) for x in batch], [b_labels.index(x) for x in batch]),
    )
    value = lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.dtype(work))
    order = [
        *batch,
        *(x for x in a_labels if x not in batch and x not in summed),
        *(x for x in b_labels if x not in batch and x not in summed),
    ]
    return value.transpose([order.index(label) for label in out])


# --- Moving it about ---------------------------------------------------------------------------------------------


def transpose(term: Term, permutation: Sequence[int]) -> Term:
    """Axes permuted."""
    box = None if term.box is None else tuple(term.box[k] for k in permutation)
    return replace(term, dims=tuple(term.dims[k] for k in permutation), box=box)


def reshape(term: Term, shape: Sequence[int]) -> Term | None:
    """Axes merged and divided, as far as the operands' own axes can be divided alike."""
    if 0 in term.shape or 0 in shape:
        return None
    dims: list[Labels] = []
    box: list[tuple[int, int, int]] = []
    for old, new in _blocks(term.shape, tuple(shape)):
        target = [shape[k] for k in new]
        wide = [k for k in old if term.shape[k] != 1 or not term.whole(k)]
        if all(term.whole(k) for k in old):
            divided = _divided(term, [label for k in old for label in term.dims[k]], target)
            if divided is None:
                return None
            term, groups = divided
            dims += groups
            box += [(0, 1, n) for n in target]
            continue
        # The first axis is a part of something larger, the others are whole; they become one axis, beside ones.
        first, *rest = wide
        start, stride, full = term.place(first)
        inner = math.prod(term.shape[k] for k in rest)
        if not all(term.whole(k) for k in rest) or (stride != 1 and inner != 1) or target.count(1) < len(target) - 1:
            return None
        labels = tuple(label for k in wide for label in term.dims[k])
        at = next((i for i, n in enumerate(target) if n != 1), 0)
        dims += [labels if i == at else () for i in range(len(target))]
        box += [(start * inner, stride, full * inner) if i == at else (0, 1, 1) for i in range(len(target))]
    return replace(term, dims=tuple(dims), box=tuple(box))


def _blocks(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Runs of axes of two shapes with equal products, as short as can be."""
    blocks: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        a, b = [], []
        m = n = 1
        if i < len(old):
            a, m, i = [i], old[i], i + 1
        if j < len(new):
            b, n, j = [j], new[j], j + 1
        while m != n:
            if m < n:
                a, m, i = [*a, i], m * old[i], i + 1
            else:
                b, n, j = [*b, j], n * new[j], j + 1
        blocks.append((a, b))
    return blocks


def _divided(term: Term, labels: list[int], sizes: list[int]) -> tuple[Term, list[Labels]] | None:
    """The labels, in order, as axes of these sizes; where one is too large it is divided in two."""
    groups: list[Labels] = []
    rest = [label for label in labels if term.size_of(label) != 1]
    for need in sizes:
        group: list[int] = []
        while need != 1:
            if not rest:
                return None
            label, n = rest[0], term.size_of(rest[0])
            if need % n == 0:
                group.append(rest.pop(0))
                need //= n
            elif n % need == 0 and (term.row is None or label != term.row[0]):
                new = term.fresh()
                term = _split_label(term, label, new, need)
                group.append(new)
                need = 1
            else:
                return None
        groups.append(tuple(group))
    return (term, groups) if not rest else None


def _split_label(term: Term, label: int, outer: int, size: int) -> Term:
    """An axis as two, `outer` of this size and `label` of the rest."""

    def side(a: Array, labels: Labels) -> tuple[Array, Labels]:
        if label not in labels:
            return a, labels
        k = labels.index(label)
        a = a.reshape(*a.shape[:k], size, a.shape[k] // size, *a.shape[k + 1 :])
        return a, (*labels[:k], outer, *labels[k:])

    left, left_labels = side(term.left, term.left_labels)
    right, right_labels = side(term.right, term.right_labels)
    dims = tuple(tuple(x for y in d for x in ((outer, y) if y == label else (y,))) for d in term.dims)
    return dataclasses.replace(
        term, left=left, right=right, left_labels=left_labels, right_labels=right_labels, dims=dims
    )


def pad(term: Term, config: Sequence[tuple[int, int, int]]) -> Term | None:
    """Zeros around it and between its entries; negative edges cut."""
    cut = [
        (max(-lo, 0), n - max(-hi, 0)) if step == 0 else (0, n)
        for (lo, hi, step), n in zip(config, term.shape, strict=True)
    ]
    if any((lo < 0 or hi < 0) and step for lo, hi, step in config):
        return None
    parts = cut_out(term, [a for a, _ in cut], [b for _, b in cut], [1] * len(cut))
    if parts is None or not parts:
        return None
    term = parts[0]
    box = []
    for k, (lo, hi, step) in enumerate(config):
        start, stride, full = term.place(k)
        lo, hi = max(lo, 0), max(hi, 0)
        box.append((lo + start * (step + 1), stride * (step + 1), lo + hi + full + max(full - 1, 0) * step))
    return replace(term, box=tuple(box))


def cut_out(
    term: Term, starts: Sequence[int], limits: Sequence[int], strides: Sequence[int]
) -> tuple[Term, ...] | None:
    """A slice: no term where it is empty of entries."""
    for k, (a, b, step) in enumerate(zip(starts, limits, strides, strict=True)):
        if (a, b, step) == (0, term.shape[k], 1):
            continue
        if not len(range(a, b, step)):
            return ()
        start, stride, _ = term.place(k)
        n = term.sizes[k]
        if term.whole(k):
            taken: Term | None = _take(term, k, a, b, step)
            place = (0, 1, len(range(a, b, step)))
        elif step == 1 and stride == 1:
            first, last = max(a, start), min(b, start + n)
            if first >= last:
                return ()
            taken, place = _take(term, k, first - start, last - start, 1), (first - a, 1, b - a)
        elif n == 1:
            if start not in range(a, b, step):
                return ()
            taken, place = term, ((start - a) // step, 1, len(range(a, b, step)))
        else:
            return None
        if taken is None:
            return None
        box = tuple(
            place if i == k else taken.place(i) if term.box is None else term.box[i] for i in range(len(starts))
        )
        term = replace(taken, box=box)
    return (term,)


def _take(term: Term, dim: int, start: int, limit: int, stride: int) -> Term | None:
    """Entries of one axis that is whole, or of the part that is there."""
    n = term.sizes[dim]
    if (start, limit, stride) == (0, n, 1):
        return dataclasses.replace(term, box=None)
    labels = [label for label in term.dims[dim] if term.size_of(label) != 1]
    if len(labels) == 0:
        return None  # an empty slice
    inner = math.prod(term.size_of(label) for label in labels[1:])
    if (stride != 1 and inner != 1) or start % inner or limit % inner:
        return None
    label, start, limit = labels[0], start // inner, limit // inner
    if limit <= start:
        return None
    if term.row is not None and label == term.row[0]:
        if stride != 1:
            return None
        return dataclasses.replace(term, left=_within(term, start, limit), row=(label, limit - start), box=None)

    def side(a: Array, of: Labels) -> Array:
        return lax.slice_in_dim(a, start, limit, stride, of.index(label)) if label in of else a

    return dataclasses.replace(
        term, left=side(term.left, term.left_labels), right=side(term.right, term.right_labels), box=None
    )


def _within(term: Term, start: int, limit: int) -> Array:
    """Row numbers counted from `start`; what lies outside is the number of rows, which adds nothing."""
    inside = (term.left >= start) & (term.left < limit)
    return jnp.where(inside, term.left - start, jnp.full_like(term.left, limit - start))


def reverse(term: Term, dims: Sequence[int]) -> Term | None:
    """Axes reversed."""
    flipped = {label for k in dims for label in term.dims[k]}
    if term.row is not None and term.row[0] in flipped:
        return None

    def side(a: Array, labels: Labels) -> Array:
        return lax.rev(a, [k for k, label in enumerate(labels) if label in flipped])

    box = term.box
    if box is not None:
        turned = [
            (full - 1 - (start + (n - 1) * stride), stride, full)
            for (start, stride, full), n in zip(box, term.sizes, strict=True)
        ]
        box = tuple(turned[k] if k in dims else box[k] for k in range(len(box)))
    return replace(term, left=side(term.left, term.left_labels), right=side(term.right, term.right_labels), box=box)


# --- Scaling, masking, summing ------------------------------------------------------------------------------------


def on_smaller(term: Term, function) -> Term:  # type: ignore[no-untyped-def]
    """A linear function of the entries, one by one, applied to the smaller operand."""
    if term.row is None and term.left.size < term.right.size:
        return replace(term, left=function(term.left))
    return replace(term, right=function(term.right))


def aligned(term: Term, value: Array, dims: Sequence[int]) -> tuple[str, Array] | None:
    """`value`, with an axis for each of these axes of the result, brought to the axes of one operand.

    Returns:
        ("left" or "right", the value with an axis of size n or 1 for each of that operand's), None if it varies along
        axes of both.
    """
    labels = [label for k in dims for label in term.dims[k]]
    side = "right" if all(label in term.right_labels for label in labels) else "left"
    of = term.right_labels if side == "right" else term.left_labels
    if not all(label in of for label in labels) or (term.row is not None and side == "left"):
        return None
    if term.box is not None:
        for axis, k in enumerate(dims):
            start, stride, _ = term.box[k]
            value = lax.slice_in_dim(value, start, start + (term.sizes[k] - 1) * stride + 1, stride, axis)
    value = value.reshape([term.size_of(label) for label in labels])
    present = [label for label in of if label in labels]
    value = value.transpose([labels.index(label) for label in present])
    return side, value.reshape([term.size_of(label) if label in labels else 1 for label in of])


def sums(term: Term, dims: Sequence[int]) -> Term | None:
    """Summed over axes of the result."""
    gone = {label for k in dims for label in term.dims[k]}
    if term.row is not None and term.row[0] in gone:
        return None

    def side(a: Array, labels: Labels, others: Labels) -> tuple[Array, Labels]:
        alone = [label for label in labels if label in gone and label not in others]
        if not alone:
            return a, labels
        total = a.sum([labels.index(label) for label in alone], dtype=working_dtype(a.dtype))
        return total, tuple(label for label in labels if label not in alone)

    left, left_labels = side(term.left, term.left_labels, term.right_labels)
    right, right_labels = side(term.right, term.right_labels, term.left_labels)
    kept = [k for k in range(len(term.dims)) if k not in dims]
    box = None if term.box is None else tuple(term.box[k] for k in kept)
    changed = dataclasses.replace(
        term,
        left=left,
        right=right,
        left_labels=left_labels,
        right_labels=right_labels,
        dims=tuple(term.dims[k] for k in kept),
        box=None,
    )
    return replace(changed, box=box)


def contract(
    term: Term,
    C: Array,
    contracted: Sequence[tuple[int, int]],
    batch: Sequence[tuple[int, int]],
    undone_first: bool,
    precision: object,
) -> Term | None:
    """dot_general of the product with an array: (δ aᵀ) C = δ (Cᵀ a)ᵀ, the array moves onto one operand.

    Args:
        contracted, batch: (axis of the product, axis of C).
        undone_first: whether the product is dot_general's first operand.
    """
    met = [label for k, _ in (*contracted, *batch) for label in term.dims[k]]
    if term.row is not None and term.row[0] in met:
        return None
    for k, axis in contracted:
        if not term.whole(k):
            start, stride, _ = term.place(k)
            C = lax.slice_in_dim(C, start, start + (term.sizes[k] - 1) * stride + 1, stride, axis)
    if not all(term.whole(k) for k, _ in batch):
        return None
    sides = [s for s in ("left", "right") if all(label in getattr(term, f"{s}_labels") for label in met)]
    if term.row is not None:
        sides = [s for s in sides if s == "right"]
    if not sides:
        return None
    side = min(sides, key=lambda s: getattr(term, s).size)
    of, operand = getattr(term, f"{side}_labels"), getattr(term, side)
    other = term.right_labels if side == "left" else term.left_labels
    free = [axis for axis in range(C.ndim) if axis not in {b for _, b in (*contracted, *batch)}]
    new = {axis: term.fresh() + i for i, axis in enumerate(free)}
    # C's axes, divided as the product's are
    at = {axis: term.dims[k] for k, axis in (*contracted, *batch)}
    C_labels = tuple(label for axis in range(C.ndim) for label in at.get(axis, (new[axis],) if axis in new else ()))
    sizes = [[term.size_of(label) for label in at[k]] if k in at else [C.shape[k]] for k in range(C.ndim)]
    C = C.reshape([n for part in sizes for n in part])
    gone = {label for k, _ in contracted for label in term.dims[k]} - set(other)
    kept = tuple(label for label in of if label not in gone)
    out = (*kept, *new.values())
    work = working_dtype(operand.dtype, C.dtype)
    dtype = operand.dtype if operand.dtype == C.dtype else work
    value = _einsum(operand, of, C, C_labels, out, work, precision).astype(dtype)
    used = {k for k, _ in (*contracted, *batch)}
    mine = [k for k in range(len(term.dims)) if k not in used]
    ours = [(term.dims[k], term.place(k)) for k in mine]
    theirs = [((new[axis],), (0, 1, C.shape[C_labels.index(new[axis])])) for axis in free]
    both = [(term.dims[k], term.place(k)) for k, _ in batch]
    order = [*both, *ours, *theirs] if undone_first else [*both, *theirs, *ours]
    changed = dataclasses.replace(
        term, **{side: value, f"{side}_labels": out}, dims=tuple(labels for labels, _ in order), box=None
    )
    return replace(changed, box=tuple(place for _, place in order))


def embedded(term: Term, dim: int, start: Array, full: int, mode: str) -> Term | None:
    """Put along one axis at an index that is only known when it runs; mode "clip" or "drop" for one out of range."""
    if not term.whole(dim) or term.row is not None:
        return None
    n = term.sizes[dim]
    place = [term.place(k) for k in range(len(term.dims))]
    if n == 1:  # a one-hot vector beside the smaller operand
        if mode == "clip":
            start = jnp.clip(start, 0, full - 1)
        hot = jnp.arange(full, dtype=start.dtype) == start
        new, side = term.fresh(), "left" if term.left.size <= term.right.size else "right"
        a, labels = getattr(term, side), getattr(term, f"{side}_labels")
        a = jnp.where(hot.reshape(full, *[1] * a.ndim), a[None], jnp.zeros_like(a)[None])
        changes = {side: a, f"{side}_labels": (new, *labels)}
        dims = tuple((new,) if k == dim else d for k, d in enumerate(term.dims))
    else:
        label = term.dims[dim]
        sides = [s for s in ("left", "right") if all(x in getattr(term, f"{s}_labels") for x in label)]
        if len(label) != 1 or len(sides) != 1 or mode != "clip":
            return None
        a, labels = getattr(term, sides[0]), getattr(term, f"{sides[0]}_labels")
        axis = labels.index(label[0])
        zeros = jnp.zeros((*a.shape[:axis], full, *a.shape[axis + 1 :]), a.dtype)
        changes = {sides[0]: lax.dynamic_update_slice_in_dim(zeros, a, start, axis)}
        dims = term.dims
    box = tuple((0, 1, full) if k == dim else p for k, p in enumerate(place))
    return replace(dataclasses.replace(term, **changes, dims=dims, box=None), box=box)
