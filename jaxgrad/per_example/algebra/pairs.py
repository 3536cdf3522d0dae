"""Inner products of two factors of one parameter, for every pair of kinds.

inner(f, f′) → [B] pairs example b with example b; gram(f, f′) → [B, C] pairs every b with every c. Both are exact. The
order of summation, and so the cost, depends on the kinds and shapes. For two Outer factors of the same layout there are
two ways:

    through positions   Σ_g Σ_ts (left_gt · left′_gs)(right_gt · right′_gs)    T·S·(F + K) operations per pair
    through the matrix  ⟨Σ_t left ⊗ right, Σ_s left′ ⊗ right′⟩                (T + S)·F·K + F·K operations per pair

`inner` and `gram` take the one with fewer operations (for `gram`, the matrix of each example is materialized once, not
once per pair). This is decided from shapes, when the call is traced. Rows with Rows, and Rows with Outer (an embedding
tied to an output layer) go through positions as well; if there are many positions, equal ids are combined (`rows`).
Windows are unfolded to an Outer, a few examples at a time. All other pairs are materialized, a few examples at a time
(`chunks`); if a single example (for a Gram matrix, one from each side) exceeds the limit, it is materialized anyway.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxgrad.per_example.algebra import rows
from jaxgrad.per_example.algebra.chunks import (
    Blocks,
    chunk_size,
    expected,
    map_examples,
    pairs_at_once,
    sum_examples,
)
from jaxgrad.per_example.algebra.factors import (
    Dense,
    Factor,
    Outer,
    Rows,
    Windows,
    accumulator,
    dot,
    for_products,
    written_out,
)
from jaxgrad.per_example.algebra.layout import Layout
from jaxgrad.per_example.algebra.mapped import Common, Mapped, of_examples
from jaxgrad.per_example.algebra.scales import row_sums
from jaxgrad.precision import contracted
from jaxgrad.sharding import every_example


class Plan(NamedTuple):
    """How the inner products of two factors are computed.

    Attributes:
        way: its name in `explain`: "sides" (T = 1), "positions", "matrix", "entries" (one is already materialized),
            "map", "direction" (one is an array shared by all examples) or "apart" (their entries are disjoint).
        f, f_: the factors, in the order and the form that the plan needs.
        each: function for pairs of example b with example b; None if both factors are materialized for it.
        pair: number of products of positions for one pair of examples; 0 if the way is not through positions.
    """

    way: str
    f: Factor
    f_: Factor
    each: Callable[[Any, Any], Array] | None = None
    pair: int = 0


def plan(f: Factor, f_: Factor, of_all_pairs: bool = False) -> Plan:
    """Choose the way to compute inner products, from shapes alone, for `inner`, `gram` and `explain`.

    Args:
        of_all_pairs: True if every example is paired with every other, as in a Gram matrix.
    """
    f, f_ = _ordered(f, f_)
    if f.layout.disjoint(f_.layout):
        return Plan("apart", f, f_)
    if isinstance(f_, Common):
        return Plan("direction", f, f_)
    if isinstance(f, Mapped):
        return Plan("map", f, f_)
    f, f_ = _in_matrix_order(f, f_)
    through_positions = _gram_through_positions if of_all_pairs else _inner_through_positions
    match f, f_:
        case Outer(), Outer() if _same_matrix(f, f_) and through_positions(f, f_):
            (_, G, T, _), S = f.left.shape, f_.left.shape[2]
            return Plan("sides" if T == S == 1 else "positions", f, f_, _outer_outer, G * T * S)
        case Rows(), Rows() if f.layout.same_place(f_.layout):
            T, S = f.ids.shape[1], f_.ids.shape[1]
            return Plan("positions", f, f_, rows.inner if T * S > rows.PAIRS else _rows_rows, T * S)
        case Rows(), Outer() if (turned := _turned_to_table(f, f_)) is not None:
            return Plan("positions", f, turned, _rows_outer, f.ids.shape[1] * turned.left.shape[2])
        case Dense(), Outer():
            return Plan("entries", f, f_, _dense_outer)
        case Dense(), _:
            return Plan("entries", f, f_)
    return Plan("matrix", f, f_)


def inner(f: Factor, f_: Factor) -> Float[Array, " B"]:
    """⟨f_b, f′_b⟩ of every example, in the accumulator's dtype."""
    acc = accumulator(f, f_)
    f, f_ = (for_products(o, acc) for o in (f, f_))
    windows = [w.at_once for w in (f, f_) if isinstance(w, Windows)]
    way, f, f_, each, _ = plan(f, f_)
    match way, f_:
        case "apart", _:
            return jnp.zeros(_count(f), acc)
        case "direction", Common(number, array):
            return number.astype(acc) * dot(f, array.value)
        case _ if windows:
            return map_examples(lambda f, f_: inner(_unfolded(f), _unfolded(f_)), Blocks.fewest(windows), f, f_)
    if each is not None:
        return each(f, f_)
    size = chunk_size(2 * f.layout.size * acc.itemsize, _count(f))
    return map_examples(lambda f, f_: row_sums(written_out(f) * written_out(f_)), size, f, f_)


def gram(f: Factor, f_: Factor) -> Float[Array, "B C"]:
    """⟨f_b, f′_c⟩ of every pair of examples, in the accumulator's dtype."""
    acc = accumulator(f, f_)
    f, f_ = (for_products(o, acc) for o in (f, f_))
    first, _ = _ordered(f, f_)
    if first is not f:
        return gram(f_, f).T
    if isinstance(f, Windows) and isinstance(f_, Windows) and _smaller_unfolded(f) and _smaller_unfolded(f_):
        return gram(f.unfolded(), f_.unfolded())
    way, f, f_, each, pair = plan(f, f_, of_all_pairs=True)
    if way == "apart":
        return jnp.zeros((_count(f), _count(f_)), acc)
    if isinstance(f_, Common):
        return dot(f, f_.array.value)[:, None] * every_example(f_.number.astype(acc))[None, :]
    f_ = every_example(f_)  # only factors are communicated between devices, never materialized gradients
    match f, f_:
        case Outer(), Outer() if way == "sides" and f.left.shape[1] == 1:  # two matrix products
            return _product(f.left, f_.left, acc) * _product(f.right, f_.right, acc)
        case Outer(), Outer() if way == "matrix" and _same_matrix(f, f_):
            return _through_matrix(f, f_)
        case Rows(), Rows() if way == "positions" and _tables_are_cheaper(f, f_):
            return rows.gram(f, f_)
        case Dense(), Dense():
            mine, theirs = (o.value.reshape(_count(o), o.layout.size) for o in (f, f_))
            return contracted("bk,ck->bc", mine, theirs, acc)  # both are materialized already
    if pair and each is not None:
        return _by_blocks(_rows_rows if each is rows.inner else each, f, f_, 2 * pair * acc.itemsize)
    return _written_out_blocks(f, f_)


def way(f: Factor, f_: Factor) -> str:
    """The `Plan.way` by which `inner` computes; convolutions are treated as unfolded."""
    f, f_ = (jax.eval_shape(Windows.unfolded, w) if isinstance(w, Windows) else w for w in (f, f_))
    return plan(f, f_).way


# --- Which way ---------------------------------------------------------------------------------------------------


def _count(f: Factor) -> int:
    return of_examples(f)[0].shape[0]


def _ordered(f: Factor, f_: Factor) -> tuple[Factor, Factor]:
    """Order as Mapped, Dense, Rows, Outer, Windows, Common, so that each pair of kinds is handled in one place."""
    rank = {Mapped: 0, Dense: 1, Rows: 2, Outer: 3, Windows: 4, Common: 5}
    return (f, f_) if rank[type(f)] <= rank[type(f_)] else (f_, f)


def _unfolded(f: Factor) -> Factor:
    return f.unfolded() if isinstance(f, Windows) else f


def _smaller_unfolded(f: Windows) -> bool:
    """True if the unfolded Outer holds fewer numbers than the gradient it stands for."""
    left, image = (jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (f.left, f.image))
    outer = jax.eval_shape(f.unfolding.sides, left, image)
    return sum(math.prod(side.shape[1:]) for side in outer) < f.layout.size


def _same_matrix(f: Outer, f_: Outer) -> bool:
    return f.layout.same_place(f_.layout)


def _in_matrix_order(f: Factor, f_: Factor) -> tuple[Factor, Factor]:
    """Turn two factors with one layout into factors of a [G, F, K] parameter, so that nothing is moved or padded."""
    if isinstance(f, Dense | Mapped) or isinstance(f_, Dense | Mapped) or not f.layout.same_place(f_.layout):
        return f, f_
    layout = Layout(f.layout.matrix, f.layout.dtype, (0, 1, 2), f.layout.matrix)
    return dataclasses.replace(f, layout=layout), dataclasses.replace(f_, layout=layout)


def _inner_through_positions(f: Outer, f_: Outer) -> bool:
    (_, _, T, F), S, K = f.left.shape, f_.left.shape[2], f.right.shape[3]
    return T * S * (F + K) <= (T + S) * F * K + F * K


def _gram_through_positions(f: Outer, f_: Outer) -> bool:
    (_, _, T, F), (_, _, S, _), K = f.left.shape, f_.left.shape, f.right.shape[3]
    B, C = expected(_count(f)), expected(_count(f_))
    return B * C * T * S * (F + K) <= (B * T + C * S + B * C) * F * K


def _tables_are_cheaper(f: Rows, f_: Rows) -> bool:
    ids, ids_ = (expected(_count(o)) * o.ids.shape[1] for o in (f, f_))
    return f.ids.shape[1] * f_.ids.shape[1] * expected(_count(f)) > ids + min(f.rows, ids + ids_)


def _turned_to_table(table: Rows, outer: Outer) -> Outer | None:
    """The Outer with its sides ordered so that `left` runs over the table's rows; None if the layouts do not match."""
    if table.layout.same_place(outer.layout):
        return outer
    G, F, K = outer.layout.matrix
    swapped = dataclasses.replace(outer.layout, axes=outer.layout.axes[::-1], matrix=(G, K, F))
    if G == 1 and len(outer.layout.axes) == 2 and table.layout.same_place(swapped):
        return Outer(outer.right, outer.left, swapped)
    return None


# --- Through positions: each function takes paired examples -------------------------------------------------------


def _outer_outer(f: Outer, f_: Outer) -> Array:
    _, G, T, F = f.left.shape
    S, acc = f_.left.shape[2], accumulator(f, f_)
    if T == S == 1:
        count = _count(f) * G
        lefts = (f.left.astype(acc) * f_.left.astype(acc)).reshape(count, F)
        rights = (f.right.astype(acc) * f_.right.astype(acc)).reshape(count, f.right.shape[3])
        return (row_sums(lefts) * row_sums(rights)).reshape(_count(f), G).sum(1)

    def positions(f: Outer, f_: Outer) -> Array:
        lefts = contracted("bgtf,bgsf->bgts", f.left, f_.left, acc)
        rights = contracted("bgtk,bgsk->bgts", f.right, f_.right, acc)
        return row_sums(lefts * rights)

    size = chunk_size(2 * G * T * S * acc.itemsize, _count(f))
    return map_examples(positions, size, f, f_)


def _rows_rows(f: Rows, f_: Rows) -> Array:
    acc = accumulator(f, f_)

    def repeated(f: Rows, f_: Rows) -> Array:
        ids, ids_ = rows.of_one_dtype(f.ids, f_.ids)
        same = (ids[:, :, None] == ids_[:, None, :]) & f.inside[:, :, None]
        count = same.sum((1, 2))
        products = row_sums(f.values.astype(acc) * f_.values.astype(acc))
        return jnp.where(count > 0, count.astype(products.dtype) * products, jnp.zeros_like(products))

    def positions(f: Rows, f_: Rows) -> Array:
        (ids, values), (ids_, values_) = f.valid(), f_.valid()
        ids, ids_ = rows.of_one_dtype(ids, ids_)
        same = ids[:, :, None] == ids_[:, None, :]
        products = contracted("btk,bsk->bts", values, values_, acc)
        return row_sums(jnp.where(same, products, jnp.zeros_like(products)))

    size = chunk_size(2 * f.ids.shape[1] * f_.ids.shape[1] * acc.itemsize, _count(f))
    return map_examples(repeated if f.repeated and f_.repeated else positions, size, f, f_)


def _rows_outer(f: Rows, f_: Outer) -> Array:
    """Σ_ts left′[s, id_t] (values_t · right′_s)."""
    acc = accumulator(f, f_)

    def positions(f: Rows, f_: Outer) -> Array:
        ids, values = f.valid()
        picked = jnp.take_along_axis(f_.left[:, 0], ids[:, None, :], axis=2)  # [B, S, T]
        return row_sums(picked.astype(acc) * contracted("bsk,btk->bst", f_.right[:, 0], values, acc))

    size = chunk_size(2 * f.ids.shape[1] * f_.left.shape[2] * acc.itemsize, _count(f))
    return map_examples(positions, size, f, f_)


def _dense_outer(f: Dense, f_: Outer) -> Array:
    """Σ_t left_tᵀ D right_t, without materializing the Outer; D is materialized already."""
    layout, acc = f_.layout, accumulator(f, f_)
    if layout.matrix[1] > layout.matrix[2]:  # contract with the longer side first
        f_, order = dataclasses.replace(f_, left=f_.right, right=f_.left), "bgkf"
    else:
        order = "bgfk"

    def each(value: Array, f_: Outer) -> Array:
        D = layout.to_matrix(value)
        return row_sums(f_.left.astype(acc) * contracted(f"bgtk,{order}->bgtf", f_.right, D, acc))

    size = chunk_size((layout.size + math.prod(f_.left.shape[1:])) * acc.itemsize, _count(f))
    return map_examples(each, size, f.value, f_)


# --- Gram matrices by blocks -------------------------------------------------------------------------------------


def _product(a: Array, b: Array, dtype: jnp.dtype) -> Array:
    return contracted("bk,ck->bc", a.reshape(a.shape[0], a.shape[3]), b.reshape(b.shape[0], b.shape[3]), dtype)


def _by_blocks(pair, f, f_, pair_bytes):  # type: ignore[no-untyped-def]
    """gram from a function of paired examples: a block of rows with a block of columns, by two nested vmaps."""
    across = pairs_at_once(pair_bytes, _count(f_))
    down = pairs_at_once(pair_bytes * across, _count(f))

    def one(f_b: Factor, f_c: Factor) -> Array:
        return pair(*jax.tree.map(lambda a: a[None], (f_b, f_c)))[0]

    def block(f: Factor) -> Array:
        pairs = jax.vmap(jax.vmap(one, (0, None)), (None, 0))
        return map_examples(lambda f_: pairs(f, f_), across, f_, spread=False).T  # gathered

    return map_examples(block, down, f)


def _through_matrix(f: Outer, f_: Outer) -> Array:
    """gram through the matrices; one slice of G, F or K (the longest) is materialized at a time."""
    axis = max(range(3), key=f.layout.matrix.__getitem__)
    if axis == 2:
        f, f_ = (dataclasses.replace(o, left=o.right, right=o.left) for o in (f, f_))
    length, acc = f.layout.matrix[axis], accumulator(f, f_)
    each = (expected(_count(f)) + expected(_count(f_))) * (f.layout.size // length) * acc.itemsize
    size = chunk_size(each, length)

    def sliced(o: Outer) -> tuple[Array, ...]:  # the chosen axis first
        sides = (o.left, o.right) if axis == 0 else (o.left,)
        return tuple(jnp.moveaxis(a, 1 if axis == 0 else 3, 0) for a in sides)

    def part(slices: tuple[Array, ...], slices_: tuple[Array, ...]) -> Array:
        if axis == 0:
            P, P_ = (contracted("gbtf,gbtk->bgfk", a[0], a[1], acc) for a in (slices, slices_))
        else:
            P, P_ = (
                contracted("fbgt,bgtk->bgfk", a[0], right, acc) for a, right in ((slices, f.right), (slices_, f_.right))
            )
        return lax.dot_general(P, P_, (((1, 2, 3), (1, 2, 3)), ((), ())))

    return sum_examples(part, size, sliced(f), sliced(f_), spread=False)


def _written_out_blocks(f: Factor, f_: Factor) -> Array:
    """gram of materialized gradients, a block of examples of each side at a time."""
    size = chunk_size(2 * f.layout.size * accumulator(f, f_).itemsize, max(expected(_count(f)), expected(_count(f_))))

    def matrix(f: Factor) -> Array:
        return written_out(f).reshape(_count(f), math.prod(f.layout.shape))

    def block(f: Factor) -> Array:
        G = matrix(f)
        return map_examples(lambda f_: lax.dot(matrix(f_), G.T), size, f_, spread=False).T

    return map_examples(block, size, f)
