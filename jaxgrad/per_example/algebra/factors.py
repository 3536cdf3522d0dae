"""The kinds of factors that stand for the gradients of one parameter: B × parameter numbers, held as products.

Index legend, here and in `pairs`: B example, G group (heads, stacked layers), T position within the example, F fan-out,
K fan-in; a prime (or the letters C, S) marks the second operand.

A factor stands for a [G, F, K] array per example, called the *matrix layout*; its `Layout` says where each of these
entries is in the parameter's own shape. A parameter's gradient is a sum of factors.

    Outer(left [B,G,T,F], right [B,G,T,K])   Σ_t left ⊗ right: any weight that enters through a matrix product
    Rows(ids [B,T], values [B,T,K])          values added to rows of an [F, K] table: an embedding
    Windows(left, image)                     an Outer whose right side is the windows of an image: a convolution
    Dense(value [B, *shape])                 materialized gradients: biases, scales, anything small
    Mapped(inputs, shared)                   a linear map, shared by all examples, of other factors (`mapped`)
    Common(number [B], array)                one array shared by all examples, times one number per example (`mapped`)
"""

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxgrad.per_example.algebra.chunks import Blocks, map_examples
from jaxgrad.per_example.algebra.layout import Layout
from jaxgrad.per_example.algebra.mapped import Common, Mapped, Same, map_examples_of, of_examples
from jaxgrad.per_example.algebra.scales import largest, nearest_power, power_of_two, row_sums
from jaxgrad.per_example.algebra.windows import Unfolding
from jaxgrad.precision import added, contracted, working_dtype
from jaxgrad.sharding import kept


def _factor(*arrays: str) -> Any:
    return functools.partial(jax.tree_util.register_dataclass, data_fields=arrays, meta_fields=("layout",))


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("left", "right"), meta_fields=("layout", "positions_first")
)
@dataclass(frozen=True)
class Outer:
    """Σ_t left[b,g,t,:] ⊗ right[b,g,t,:]: the gradient of a weight that enters through a matrix product.

    Attributes:
        left: [B, G, T, F], floating.
        right: [B, G, T, K], floating.
        layout: where the entries of [G, F, K] are in the parameter.
        positions_first: True if sums over examples and positions run over the positions first, which is the order of
            both sides in memory if a loop produced them step by step. The sums are the same.

    Example:
        >>> f = Outer.of_matrix(jnp.ones((4, 3)), jnp.ones((4, 2)), jnp.float32)
        >>> f.left.shape, f.right.shape, f.layout.shape
        ((4, 1, 1, 3), (4, 1, 1, 2), (3, 2))
    """

    left: Any  # an Array, or its jax.ShapeDtypeStruct
    right: Any
    layout: Layout
    positions_first: bool = False

    @staticmethod
    def of_matrix(left: Array, right: Array, dtype: jax.typing.DTypeLike) -> "Outer":
        """From left [B, F] and right [B, K]: one product per example, for an [F, K] parameter of `dtype`."""
        layout = Layout.of_matrix(left.shape[1], right.shape[1], dtype)
        return Outer(left[:, None, None], right[:, None, None], layout)


@_factor("ids", "values")
@dataclass(frozen=True)
class Rows:
    """values[b,t,:] added to row ids[b,t]: the gradient of an embedding table. Repeated ids add up.

    Attributes:
        ids: [B, T], integer; an id outside 0 ≤ id < F (a padding id) contributes nothing.
        values: [B, T, K], floating; or [B, 1, K] if they are the same at all positions (a mean of embeddings).
        layout: where the entries of [1, F, K] are in the parameter; F is the number of rows.

    Example:
        >>> f = Rows.of_table(jnp.array([[0, 2], [2, 2]]), jnp.ones((2, 2, 3)), rows=5, dtype=jnp.float32)
        >>> f.rows, f.layout.shape
        (5, (5, 3))
    """

    ids: Any
    values: Any
    layout: Layout

    @staticmethod
    def of_table(ids: Array, values: Array, rows: int, dtype: jax.typing.DTypeLike) -> "Rows":
        """Make the Rows of a parameter that is a [rows, K] table of `dtype`."""
        return Rows(ids, values, Layout.of_matrix(rows, values.shape[2], dtype))

    @property
    def rows(self) -> int:
        """F, the number of rows of the table."""
        return self.layout.matrix[1]

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

    def at_each_position(self) -> "Rows":
        """The same gradients with values [B, T, K]."""
        if not self.repeated:
            return self
        return Rows(self.ids, jnp.broadcast_to(self.values, (*self.ids.shape, self.values.shape[2])), self.layout)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("left", "image"), meta_fields=("unfolding", "layout"))
@dataclass(frozen=True)
class Windows:
    """An `Outer` whose right side is the image's windows: the gradient of a convolution's kernel.

    Attributes:
        left: [B, …], floating: the cotangents.
        image: [B, …], floating.
        unfolding: how these two become the sides of an Outer.
        layout: where the entries of [G, F, K] are in the parameter.

    Example:
        >>> loss = lambda kernel, x: jnp.sin(jax.lax.conv(x[None], kernel, (1, 1), "VALID")).sum()
        >>> f = jg.per_example_grad(loss)(jnp.ones((64, 32, 3, 3)), jnp.ones((2, 32, 8, 8))).factors[0]
        >>> type(f).__name__, f.image.size, f.unfolded().right.size
        ('Windows', 4096, 20736)
    """

    left: Any
    image: Any
    unfolding: Unfolding
    layout: Layout

    def unfolded(self) -> Outer:
        """The Outer it stands for, whose right side is larger than the image by the number of places in a window."""
        return Outer(*self.unfolding.sides(self.left, self.image), self.layout)

    @property
    def at_once(self) -> Blocks:
        """Number of examples that are unfolded at once."""
        return self.unfolding.at_once(self.left.shape[0], self.left, self.image)


@_factor("value")
@dataclass(frozen=True)
class Dense:
    """The materialized gradients.

    Attributes:
        value: [B, *shape], floating.
        layout: the parameter's shape and dtype; its matrix is (1, 1, size).

    Example:
        >>> Dense.of(jnp.ones((4, 3)), jnp.float32).layout.shape
        (3,)
    """

    value: Any
    layout: Layout

    @staticmethod
    def of(value: Array, dtype: jax.typing.DTypeLike) -> "Dense":
        """From value [B, *shape], for a parameter of that shape and of `dtype`."""
        shape = tuple(value.shape[1:])
        return Dense(value, Layout(shape, jnp.dtype(dtype), tuple(range(len(shape))), (1, 1, math.prod(shape))))


Factor = Outer | Rows | Windows | Dense | Mapped | Common
"""Any kind of factor."""


def arrays(f: Factor) -> list[Any]:
    """The arrays a factor holds."""
    return jax.tree.leaves(f)


def is_nothing(f: Factor) -> bool:
    """True for a product without positions, which is zero: the gradient of an unused parameter."""
    return isinstance(f, Outer) and f.left.shape[2] == 0


def accumulator(*factors: Factor) -> jnp.dtype:
    """float64 if any dtype in the factors is float64, otherwise float32."""
    floating = (a.dtype for f in factors for a in arrays(f) if jnp.issubdtype(a.dtype, jnp.floating))
    return working_dtype(*floating, *(f.layout.dtype for f in factors))


def wide(f: Factor, dtype: jnp.dtype) -> Factor:
    """The factor with its floating arrays in `dtype`, and its complex arrays in the complex dtype of that precision."""
    return jax.tree.map(lambda a: _wide(a, dtype), f)


def for_products(f: Factor, dtype: jnp.dtype) -> Factor:
    """As `wide`, but arrays of bfloat16 stay as they are for float32: `contracted` multiplies them exactly."""
    exact = jnp.bfloat16 if dtype == jnp.float32 else None
    return jax.tree.map(lambda a: a if a.dtype == exact else _wide(a, dtype), f)


def _wide(a: Array, dtype: jnp.dtype) -> Array:
    if jnp.issubdtype(a.dtype, jnp.complexfloating):
        return a.astype(working_dtype(dtype, jnp.complex64))
    return a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a


def scale(f: Factor, c: Any) -> Factor:
    """c_b times example b, in float32 at least. Of two arrays, the smaller one is multiplied."""
    acc = accumulator(f)
    return times(wide(f, acc), c.astype(acc))


def scale_by_powers(f: Factor, c: Any) -> Factor:
    """c_b times example b for powers of two c, which rounds nothing: arrays of bfloat16 stay so."""
    acc = accumulator(f)
    return times(for_products(f, acc), c.astype(acc))


def times(f: Factor, c: Array) -> Factor:
    """c_b times example b; the arrays keep their dtypes."""

    def product(a: Array) -> Array:
        return (_examples(c, a) * a.astype(working_dtype(c.dtype, a.dtype))).astype(a.dtype)

    match f:
        case Outer(left, right) if left.size <= right.size:
            return dataclasses.replace(f, left=product(left))
        case Outer(_, right):
            return dataclasses.replace(f, right=product(right))
        case Rows(ids, values, layout):
            return Rows(ids, product(values), layout)
        case Windows(left, image, _, _) if left.size <= image.size:
            return dataclasses.replace(f, left=product(left))
        case Windows(_, image, _, _):
            return dataclasses.replace(f, image=product(image))
        case Common(number):
            return dataclasses.replace(f, number=product(number))
        case Mapped(inputs):
            return dataclasses.replace(f, inputs=tuple(tuple(times(part, c) for part in parts) for parts in inputs))
        case Dense(value, layout):
            return Dense(product(value), layout)


def where(f: Factor, mask: Float[Array, " B"] | Array) -> Factor:
    """The factor with all arrays of the examples whose mask is False set to exactly zero, even if they hold NaN."""
    return map_examples_of(lambda a: kept(mask, a), f)


def _examples(c: Array, like: Array) -> Array:
    return c.reshape(-1, *[1] * (like.ndim - 1))


def materialize(f: Factor) -> Array:
    """[B, *shape] in the parameter's dtype, accumulated in float32 at least: B × parameter numbers."""
    return written_out(f).astype(f.layout.dtype)


def written_out(f: Factor) -> Array:
    """[B, *shape] in the accumulator's dtype."""
    acc = accumulator(f)
    match f:
        case Outer(left, right, layout):
            return layout.from_matrix(contracted("bgtf,bgtk->bgfk", left, right, acc))
        case Rows() as rows:

            def table(ids: Array, values: Array) -> Array:
                return jnp.zeros(rows.layout.matrix[1:], acc).at[ids].add(values.astype(acc))

            return rows.layout.from_matrix(jax.vmap(table)(*rows.valid())[:, None])
        case Windows() as windows:
            return map_examples(lambda w: written_out(w.unfolded()), windows.at_once, windows)
        case Common(number, array):
            shared = array.value[None].astype(acc)
            return _examples(number.astype(acc), shared) * shared
        case Mapped(inputs) as mapped:
            whole = [added([written_out(part) for part in parts]) for parts in inputs]
            return jax.vmap(lambda xs: mapped.apply(xs))([a.astype(acc) for a in whole]).astype(acc)
        case Dense(value, _):
            return value.astype(acc)


def dot(f: Factor, V: Array) -> Float[Array, " B"]:
    """⟨gradient of example b, V⟩ for a V of the parameter's shape, in the accumulator's dtype.

    Cost: an Outer takes B·G·T·F·K operations, and no array larger than a factor's.
    """
    acc = accumulator(f)
    if isinstance(f, Windows):
        return map_examples(lambda w: dot(w.unfolded(), V), f.at_once, f)
    if isinstance(f, Common):
        return f.number.astype(acc) * jnp.vdot(f.array.value.astype(acc), V.astype(acc))
    if isinstance(f, Mapped):
        pairs = zip(f.inputs, f.back(V.astype(acc)), strict=True)
        return added([dot(part, v) for parts, v in pairs for part in parts])
    V = f.layout.to_matrix(V if V.dtype == jnp.bfloat16 else V.astype(acc))
    match f:
        case Outer(left, right, layout) if layout.matrix[1] <= layout.matrix[2]:
            return row_sums(left.astype(acc) * contracted("bgtk,gfk->bgtf", right, V, acc))
        case Outer(left, right, _):
            return row_sums(right.astype(acc) * contracted("bgtf,gfk->bgtk", left, V, acc))
        case Rows() as rows:
            ids, values = rows.valid()
            return row_sums(values.astype(acc) * V[0][ids].astype(acc))
        case Dense(value, layout):
            return contracted("bk,k->b", value.reshape(value.shape[0], layout.size), V.ravel(), acc)


def scaled_by_power_of_two(f: Factor) -> tuple[Factor, Float[Array, " B"]]:
    """(f / unit, unit): every example is scaled to near 1, so that no square overflows or underflows; unit is 0
    where f is 0.

    In an Outer every position and side has its own unit; if one side is huge and the other tiny, their product counts.
    Nothing is rounded, so arrays of bfloat16 stay so.
    """
    acc = accumulator(f)
    f = for_products(f, acc)

    def scaled(a: Array, most: Array) -> tuple[Array, Array]:
        return a / _examples(power_of_two(most), a).astype(a.dtype), nearest_power(most).astype(acc)

    match f:
        case Outer(left, right):
            most = (jnp.abs(lax.stop_gradient(side)).max(3, initial=0) for side in (left, right))
            a, b = (nearest_power(m).astype(acc) for m in most)  # [B, G, T]
            products = a * b
            total = products.max((1, 2), initial=0)
            unit = jnp.where(jnp.isinf(total), total, nearest_power(total))  # a norm that is too large is infinite
            each = _examples(jnp.where(unit == 0, jnp.ones_like(unit), unit), products)
            share = jnp.where(jnp.isinf(products), jnp.ones_like(products), products / each)
            left, right = (a_ / power_of_two(of)[..., None].astype(a_.dtype) for a_, of in ((left, a), (right, b)))
            return dataclasses.replace(f, left=left * share[..., None].astype(left.dtype), right=right), unit
        case Rows(ids, values, layout):  # values at padding ids do not count
            used = f.inside.any(1, keepdims=True) if f.repeated else f.inside
            values = jnp.where(used[..., None], values, jnp.zeros_like(values))
            values, unit = scaled(values, largest(values))
            return Rows(ids, values, layout), unit
        case Windows(left, image, _, _):  # exact maxima: their product is no larger than the norm can be
            sides = [jnp.abs(lax.stop_gradient(a)).max(tuple(range(1, a.ndim)), initial=0) for a in (left, image)]
            (left, a), (image, b) = scaled(left, sides[0]), scaled(image, sides[1])
            return dataclasses.replace(f, left=left, image=image), a * b
        case Common(number, array, layout):
            number, unit = scaled(number.astype(acc), jnp.abs(lax.stop_gradient(number.astype(acc))))
            shared = array.value.astype(acc)
            top = jnp.abs(lax.stop_gradient(shared)).max(initial=0)
            return Common(number, Same(shared / power_of_two(top)), layout), unit * nearest_power(top)
        case Mapped():
            return f, jnp.ones_like(of_examples(f)[0], accumulator(f), shape=of_examples(f)[0].shape[:1])
        case Dense(value, layout):
            value, unit = scaled(value, largest(value))
            return Dense(value, layout), unit
