"""The gradients of a table whose rows are looked up; equal ids are combined, found without a table."""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Integer

from jaxgrad.per_example.algebra.chunks import Blocks, expected, map_examples
from jaxgrad.per_example.algebra.product import Product
from jaxgrad.per_example.algebra.scales import row_sums
from jaxgrad.precision import index_dtype, joined, working_dtype

PAIRS = 64 * 64  # up to this many pairs of positions, comparing each pair is as fast as sorting


TABLE_BYTES = 2 * 2**20
"""How many bytes of tables are materialized at once on a processor: about the size of its cache."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=("ids", "values"), meta_fields=("rows",))
@dataclass(frozen=True)
class Lookup:
    """The sides of a lookup as [B, T] and [B, T, K], or [B, 1, K] for values that are the same at all positions."""

    ids: Any
    values: Any
    rows: int

    @staticmethod
    def of(f: Product) -> "Lookup":
        """The sides of a product whose left side is seen through ids."""
        B, K, T = f.left.shape[0], f.count(f.roles[3]), f.positions
        return Lookup(f.left.reshape(B, T), f.right.reshape(B, 1 if f.repeated else T, K), f.rows)

    @property
    def repeated(self) -> bool:
        """True if the values are held once for several positions."""
        return self.values.shape[1] != self.ids.shape[1]

    @property
    def inside(self) -> Array:
        """[B, T]: True where the id is a row of the table."""
        return (self.ids >= 0) & (self.ids < self.rows)

    def valid(self) -> tuple[Array, Array]:
        """(ids, values [B, T, K]) with every id in range: ids out of range become 0, with values 0."""
        values = jnp.where(self.inside[..., None], self.values, jnp.zeros_like(self.values))
        return jnp.where(self.inside, self.ids, jnp.zeros_like(self.ids)), values

    def used(self) -> Array:
        """The values, 0 where no id is in range."""
        inside = self.inside.any(1, keepdims=True) if self.repeated else self.inside
        return jnp.where(inside[..., None], self.values, jnp.zeros_like(self.values))


def with_values(f: Product, ids: Array, values: Array) -> Product:
    """The lookup with values of their own at every position."""
    K = f.roles[3]
    sizes = (*f.sizes, ids.shape[1])
    T = len(f.sizes)
    values = values.reshape(*ids.shape, *(f.sizes[x] for x in K))
    return dataclasses.replace(f, left=ids, right=values, left_labels=(T,), right_labels=(T, *K), sizes=sizes)


def inner(f: Lookup, f_: Lookup) -> Float[Array, " B"]:
    """⟨f_b, f′_b⟩: sort the ids of each example and sum the values of equal ids. Cost: (T + S)(K + log(T + S))."""
    if f.ids is f_.ids:
        place = place_ = _places(f.ids)
    else:
        place, place_ = jnp.split(_places(joined([f.ids, f_.ids], 1)), [f.ids.shape[1]], axis=1)
    count = f.ids.shape[1] if f.ids is f_.ids else f.ids.shape[1] + f_.ids.shape[1]
    return row_sums(_summed(f, place, count) * _summed(f_, place_, count))


def gram(f: Lookup, f_: Lookup) -> Float[Array, "B C"]:
    """⟨f_b, f′_c⟩: read the table of each example c at the ids of all examples b. Cost: C(U + B·T)K.

    U is the number of rows, or the number of positions if that is smaller. A few tables are materialized at a time.
    """
    positions = sum(expected(o.ids.shape[0]) * o.ids.shape[1] for o in (f, f_))
    if isinstance(f.ids.shape[0], int) and positions < f.rows:
        f, f_ = _compact(f, f_)
    ids, values = f.valid()
    acc = working_dtype(values.dtype, f_.values.dtype)
    values = values.astype(acc)

    def columns(f_: Lookup) -> Array:
        tables = jax.vmap(
            lambda ids, values: jnp.zeros((f_.rows, f_.values.shape[2]), acc).at[ids].add(values.astype(acc))
        )
        return jax.vmap(lambda table: row_sums(values * table[ids]))(tables(*f_.valid()))

    read = expected(ids.shape[0]) * ids.shape[1]
    each = (f_.rows + read) * values.shape[2] * values.dtype.itemsize
    return map_examples(columns, Blocks.of(each, f_.ids.shape[0], TABLE_BYTES), f_, spread=False).T


def merged(f: Lookup) -> Lookup:
    """The same gradients with every id of an example once; positions that are left over get row 0 with values 0."""
    ids, _ = f.valid()
    place, T = _places(f.ids), f.ids.shape[1]
    unique = jax.vmap(lambda place, ids: jnp.zeros_like(ids).at[place].max(ids))(place, ids)
    return Lookup(unique, _summed(f, place, T), f.rows)


def _compact(f: Lookup, f_: Lookup) -> tuple[Lookup, Lookup]:
    """Replace the table's rows by as many rows as there are positions; each id becomes its rank among all ids."""
    sizes = [o.ids.shape for o in (f, f_)]
    ids = [jnp.where(o.inside, o.ids, -jnp.ones_like(o.ids)).ravel() for o in (f, f_)]
    ranks = _places(joined(ids)[None])[0]
    parts = jnp.split(ranks, [ids[0].size])
    rows = [
        Lookup(jnp.where(o.inside, part.reshape(size), -jnp.ones(size, part.dtype)), o.values, ranks.size)
        for o, part, size in zip((f, f_), parts, sizes, strict=True)
    ]
    return rows[0], rows[1]


def _places(ids: Integer[Array, "B T"]) -> Integer[Array, "B T"]:
    """A place 0 ≤ place < T for every id; within an example, ids have the same place exactly if they are equal."""
    order = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
    ids, order = lax.sort((ids, order), num_keys=1)
    rank = jnp.cumsum(jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0))), 1, dtype=jnp.int32)[:, : ids.shape[1]]
    return jax.vmap(lambda order, rank: jnp.zeros_like(rank).at[order].set(rank, unique_indices=True))(order, rank)


def _summed(f: Lookup, place: Integer[Array, "B T"], count: int) -> Float[Array, "B {count} K"]:
    """Sum the values at each place, in float32 or wider."""
    acc = working_dtype(f.values.dtype)
    if f.repeated:
        times = jax.vmap(lambda place, inside: jnp.zeros(count, acc).at[place].add(inside))(
            place, f.inside.astype(acc)
        )[..., None]
        return jnp.where(times > 0, times * f.values.astype(acc), jnp.zeros_like(f.values, acc))
    values = f.valid()[1].astype(acc)
    zeros = jnp.zeros((count, values.shape[2]), values.dtype)
    return jax.vmap(lambda place, values: zeros.at[place].add(values))(place, values)


def of_one_dtype(*ids: Array) -> list[Array]:
    """Convert ids to one dtype, so that they can be compared."""
    dtype = index_dtype(*(a.dtype for a in ids))
    return [a.astype(dtype) for a in ids]
