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
from collections.abc import Callable, Sequence
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
    Factor,
    accumulator,
    at_once,
    dot,
    for_products,
    is_nothing,
    unfolded,
    unfolded_shape,
    value,
    written_out,
)
from jaxgrad.per_example.algebra.mapped import Common, of_examples
from jaxgrad.per_example.algebra.place import axis_of
from jaxgrad.per_example.algebra.product import Product
from jaxgrad.per_example.algebra.rows import Lookup
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
    f: Any
    f_: Any
    each: Callable[[Any, Any], Array] | None = None
    pair: int = 0


def plan(f: Factor, f_: Factor, of_all_pairs: bool = False) -> Plan:
    """Choose the way to compute inner products, from shapes alone, for `inner`, `gram` and `explain`.

    Args:
        of_all_pairs: True if every example is paired with every other, as in a Gram matrix.
    """
    f, f_ = _ordered(f, f_)
    if f.layout.disjoint(f_.layout) or is_nothing(f) or is_nothing(f_):
        return Plan("apart", f, f_)
    if isinstance(f_, Common):
        return Plan("direction", f, f_)
    if not (isinstance(f, Product) and isinstance(f_, Product)):
        return Plan("map", f, f_)
    if f_.kind == "Outer" and f.kind in ("Outer", "Rows") and f.layout.same_place(f_.layout.turned()):
        f_ = f_.turned()
    same = f.layout.same_place(f_.layout)
    if same:
        f, f_ = _as_matrix(f), _as_matrix(f_)
    through_positions = _gram_is_cheaper if of_all_pairs else _inner_is_cheaper
    pair = f.count(f.roles[0]) * f.positions * f_.positions
    if f.right is None or f_.right is None:
        plain = f_.right is not None and f_.row is None and not f_.windows
        return Plan("entries", f, f_, _dense_outer if plain else None)
    if same and not f.windows and not f_.windows:
        if f.row is not None and f_.row is not None:
            return Plan("positions", f, f_, _sorted_rows if pair > rows.PAIRS else _rows_rows, pair)
        if f.row is not None:
            return Plan("positions", f, f_, _rows_outer, pair)
        if through_positions(f, f_):
            return Plan("sides" if f.positions == f_.positions == 1 else "positions", f, f_, _outer_outer, pair)
    return Plan("matrix", f, f_)


def as_matrices(leaf: Sequence[Factor]) -> tuple[Product, ...]:
    """One parameter's factors as matrices, if their sum takes fewer operations for its norm than their positions do.

    Their sum is then no larger than the factors. () if it takes more, or if they are not all products in one place.
    """
    products = [f for f in leaf if isinstance(f, Product) and f.kind == "Outer"]
    if len(products) < len(leaf) or not all(f.layout.same_place(products[0].layout) for f in products):
        return ()
    T, (_, F, K) = sum(f.positions for f in products), products[0].layout.matrix
    return () if T * T * (F + K) <= (T + 1) * F * K else tuple(map(_as_matrix, products))


def inner(f: Factor, f_: Factor) -> Float[Array, " B"]:
    """⟨f_b, f′_b⟩ of every example, in the accumulator's dtype."""
    acc = accumulator(f, f_)
    f, f_ = (for_products(o, acc) for o in (f, f_))
    windows = [at_once(w) for w in (f, f_) if isinstance(w, Product) and w.windows]
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
    if all(isinstance(w, Product) and w.windows and _smaller_unfolded(w) for w in (f, f_)):
        return gram(_unfolded(f), _unfolded(f_))
    way, f, f_, each, pair = plan(f, f_, of_all_pairs=True)
    if way == "apart":
        return jnp.zeros((_count(f), _count(f_)), acc)
    if isinstance(f_, Common):
        return dot(f, f_.array.value)[:, None] * every_example(f_.number.astype(acc))[None, :]
    f_ = every_example(f_)  # only factors are communicated between devices, never materialized gradients
    if not (isinstance(f, Product) and isinstance(f_, Product)):
        return _written_out_blocks(f, f_)
    if way == "sides" and f.count(f.roles[0]) == 1:  # two matrix products
        (left, right), (left_, right_) = f.sides(), f_.sides()
        return _product(left, left_, acc) * _product(right, right_, acc)
    if way == "matrix" and all(o.row is None and not o.windows for o in (f, f_)) and f.layout.same_place(f_.layout):
        return _through_matrix(f, f_)
    if way == "positions" and f.row is not None and f_.row is not None and _tables_are_cheaper(f, f_):
        return rows.gram(Lookup.of(f), Lookup.of(f_))
    if way == "entries" and f.right is None and f_.right is None and f.layout.same_place(f_.layout):
        return _product(f.sides()[0], f_.sides()[0], acc)
    if pair and each is not None:
        return _by_blocks(_rows_rows if each is _sorted_rows else each, f, f_, 2 * pair * acc.itemsize)
    return _written_out_blocks(f, f_)


def plan_name(f: Factor, f_: Factor) -> str:
    """The `Plan.way` by which `inner` computes; convolutions are treated as unfolded."""
    f, f_ = (jax.eval_shape(_unfolded, o) for o in (f, f_))
    return plan(f, f_).way


# --- Which way ---------------------------------------------------------------------------------------------------


def _count(f: Factor) -> int:
    return of_examples(f)[0].shape[0]


def _ordered(f: Factor, f_: Factor) -> tuple[Factor, Factor]:
    """Order as Mapped, Dense, Rows, Outer, Windows, Common, so that each pair of kinds is handled in one place."""
    order = ("Mapped", "Dense", "Rows", "Outer", "Windows", "Common")
    return (f, f_) if order.index(f.kind) <= order.index(f_.kind) else (f_, f)


def _unfolded(f: Factor) -> Factor:
    return unfolded(f) if isinstance(f, Product) and f.windows else f


def _smaller_unfolded(f: Product) -> bool:
    """True if it holds fewer numbers unfolded than the gradient that it stands for."""
    return unfolded_shape(f).held < f.layout.size


def _as_matrix(f: Product) -> Product:
    """The product in a [G, F, K] parameter, so that nothing is moved or padded."""
    G, _, F, K = f.roles
    place = tuple(axis_of(labels, f.sizes) for labels in (G, F, K))
    return dataclasses.replace(f, place=place)


def _inner_is_cheaper(f: Product, f_: Product) -> bool:
    T, S, (_, F, K) = f.positions, f_.positions, f.layout.matrix
    return T * S * (F + K) <= (T + S) * F * K + F * K


def _gram_is_cheaper(f: Product, f_: Product) -> bool:
    T, S, (_, F, K) = f.positions, f_.positions, f.layout.matrix
    B, C = expected(_count(f)), expected(_count(f_))
    return B * C * T * S * (F + K) <= (B * T + C * S + B * C) * F * K


def _tables_are_cheaper(f: Product, f_: Product) -> bool:
    ids, ids_ = (expected(_count(o)) * o.positions for o in (f, f_))
    return f.positions * f_.positions * expected(_count(f)) > ids + min(f.rows, ids + ids_)


# --- Through positions: each function takes paired examples -------------------------------------------------------


def _outer_outer(f: Product, f_: Product) -> Array:
    acc = accumulator(f, f_)
    if f.positions == f_.positions == 1:
        lefts, rights = (a.astype(acc) * b.astype(acc) for a, b in zip(f.sides(), f_.sides(), strict=True))
        B, G = lefts.shape[:2]
        lefts, rights = (a.reshape(B * G, a.shape[3]) for a in (lefts, rights))
        return (row_sums(lefts) * row_sums(rights)).reshape(B, G).sum(1)

    bytes_of_position = 2 * f.layout.matrix[0] * f_.positions * acc.itemsize
    tile = chunk_size(bytes_of_position, f.positions)  # T × S products may be too many even for one example
    size = chunk_size(f.positions * bytes_of_position, _count(f))
    return map_examples(lambda f, f_: _by_tiles(f.sides(), f_.sides(), tile, acc), size, f, f_)


def _by_tiles(sides: tuple[Array, Array], sides_: tuple[Array, Array], tile: int, acc: jnp.dtype) -> Array:
    """Σ_g Σ_ts (left_gt · left′_gs)(right_gt · right′_gs), `tile` positions t at a time."""

    def of_tile(start: Array | int, tile: int) -> Array:
        rows = [lax.dynamic_slice_in_dim(a, start, tile, 2) for a in sides]
        lefts = contracted("bgtf,bgsf->bgts", rows[0], sides_[0], acc)
        return row_sums(lefts * contracted("bgtk,bgsk->bgts", rows[1], sides_[1], acc))

    T = sides[0].shape[2]
    if tile >= T:
        return of_tile(0, T)
    total, _ = lax.scan(
        lambda total, k: (total + of_tile(k * tile, tile), None), of_tile(0, tile), jnp.arange(1, T // tile)
    )
    return total + of_tile(T // tile * tile, T % tile) if T % tile else total


def _sorted_rows(f: Product, f_: Product) -> Array:
    a, b = Lookup.of(f), Lookup.of(f_)
    return rows.inner(a, dataclasses.replace(b, ids=a.ids) if f_.left is f.left else b)


def _rows_rows(f: Product, f_: Product) -> Array:
    acc = accumulator(f, f_)

    def repeated(f: Lookup, f_: Lookup) -> Array:
        ids, ids_ = rows.of_one_dtype(f.ids, f_.ids)
        same = (ids[:, :, None] == ids_[:, None, :]) & f.inside[:, :, None]
        count = same.sum((1, 2))
        products = row_sums(f.values.astype(acc) * f_.values.astype(acc))
        return jnp.where(count > 0, count.astype(products.dtype) * products, jnp.zeros_like(products))

    def positions(f: Lookup, f_: Lookup) -> Array:
        (ids, values), (ids_, values_) = f.valid(), f_.valid()
        ids, ids_ = rows.of_one_dtype(ids, ids_)
        same = ids[:, :, None] == ids_[:, None, :]
        products = contracted("btk,bsk->bts", values, values_, acc)
        return row_sums(jnp.where(same, products, jnp.zeros_like(products)))

    size = chunk_size(2 * f.positions * f_.positions * acc.itemsize, _count(f))
    each = repeated if f.repeated and f_.repeated else positions
    return map_examples(each, size, Lookup.of(f), Lookup.of(f_))


def _rows_outer(f: Product, f_: Product) -> Array:
    """Σ_ts left′[s, id_t] (values_t · right′_s)."""
    acc = accumulator(f, f_)

    def positions(f: Product, f_: Product) -> Array:
        (ids, values), (left, right) = Lookup.of(f).valid(), f_.sides()
        picked = jnp.take_along_axis(left[:, 0], ids[:, None, :], axis=2)  # [B, S, T]
        return row_sums(picked.astype(acc) * contracted("bsk,btk->bst", right[:, 0], values, acc))

    size = chunk_size(2 * f.positions * f_.positions * acc.itemsize, _count(f))
    return map_examples(positions, size, f, f_)


def picks_rows(f: Factor, table: Factor) -> bool:
    """Whether f is an Outer whose rows are those of a table that is looked up, so that `picked_rows` applies."""
    if not (isinstance(f, Product) and isinstance(table, Product) and f.kind == "Outer" and table.row is not None):
        return False
    return any(table.layout.same_place(layout) for layout in (f.layout, f.layout.turned()))


def picked_rows(f: Product, table: Product) -> Float[Array, "B T K"]:
    """The rows of an Outer's matrices at the ids of a table's lookups; row 0 where an id is out of range."""
    acc = accumulator(f, table)

    def picked(f: Product, table: Product) -> Array:
        (ids, _), (left, right) = Lookup.of(table).valid(), f.sides()
        columns = jnp.take_along_axis(left[:, 0], ids[:, None, :], axis=2)  # [B, S, T]
        return contracted("bst,bsk->btk", columns, right[:, 0], acc)

    f = f if table.layout.same_place(f.layout) else f.turned()
    size = chunk_size(2 * f.positions * table.positions * acc.itemsize, _count(f))
    return map_examples(picked, size, for_products(f, acc), table)


def _dense_outer(f: Product, f_: Product) -> Array:
    """Σ_t left_tᵀ D right_t, without materializing the second product; D is materialized already."""
    acc, (_, F, K) = accumulator(f, f_), f_.layout.matrix

    def each(f: Product, f_: Product) -> Array:
        (left, right), D = f_.sides(), f_.layout.to_matrix(value(f))
        if F > K:  # contract with the longer side first
            return row_sums(right.astype(acc) * contracted("bgtf,bgfk->bgtk", left, D, acc))
        return row_sums(left.astype(acc) * contracted("bgtk,bgfk->bgtf", right, D, acc))

    size = chunk_size((f_.layout.size + math.prod(f_.left.shape[1:])) * acc.itemsize, _count(f))
    return map_examples(each, size, f, f_)


# --- Gram matrices by blocks -------------------------------------------------------------------------------------


def _product(a: Array, b: Array, dtype: jnp.dtype) -> Array:
    """[B, 1, 1, F], [C, 1, 1, F] → [B, C]."""
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


def _through_matrix(f: Product, f_: Product) -> Array:
    """gram through the matrices; one slice of G, F or K (the longest) is materialized at a time."""
    matrix, acc = f.layout.matrix, accumulator(f, f_)
    axis = max(range(3), key=matrix.__getitem__)
    sides, sides_ = f.sides(), f_.sides()
    if axis == 2:
        sides, sides_ = sides[::-1], sides_[::-1]
    each = (expected(_count(f)) + expected(_count(f_))) * (math.prod(matrix) // matrix[axis]) * acc.itemsize
    size = chunk_size(each, matrix[axis])

    def sliced(sides: tuple[Array, Array]) -> tuple[Array, ...]:  # the chosen axis first
        return tuple(jnp.moveaxis(a, 1, 0) for a in sides) if axis == 0 else (jnp.moveaxis(sides[0], 3, 0),)

    def part(slices: tuple[Array, ...], slices_: tuple[Array, ...]) -> Array:
        if axis == 0:
            P, P_ = (contracted("gbtf,gbtk->bgfk", a[0], a[1], acc) for a in (slices, slices_))
        else:
            both = ((slices, sides[1]), (slices_, sides_[1]))
            P, P_ = (contracted("fbgt,bgtk->bgfk", a[0], right, acc) for a, right in both)
        return lax.dot_general(P, P_, (((1, 2, 3), (1, 2, 3)), ((), ())))

    return sum_examples(part, size, sliced(sides), sliced(sides_), spread=False)


def _written_out_blocks(f: Factor, f_: Factor) -> Array:
    """gram of materialized gradients, a block of examples of each side at a time."""
    size = chunk_size(2 * f.layout.size * accumulator(f, f_).itemsize, max(expected(_count(f)), expected(_count(f_))))

    def matrix(f: Factor) -> Array:
        return written_out(f).reshape(_count(f), math.prod(f.layout.shape))

    def block(f: Factor) -> Array:
        G = matrix(f)
        return map_examples(lambda f_: lax.dot(matrix(f_), G.T), size, f_, spread=False).T

    return map_examples(block, size, f)
