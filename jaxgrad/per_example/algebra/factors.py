"""What is asked of one factor of a batch: a `Product`, or one that the examples share (`Mapped`, `Common`).

A factor stands for an array of the parameter's shape per example. A parameter's gradient is a sum of factors.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxgrad.per_example.algebra import product
from jaxgrad.per_example.algebra.chunks import Blocks, map_examples
from jaxgrad.per_example.algebra.mapped import Common, Mapped, Same, map_examples_of, of_examples
from jaxgrad.per_example.algebra.product import Product
from jaxgrad.per_example.algebra.rows import Lookup
from jaxgrad.per_example.algebra.scales import largest, nearest_power, power_of_two, row_sums
from jaxgrad.precision import added, contracted, working_dtype
from jaxgrad.sharding import kept

Factor = Product | Mapped | Common
"""Any kind of factor."""

UNFOLDED_BYTES = 2 * 2**20
"""How many bytes are unfolded at once on a processor: about the size of its cache."""


def arrays(f: Factor) -> list[Any]:
    """The arrays a factor holds."""
    return jax.tree.leaves(f)


def shown(f: Factor, dtypes: bool = False) -> str:
    """The kind, and the shapes of the arrays held."""
    shapes = ", ".join(f"{a.dtype.name if dtypes else ''}{list(a.shape)}" for a in arrays(f))
    return f"{f.kind}({shapes})"


def is_nothing(f: Factor) -> bool:
    """True for a product without positions, which is zero: the gradient of an unused parameter."""
    return isinstance(f, Product) and f.positions == 0


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
    """c_b times example b, in float32 or wider. Of two arrays, the smaller one is multiplied."""
    acc = accumulator(f)
    return times(wide(f, acc), c.astype(acc))


def scale_by_powers(f: Factor, c: Any, squared: bool = False) -> Factor:
    """c_b times example b for powers of two c, which rounds nothing: arrays of bfloat16 stay so.

    Args:
        f: the factor.
        c: [B], powers of two.
        squared: whether each side is to be multiplied by itself: then each gets half of the power, lest one side's
            products overflow where the other's underflow.
    """
    acc = accumulator(f)
    f, c = for_products(f, acc), c.astype(acc)
    if not (squared and isinstance(f, Product) and f.right is not None and f.row is None):
        return times(f, c)
    half = power_of_two(jnp.sqrt(c))
    return dataclasses.replace(f, left=scaled_array(f.left, half), right=scaled_array(f.right, c / half))


def scaled_array(a: Array, c: Array) -> Array:
    """c_b times example b of an array, in the array's dtype."""
    return (_examples(c, a) * a.astype(working_dtype(c.dtype, a.dtype))).astype(a.dtype)


def times(f: Factor, c: Array) -> Factor:
    """c_b times example b; the arrays keep their dtypes."""

    def scaled(a: Array) -> Array:
        return scaled_array(a, c)

    match f:
        case Common(number):
            return dataclasses.replace(f, number=scaled(number))
        case Mapped(inputs):
            return dataclasses.replace(f, inputs=tuple(tuple(times(part, c) for part in parts) for parts in inputs))
    if f.right is None or (f.row is None and f.left.size <= f.right.size):
        return dataclasses.replace(f, left=scaled(f.left))
    return dataclasses.replace(f, right=scaled(f.right))


def where(f: Factor, mask: Float[Array, " B"] | Array) -> Factor:
    """The factor with all arrays of the examples whose mask is False set to exactly zero, even if they hold NaN."""
    return map_examples_of(lambda a: kept(mask, a), f)


def _examples(c: Array, like: Array) -> Array:
    return c.reshape(-1, *[1] * (like.ndim - 1))


def written_out(f: Factor) -> Array:
    """[B, *shape] in the accumulator's dtype."""
    acc = accumulator(f)
    match f:
        case Common(number, array):
            shared = array.value[None].astype(acc)
            return _examples(number.astype(acc), shared) * shared
        case Mapped(inputs) as mapped:
            whole = [added([written_out(part) for part in parts]) for parts in inputs]
            return jax.vmap(lambda xs: mapped.apply(xs))([a.astype(acc) for a in whole]).astype(acc)
    if f.windows:
        return map_examples(lambda w: written_out(unfolded(w)), at_once(f), f)
    if f.right is None:
        return value(f).astype(acc)
    return jax.vmap(lambda f: product.form(f, acc))(for_products(f, acc))


def value(f: Product) -> Array:
    """[B, *shape] of materialized gradients, in their own dtype."""
    assert f.right is None
    return f.layout.from_matrix(f.left.reshape(f.left.shape[0], *f.layout.matrix))


def dot(f: Factor, V: Array) -> Float[Array, " B"]:
    """⟨gradient of example b, V⟩ for a V of the parameter's shape, in the accumulator's dtype.

    Cost: an Outer takes B·G·T·F·K operations, and no array larger than a factor's.
    """
    acc = accumulator(f)
    if isinstance(f, Common):
        return f.number.astype(acc) * jnp.vdot(f.array.value.astype(acc), V.astype(acc))
    if isinstance(f, Mapped):
        pairs = zip(f.inputs, f.back(V.astype(acc)), strict=True)
        return added([dot(part, v) for parts, v in pairs for part in parts])
    if is_nothing(f):
        return jnp.zeros(f.left.shape[0], acc)
    if f.windows:
        return map_examples(lambda w: dot(unfolded(w), V), at_once(f), f)
    V = f.layout.to_matrix(V if V.dtype == jnp.bfloat16 else V.astype(acc))
    if f.row is not None:
        ids, values = Lookup.of(f).valid()
        return row_sums(values.astype(acc) * V[0][ids].astype(acc))
    (left, right), (_, F, K) = f.sides(), f.layout.matrix
    if f.right is None:
        return contracted("bk,k->b", left.reshape(left.shape[0], F), V.ravel(), acc)
    if F <= K:
        return row_sums(left.astype(acc) * contracted("bgtk,gfk->bgtf", right, V, acc))
    return row_sums(right.astype(acc) * contracted("bgtf,gfk->bgtk", left, V, acc))


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
        case Common(number, array, layout):
            number, unit = scaled(number.astype(acc), jnp.abs(lax.stop_gradient(number.astype(acc))))
            shared = array.value.astype(acc)
            top = jnp.abs(lax.stop_gradient(shared)).max(initial=0)
            return Common(number, Same(shared / power_of_two(top)), layout), unit * nearest_power(top)
        case Mapped():
            return f, jnp.ones_like(of_examples(f)[0], accumulator(f), shape=of_examples(f)[0].shape[:1])
        case Product(right=None):
            value, unit = scaled(f.left, largest(f.left))
            return dataclasses.replace(f, left=value), unit
        case Product(row=int()):  # values at padding ids do not count
            value, unit = scaled(f.right, largest(Lookup.of(f).used()))
            return dataclasses.replace(f, right=value), unit
        case Product(windows=()):
            left, right = f.sides()
            most = (jnp.abs(lax.stop_gradient(side)).max(3, initial=0) for side in (left, right))
            a, b = (nearest_power(m).astype(acc) for m in most)  # [B, G, T]
            products = a * b
            total = products.max((1, 2), initial=0)
            unit = jnp.where(jnp.isinf(total), total, nearest_power(total))  # a norm that is too large is infinite
            each = _examples(jnp.where(unit == 0, jnp.ones_like(unit), unit), products)
            share = jnp.where(jnp.isinf(products), jnp.ones_like(products), products / each)
            left, right = (a_ / power_of_two(of)[..., None].astype(a_.dtype) for a_, of in ((left, a), (right, b)))
            return f.with_sides(left * share[..., None].astype(left.dtype), right), unit
    # A convolution. Exact maxima: their product is no larger than the norm can be.
    sides = [jnp.abs(lax.stop_gradient(a)).max(tuple(range(1, a.ndim)), initial=0) for a in (f.left, f.right)]
    (left, a), (image, b) = scaled(f.left, sides[0]), scaled(f.right, sides[1])
    return dataclasses.replace(f, left=left, right=image), a * b


# --- Convolutions --------------------------------------------------------------------------------------------------


def unfolded(f: Product) -> Product:
    """The product with its windows unfolded: its right side is larger than the image by the number of places."""
    return jax.vmap(product.unfolded)(f)


def at_once(f: Product) -> Blocks:
    """How many examples to unfold at once."""
    right = unfolded_shape(f).right
    return Blocks.of(right.size * right.dtype.itemsize, f.left.shape[0], UNFOLDED_BYTES)


def unfolded_shape(f: Product) -> Product:
    """One example of `unfolded`, as shapes."""
    one: Product = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), f)
    return jax.eval_shape(product.unfolded, one)


def convolved(f: Product) -> Array:
    """Σ_b Σ_t left ⊗ right [G, F, K] of a product with windows, by one convolution over examples and positions."""
    (G, T, F, K), B, windows = f.roles, f.left.shape[0], [w.window for w in f.windows]
    C = tuple(x for x in T if x in f.right_labels)
    positions = tuple(w.position for w in f.windows if w.position in T)
    axes = tuple(w.axis for w in f.windows)
    N = tuple(x for x in K if x in f.right_labels)
    left, image = (
        a.reshape(B, *(f.sizes[x] for x in labels)).transpose(0, *(1 + labels.index(x) for x in order))
        for a, labels, order in (
            (f.left, f.left_labels, (*G, *C, *positions, *F)),
            (f.right, f.right_labels, (*G, *C, *axes, *N)),
        )
    )
    g, c = f.count(G), f.count(C)
    left = left.reshape(B, g, c, *(w.positions for w in windows), f.count(F))
    image = image.reshape(B, g, c, *(f.sizes[x] for x in axes), f.count(N))
    image = jnp.moveaxis(image, 1, 0).reshape(g * B * c, *image.shape[3:])
    left = jnp.moveaxis(left, 1, -2).reshape(B * c, *left.shape[3:-1], g * left.shape[-1])
    last = 1 + len(windows)
    total = lax.conv_general_dilated(
        image,
        left,
        window_strides=[w.stride for w in windows],
        padding=[w.padding[:2] for w in windows],
        lhs_dilation=[w.padding[2] + 1 for w in windows],
        rhs_dilation=[w.dilation for w in windows],
        dimension_numbers=lax.ConvDimensionNumbers(
            (last, 0, *range(1, last)), (last, 0, *range(1, last)), (last - 1, last, *range(last - 1))
        ),
        feature_group_count=g,
        preferred_element_type=working_dtype(image.dtype, left.dtype),
    )
    return total.reshape(math.prod(total.shape[:-1]), g, f.count(F)).transpose(1, 2, 0)
