"""The gradients of one parameter: a sum of factors, times one number per example."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxgrad.per_example.algebra import factors, inner_products, moments, norms, weighted
from jaxgrad.per_example.algebra.arrangement import with_positions
from jaxgrad.per_example.algebra.factors import Factor
from jaxgrad.per_example.algebra.layout import Layout
from jaxgrad.per_example.algebra.mapped import Common, Mapped, Same, of_examples
from jaxgrad.per_example.algebra.product import Product
from jaxgrad.per_example.algebra.scales import power_of_two
from jaxgrad.precision import added, joined, working_dtype
from jaxgrad.sharding import every_example, kept


@functools.partial(jax.tree_util.register_dataclass, data_fields=("factors", "weight"), meta_fields=("spread",))
@dataclass(frozen=True)
class Leaf:
    """weight_b Σ_i factors_i,b. `scale` and `clip` change only the weight, so that they copy no factor.

    Attributes:
        factors: factors whose layouts have the same shape and dtype.
        weight: [B], in the accumulator's dtype.
        spread: for each axis of the parameter, the axes of an explicit mesh that shard it, or None. Sums over the
            examples are sharded so too; () replicates them.
    """

    factors: tuple[Factor, ...]
    weight: Any  # an Array, or its jax.ShapeDtypeStruct
    spread: tuple[Any, ...] = ()

    @staticmethod
    def of(parts: tuple[Factor, ...], spread: tuple[Any, ...] = ()) -> "Leaf":
        """The sum of these factors, with weight 1."""
        parts = jax.tree.map(lambda a: jnp.asarray(a) if isinstance(a, np.ndarray) else a, parts)
        return Leaf(parts, jnp.ones(of_examples(parts[0])[0].shape[0], factors.accumulator(*parts)), spread)

    @property
    def layout(self) -> Layout:
        """The first factor's layout; the parameter's shape and dtype are the same in all of them."""
        return self.factors[0].layout

    def weighted(self) -> tuple[Factor, ...]:
        """The factors with the weight multiplied in."""
        return tuple(factors.scale(f, self.weight) for f in self.factors)

    def map(self, function: Callable[[Factor], Factor], weight: Array) -> "Leaf":
        """Apply `function` to every factor, and replace the weight."""
        return Leaf(tuple(function(f) for f in self.factors), weight, self.spread)

    def _nearly_weighted(self, squared: bool = False) -> tuple[tuple[Factor, ...], Array]:
        """(the factors times powers of two, what is still to be multiplied in [B]), so that no side is rounded."""
        unit = power_of_two(jnp.abs(self.weight))
        return tuple(factors.scale_by_powers(f, unit, squared) for f in self.factors), self.weight / unit

    def squared_norm(self) -> Float[Array, " B"]:
        """[B]: ‖·‖²."""
        parts, rest = self._nearly_weighted(squared=True)
        return rest * (rest * norms.squared(parts))

    def length(self) -> norms.Length:
        """The norms, in a form that does not overflow."""
        found = norms.length(self.factors)
        return norms.Length(found.squares, jnp.abs(self.weight) * found.unit)

    def magnitude(self) -> Float[Array, " B"] | None:
        """[B]: magnitude of the products that are added up (`norms.magnitude`); None if there is only one."""
        found = norms.magnitude(self.factors)
        return None if found is None else jnp.abs(self.weight) * found

    def rounding(self) -> Array:
        """The largest `weighted.rounding` of its factors."""
        return functools.reduce(jnp.maximum, [weighted.rounding(f) for f in self.factors])

    def dot(self, V: Array) -> Float[Array, " B"]:
        """[B]: ⟨·, V⟩ for a V of the parameter's shape."""
        parts, rest = self._nearly_weighted()
        return rest * added([factors.dot(f, V) for f in parts])

    def sum(self, c: Float[Array, " B"] | None) -> Array:
        """Σ_b c_b · example b (c None: their sum), in the accumulator's dtype."""
        c = self.weight if c is None else c.astype(self.weight.dtype) * self.weight
        return added([weighted.weighted_sum(f, c) for f in self.factors])

    def gram(self, other: "Leaf") -> Float[Array, "B C"]:
        """[B, C]: the inner products of all pairs of examples."""
        (parts, rest), (others, rest_) = self._nearly_weighted(True), other._nearly_weighted(True)
        both = [(f, f_) for f in parts for f_ in others if not f.layout.disjoint(f_.layout)]
        if not both:
            return jnp.zeros((self.weight.shape[0], other.weight.shape[0]), self.weight.dtype)
        return rest[:, None] * added([inner_products.gram(f, f_) for f, f_ in both]) * every_example(rest_)[None]

    def second_moment(self) -> Array:
        """mean_b of the squared entries, in the accumulator's dtype."""
        return moments.second_moment(self.weighted())

    def variance(self) -> Array:
        """mean_b of the squared deviations, in the accumulator's dtype."""
        return moments.variance(self.weighted())

    def where(self, mask: Array) -> "Leaf":
        """The gradients with those whose mask is False set to exactly zero, even if they are NaN."""
        return self.map(lambda f: factors.where(f, mask), kept(mask, self.weight))

    def materialize(self) -> Array:
        """[B, *shape] in the parameter's dtype."""
        return added([factors.written_out(f) for f in self.weighted()]).astype(self.layout.dtype)

    def __repr__(self) -> str:
        return " + ".join(factors.shown(f, dtypes=True) for f in self.factors)


def concatenated(parts: Sequence[Leaf]) -> Leaf:
    """Concatenate along the example axis; the leaves must have the same kinds of factors."""
    same = zip(*(part.factors for part in parts), strict=True)
    dtype = working_dtype(*(part.weight.dtype for part in parts))
    weight = jnp.concatenate([part.weight.astype(dtype) for part in parts])
    return Leaf(tuple(_concatenated(each) for each in same), weight, parts[0].spread)


def _concatenated(same: tuple[Factor, ...]) -> Factor:
    """Concatenate factors of one kind; the position axis T is padded with zeros if it differs."""
    commons = [f for f in same if isinstance(f, Common)]
    if commons:
        _check_shared([f.array for f in commons])
        return dataclasses.replace(commons[0], number=joined([f.number for f in commons]))
    mapped = [f for f in same if isinstance(f, Mapped)]
    if mapped:
        _check_shared([f.shared for f in mapped])
        inputs = zip(*(f.inputs for f in mapped), strict=True)
        parts = tuple(tuple(map(_concatenated, zip(*each, strict=True))) for each in inputs)
        return dataclasses.replace(mapped[0], inputs=parts)
    products = [f for f in same if isinstance(f, Product)]
    if len({(tuple(a.shape[1:] for a in factors.arrays(f)), f.left_labels, f.right_labels) for f in products}) > 1:
        T = max(f.positions for f in products)
        products = [jax.vmap(lambda f: with_positions(f, T))(f) for f in products]
    first = dataclasses.replace(products[0], stepped=False)
    left, right = (
        None if a[0] is None else joined(a) for a in ([f.left for f in products], [f.right for f in products])
    )
    return dataclasses.replace(first, left=left, right=right)


def _check_shared(parts: Sequence[Same]) -> None:
    first, *others = [jax.tree.leaves(part.value) for part in parts]
    for arrays in others:
        if not all(map(_known_to_be_equal, first, arrays)):
            raise ValueError(
                "PerExampleGrads.concatenate: a weight that passes a map, or a penalty, has gradients that depend on "
                "the parameters too, and the parameters are not known to be the same in all parts. Compute the "
                "gradients in one batch, or concatenate the results of materialize()."
            )


def _known_to_be_equal(a: Array, b: Array) -> bool:
    try:
        return a is b or bool(jnp.array_equal(a, b, equal_nan=True))
    except jax.errors.TracerBoolConversionError:
        return False
