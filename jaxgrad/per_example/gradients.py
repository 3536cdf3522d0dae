"""PerExampleGrads: the B × parameters matrix G of per-example gradients, held as factors, and operations on it."""

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxgrad.errors import caller, naming
from jaxgrad.per_example.algebra import chunks, complexes, norms
from jaxgrad.per_example.algebra.leaf import Leaf, concatenated
from jaxgrad.per_example.algebra.mapped import map_examples_of
from jaxgrad.per_example.factor_tree import FactorTree, not_gradients
from jaxgrad.per_example.masks_and_bounds import checked_groups, checked_index, checked_mask, checked_numbers
from jaxgrad.precision import added, working_dtype
from jaxgrad.sharding import with_automatic_axes

P = ParamSpec("P")
R = TypeVar("R")


def _in_chunks(method: Callable[P, R]) -> Callable[P, R]:
    """Decorate a method that may materialize gradients, so that it materializes at most `chunk_bytes` at once."""

    @functools.wraps(method)
    def bounded(*args: P.args, **kwargs: P.kwargs) -> R:
        g: Any = args[0]
        with chunks.at_most(g.chunk_bytes):
            return method(*args, **kwargs)

    return bounded


_sharded_as_the_parameters = with_automatic_axes(specs=lambda g, *_: g.specs)


@jax.tree_util.register_pytree_with_keys_class
class PerExampleGrads(FactorTree):
    """The gradients of B examples with respect to a tree of parameters; each parameter's gradient is a sum of factors.

    The object stands for the matrix G [B, parameters] whose columns are split over the tree, as in the result of
    `jax.vmap(jax.grad(loss))`. Every method is an operation on G, and only `materialize` returns G itself.

    The object is a pytree whose arrays are the factors of products, not gradients. The example axis comes first in all
    arrays that the examples do not share. The pytree passes through `jit`, `vmap`, `grad`, `lax.scan`, `device_put`
    with shardings and `jax.export`. But `jax.tree.map` and optax's transformations apply a function to every array
    separately, which gives wrong numbers. Use these instead:

        optax.scale, jax.tree.map(lambda g: c * g, …)       `c * g`, with one number, or one for every example
        optax.tree.add, differences, averages               `g + h`, `g - h`, `(g + h) / 2`
        optax.clip_by_global_norm, per example              `g.clip(max_norm)`, or `jg.clipped_grad`
        optax's dpsgd, which needs an example axis          `g.materialize()`
        an optimizer's update                               `optimizer.update(g.mean(), state, params)`

    Accuracy: sums are accumulated in float32 or wider (in float64 if a factor or a parameter is float64). A result with
    the parameters' shapes is rounded once, to the parameter's dtype, unless it consists of squares (`second_moment`,
    `variance`). Such results, and [B] and [B, C] results, keep the dtype in which they were accumulated.

    A complex parameter has the gradient that `jax.grad` defines, ∂/∂Re - i ∂/∂Im, held as the gradients with respect to
    its two real parts. Norms and moments use |·|², and inner products are the real part of Σ conj(g) v.

    Args:
        tree: the parameters' tree with each leaf replaced by a tuple of factors (`Product`, `Mapped`, `Common`).
        chunk_bytes: the most bytes that a method materializes at once, for methods whose cheapest way to compute the
            result materializes gradients; see `with_chunk_bytes`.

    Example:
        >>> delta, x = jnp.ones((4, 3)), jnp.ones((4, 2))         # four examples of a [3, 2] matrix
        >>> g = PerExampleGrads({"W": (jg.per_example.Outer.of_matrix(delta, x, delta.dtype),)})
        >>> g.norms().round(4).tolist() == [jnp.sqrt(6.0).round(4)] * 4
        True
        >>> g.sum()["W"].shape
        (3, 2)
    """

    # --- norms

    @_in_chunks
    @with_automatic_axes(by_example=True)
    def squared_norms(self) -> Float[Array, " B"]:
        """‖g_b‖² [B], in float32 or wider; the squares may overflow or underflow where `norms` does not."""
        return added([leaf.squared_norm() for leaf in self._leaves])

    @_in_chunks
    @with_automatic_axes(by_example=True)
    def leaf_norms(self) -> PyTree:
        """The norm of each parameter's gradient, computed as in `norms`: a tree like the parameters with leaves [B]."""
        by_leaf = self._map_leaves(lambda leaf: leaf.length().norm)
        return complexes.joined(by_leaf, lambda *parts: norms.root_sum_of_squares(parts))

    @_in_chunks
    @with_automatic_axes(by_example=True)
    def norms(self) -> Float[Array, " B"]:
        """‖g_b‖ [B], over all parameters together, in float32 or wider.

        Formula: √Σ_leaves ‖·‖²; the norm of an Outer with T = 1 is ‖left_b‖·‖right_b‖. The column *norm* of `explain`
        shows how each parameter's norm is computed. Every example and position is first scaled by powers of two, so
        that nothing overflows or underflows unless the norm itself does. The norms are differentiable; the derivative
        at a zero gradient is 0. Accuracy: a few eps, unless a gradient is a sum of products that cancel; the norm is
        then accurate to about √eps times `magnitudes`, and may be 0. Otherwise, the norm of a nonzero gradient is 0
        only if the products at all positions are below the smallest normal number.
        """
        return norms.joint_norm([leaf.length() for leaf in self._leaves])

    @with_automatic_axes(by_example=True)
    def magnitudes(self) -> Float[Array, " B"] | None:
        """The magnitude [B] of the terms that may cancel in each example's gradient; None if no gradient is a sum.

        The magnitude is an upper bound on √Σ_leaves (Σ_t ‖left_t‖ ‖right_t‖)², over the leaves whose gradient is a sum
        of products. The error of a sum of rounded products is about eps times the magnitude, however small the gradient
        is.
        """
        magnitudes = [size for leaf in self._leaves if (size := leaf.magnitude()) is not None]
        return norms.root_sum_of_squares(magnitudes) if magnitudes else None

    def rounding(self) -> Array:
        """The relative error ρ, a scalar, that rounding the operands of products causes in norms and weighted sums.

        The error of the norm, and of the example's contribution to a weighted sum, is at most ρ√(‖g_b‖² + S_b²), where
        S_b is the magnitude (`magnitudes`). For bfloat16 factors ρ is 3·2⁻⁸: a weighted sum Σ_b c_b g_b rounds the
        product of c_b and one side, and the compiler may use the unrounded value of a side in one place and its rounded
        value elsewhere. For float32 factors ρ is 0 on a CPU. By default, ρ is 2⁻⁹ on a GPU and 2⁻⁶ on a TPU, which
        round the operands; `jax.default_matmul_precision` changes this.
        """
        return functools.reduce(jnp.maximum, [leaf.rounding() for leaf in self._leaves])

    # --- linear maps

    @naming("PerExampleGrads.dot")
    @with_automatic_axes(by_example=True)
    def dot(self, tree: PyTree) -> Float[Array, " B"]:
        """G v [B]: the inner product of every example's gradient with a direction v, in float32 or wider.

        Args:
            tree: the direction v, with the parameters' structure and shapes, and complex where the parameters are. A
                complex v follows the convention of gradients: for a change dp of the parameters, pass conj(dp).

        Raises:
            ValueError: the direction does not have the structure and the shapes of the parameters.
        """
        leaves = self._direction(tree)
        return added([leaf.dot(v) for leaf, v in zip(self._leaves, leaves, strict=True)])

    @naming("PerExampleGrads.weighted_sum")
    def weighted_sum(self, c: Float[Array, " B"], dtype: jax.typing.DTypeLike | None = None) -> PyTree:
        """Gᵀ c: Σ_b c_b g_b, a tree with the parameters' shapes. It costs one matrix product per factor.

        Args:
            c: [B], a floating number for each example.
            dtype: dtype of the result, as in `sum`.

        Raises:
            ValueError: `c` is not a floating array [B].
        """
        c = checked_numbers(c, self.batch_size)
        return self._summed(Leaf.sum, dtype, c)

    def sum(self, dtype: jax.typing.DTypeLike | None = None) -> PyTree:
        """Σ_b g_b, a tree with the parameters' shapes.

        Args:
            dtype: dtype of the result, as in `jnp.sum`; None for the dtype of each parameter. For a complex parameter,
                dtype is that of its two real parts. The sum is accumulated in float32 or wider and rounded once.
        """
        return self._summed(Leaf.sum, dtype)

    def mean(self, dtype: jax.typing.DTypeLike | None = None) -> PyTree:
        """Σ_b g_b / B, a tree with the parameters' shapes; NaN for an empty batch, as in `jnp.mean`.

        Args:
            dtype: dtype of the result, as in `sum`.
        """

        def mean(leaf: Leaf, c: Array | None) -> Array:
            total = leaf.sum(c)
            return total / self.batch_size if self.batch_size else jnp.full_like(total, jnp.nan)

        return self._summed(mean, dtype)

    @_sharded_as_the_parameters
    def _summed(
        self,
        function: Callable[[Leaf, Array | None], Array],
        dtype: jax.typing.DTypeLike | None,
        c: Array | None = None,  # an argument, so that it has the function's mesh
    ) -> PyTree:
        by_leaf = self._map_leaves(lambda leaf: function(leaf, c).astype(dtype or leaf.layout.dtype))
        return complexes.joined(by_leaf, complexes.gradient)

    # --- products of examples

    @naming("PerExampleGrads.gram")
    @_in_chunks
    @with_automatic_axes(by_example=False)
    def gram(self, other: "PerExampleGrads | None" = None) -> Float[Array, "B C"]:
        """G G′ᵀ [B, C]: the inner products of all pairs of examples, where G′ is `other` or, without it, G.

        Cost for an Outer with T = 1: two matrix products with B·C·(F + K) operations, instead of B·C·F·K.

        Raises:
            ValueError: the parameters of `other` have a different tree, or different shapes or dtypes.
        """
        if other is not None:
            self._same_parameters(other)
        second = self if other is None else other
        pairs = zip(self._leaves, second._leaves, strict=True)
        return added([leaf.gram(leaf_) for leaf, leaf_ in pairs])

    @property
    def T(self) -> "Transposed":
        """Gᵀ, as an operand of `@`: `g.T @ c` is `g.weighted_sum(c)`, and `g @ h.T` is `g.gram(h)`."""
        return Transposed(self)

    def __matmul__(self, other: Any) -> Array:
        """G v [B] for a direction v, as in `dot`; G G′ᵀ [B, C] for `h.T`, as in `gram`."""
        return self.gram(other.gradients) if isinstance(other, Transposed) else self.dot(other)

    @_in_chunks
    @_sharded_as_the_parameters
    def second_moment(self) -> PyTree:
        """mean_b g_b ⊙ g_b, a tree with the parameters' shapes, in float32 or wider: float16 cannot hold squares.

        Formula: for an Outer with T = 1, (left²)ᵀ(right²)/B, which is one matrix product. In all other cases gradients
        are materialized, a few examples at a time.
        """
        by_leaf = self._map_leaves(lambda leaf: leaf.second_moment())
        return complexes.joined(by_leaf, operator.add)

    @_in_chunks
    @_sharded_as_the_parameters
    def variance(self) -> PyTree:
        """mean_b (g_b - ḡ) ⊙ (g_b - ḡ), a tree with the parameters' shapes, in float32 or wider.

        Formula: the mean is subtracted before anything is squared, because the terms of second_moment - mean² cancel.
        For an Outer with T = 1 the two sides are centered (`moments.variance`). In all other cases gradients are
        materialized, a few examples at a time.
        """
        return complexes.joined(self._map_leaves(lambda leaf: leaf.variance()), operator.add)

    # --- new batches

    __array_ufunc__ = None  # NumPy then leaves `number * g` to __rmul__

    def __mul__(self, c: Any) -> "PerExampleGrads":
        """c · g_b for a number c, c_b · g_b for an array c [B], as in `scale`."""
        c = jnp.asarray(c)
        if c.ndim == 0 and not jnp.issubdtype(c.dtype, jnp.complexfloating):
            c = jnp.full(self.batch_size, c.astype(working_dtype(*(leaf.weight.dtype for leaf in self._leaves))))
        return self.scale(c)

    __rmul__ = __mul__

    def __truediv__(self, c: Any) -> "PerExampleGrads":
        """g_b / c for a number c, g_b / c_b for an array c [B]."""
        return self * (1 / jnp.asarray(c))

    def __neg__(self) -> "PerExampleGrads":
        """-g_b."""
        return self._with([replace(leaf, weight=-leaf.weight) for leaf in self._leaves])

    @naming("PerExampleGrads.__add__")
    def __add__(self, other: "PerExampleGrads") -> "PerExampleGrads":
        """g_b + h_b, the gradients of a sum of two losses, with the factors of both. The batch sizes must be equal.

        Raises:
            ValueError: `other` has a different number of examples or different parameters.
        """
        if not isinstance(other, PerExampleGrads):
            return NotImplemented
        self._same_parameters(other)
        if self.batch_size != other.batch_size:
            raise ValueError(
                f"{caller()}: expected as many examples in both, got {self.batch_size} and "
                f"{other.batch_size}. To join two batches, use PerExampleGrads.concatenate."
            )
        pairs = zip(self._leaves, other._leaves, strict=True)
        return self._with([Leaf.of(leaf.weighted() + leaf_.weighted(), leaf.spread) for leaf, leaf_ in pairs])

    def __sub__(self, other: "PerExampleGrads") -> "PerExampleGrads":
        """g_b - h_b, with the requirements of `+`."""
        return self + -other if isinstance(other, PerExampleGrads) else NotImplemented

    @naming("PerExampleGrads.scale")
    def scale(self, c: Float[Array, " B"]) -> "PerExampleGrads":
        """c_b g_b for c [B]; c is kept in float32 or wider, not rounded to the parameters' dtype.

        Raises:
            ValueError: `c` is not a floating array [B].
        """
        c = checked_numbers(c, self.batch_size)
        return self._with([replace(leaf, weight=leaf.weight * c.astype(leaf.weight.dtype)) for leaf in self._leaves])

    @naming("PerExampleGrads.clip")
    def clip(self, max_norm: PyTree) -> "PerExampleGrads":
        """g_b · max_norm / max(max_norm, ‖g_b‖): gradients with a norm of at most max_norm are unchanged.

        Args:
            max_norm: one number bounds the norm over all parameters; a tree prefix of the parameters, with a number for
                every leaf or group of leaves, bounds the norm of each group separately. The numbers must be > 0; inf
                clips nothing. A traced number that turns out to be ≤ 0 gives NaN.

        Raises:
            ValueError: a bound is not positive, or the tree is not a prefix of the parameters.
        """
        bounds, groups = self.groups(max_norm)
        leaves: list[Leaf] = []
        for bound, group in zip(bounds, groups, strict=True):
            lengths = group.norms()
            limit = jnp.asarray(bound, lengths.dtype)
            leaves += group.scale(norms.shortened(lengths, limit))._leaves
        return self._with(leaves)

    @naming("PerExampleGrads.where")
    def where(self, mask: Array) -> "PerExampleGrads":
        """Set the gradients whose mask is False to exactly zero, even if they are NaN.

        Args:
            mask: [B], boolean.

        Raises:
            ValueError: the mask is not a boolean array [B].
        """
        mask = checked_mask(mask, self.batch_size)
        return self._with([leaf.where(mask) for leaf in self._leaves])

    @naming("PerExampleGrads[...]")
    @with_automatic_axes(by_example=False)
    def __getitem__(self, index: Any) -> "PerExampleGrads":
        """Select examples by a slice, or by an integer or boolean array. The result is replicated on an explicit mesh.

        Raises:
            TypeError: any other kind of index.
        """
        _ = self._leaves  # raises if there is more than one example axis
        if isinstance(index, slice):
            return map_examples_of(lambda a: a[index], self)
        chosen = checked_index(index)
        return map_examples_of(lambda a: a[chosen], self)

    @staticmethod
    @naming("PerExampleGrads.concatenate")
    def concatenate(parts: Sequence["PerExampleGrads"]) -> "PerExampleGrads":
        """Join several batches into one. Their parameters and kinds of factors must be the same; T may differ.

        Raises:
            ValueError: there are no parts, or the parts differ in their parameters or in the kinds of their factors.
        """
        if not parts:
            raise ValueError("PerExampleGrads.concatenate: expected at least one batch, got none.")
        for part in parts[1:]:
            parts[0]._same_parameters(part)
        kinds = [[[(f.kind, f.layout.where) for f in leaf.factors] for leaf in part._leaves] for part in parts]
        if any(kind != kinds[0] for kind in kinds[1:]):
            raise ValueError(
                "PerExampleGrads.concatenate: expected the same factors in every part, got different ones."
            )
        return parts[0]._with([concatenated(same) for same in zip(*(part._leaves for part in parts), strict=True)])

    @with_automatic_axes(by_example=True)
    def materialize(self) -> PyTree:
        """Materialize G: the tree of arrays [B, *shape] that `jax.vmap(jax.grad(loss))` returns."""
        return complexes.joined(self._map_leaves(Leaf.materialize), complexes.gradient)

    @naming("PerExampleGrads.groups", unless_inside=True)
    def groups(self, prefix: PyTree) -> tuple[list[Any], list["PerExampleGrads"]]:
        """Split the gradients by a tree prefix of positive numbers: (the numbers, the gradients below each of them).

        Args:
            prefix: one number for all parameters, or a tree prefix with a number for every leaf or group of leaves.

        Raises:
            ValueError: a number is not positive, or the tree is not a prefix of the parameters.
        """
        leaves = self._leaves
        numbers, groups = checked_groups(prefix, self._treedef)
        members = [[leaves[i] for i in group] for group in groups]
        return numbers, [self.tree_unflatten(self.chunk_bytes, (part,)) for part in members]


class Transposed:
    """Gᵀ [parameters, B], which `PerExampleGrads.T` returns; multiply it from either side.

    Example:
        >>> g = jg.per_example_grad(lambda w, x: w @ x)(jnp.zeros(2), jnp.array([[1.0, 2.0], [3.0, 4.0]]))
        >>> (g @ jnp.ones(2)).tolist(), (g.T @ jnp.ones(2)).tolist(), (g @ g.T).tolist()
        ([3.0, 7.0], [4.0, 6.0], [[5.0, 11.0], [11.0, 25.0]])
    """

    __array_ufunc__ = None

    def __init__(self, gradients: PerExampleGrads):
        self.gradients = gradients

    def __matmul__(self, c: Float[Array, " B"]) -> PyTree:
        """Gᵀ c, as in `PerExampleGrads.weighted_sum`."""
        return self.gradients.weighted_sum(c)


def widened(g: PerExampleGrads) -> PerExampleGrads:
    """The same gradients with bfloat16 factors cast to float32, so that weighted sums do not round to bfloat16."""
    return jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, g)


def checked_gradients(g: Any) -> None:
    """Raise TypeError for anything but PerExampleGrads."""
    if not isinstance(g, PerExampleGrads):
        raise TypeError(not_gradients(g))
