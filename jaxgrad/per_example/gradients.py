"""PerExampleGrads: the B × parameters matrix G of per-example gradients, held as factors, and operations on it."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxgrad.errors import called, naming
from jaxgrad.per_example.algebra import chunks, complexes, factors, norms
from jaxgrad.per_example.algebra.factors import Factor
from jaxgrad.per_example.algebra.leaf import Leaf, concatenated
from jaxgrad.per_example.algebra.mapped import map_examples_of, of_examples
from jaxgrad.per_example.checks import checked_index, checked_mask, checked_numbers, grouped
from jaxgrad.precision import added, working_dtype
from jaxgrad.sharding import automatic

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


@jax.tree_util.register_pytree_with_keys_class
class PerExampleGrads:
    """The gradients of B examples with respect to a tree of parameters; each parameter's gradient is a sum of factors.

    It stands for the matrix G [B, parameters] that `jax.vmap(jax.grad(loss))` would return, split over the tree. Every
    method is an operation on that matrix, and only `materialize` returns the matrix itself.

    Its arrays are the factors of products, not gradients. It is a pytree of these arrays, all with the example axis
    first, and passes through `jit`, `vmap`, `grad`, `lax.scan`, `device_put` with shardings and `jax.export`. But
    `jax.tree.map` and optax's transformations work on every array separately and therefore give wrong numbers. Use
    these in their place:

        optax.scale, jax.tree.map(lambda g: c * g, …)       `c * g`, with one number, or one for every example
        optax.tree.add, subtracting, averaging              `g + h`, `g - h`, `(g + h) / 2`
        optax.clip_by_global_norm, per example              `g.clip(max_norm)`, or `jg.clipped_grad`
        optax's dpsgd, which needs an example axis          `g.materialize()`
        an optimizer's update                               `optimizer.update(g.mean(), state, params)`

    Accuracy: sums are accumulated in float32 at least (float64 if a factor or a parameter is float64). A result that is
    a gradient is rounded once, to the parameter's dtype; squares of gradients and [B] and [B, B] results keep the
    accumulator's dtype.

    A complex parameter has the gradient that `jax.grad` defines, ∂/∂Re - i ∂/∂Im, held as the gradients with respect to
    its two real parts. Norms and moments use |·|², and inner products are the real part of Σ conj(g) v.

    Args:
        tree: the parameters' tree with each leaf replaced by a tuple of factors (`Outer`, `Rows`, `Dense`).
        chunk_bytes: how many bytes a method may materialize at once, where its cheapest way materializes something.

    Example:
        >>> delta, x = jnp.ones((4, 3)), jnp.ones((4, 2))         # four examples of a [3, 2] matrix
        >>> g = PerExampleGrads({"W": (factors.Outer.of_matrix(delta, x, delta.dtype),)})
        >>> g.norms().round(4).tolist() == [jnp.sqrt(6.0).round(4)] * 4
        True
        >>> g.sum()["W"].shape
        (3, 2)
    """

    def __init__(self, tree: PyTree, chunk_bytes: int = chunks.CHUNK_BYTES):
        is_leaf = lambda node: isinstance(node, tuple) and bool(node) and all(isinstance(f, Factor) for f in node)  # noqa: E731
        leaves, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
        strange = [jax.tree_util.keystr(path) for path, leaf in leaves if not is_leaf(leaf)]
        if strange or not leaves:
            where = f"something else at tree{strange[0]}" if strange else "none"
            raise TypeError(f"PerExampleGrads: expected a tree of tuples of factors, got {where}.")
        sizes = {a.shape[0] for _, leaf in leaves for f in leaf for a in of_examples(f)}
        if len(sizes) != 1:
            raise ValueError(f"PerExampleGrads: expected one number of examples in every factor, got {sorted(sizes)}.")
        for path, leaf in leaves:
            shapes = {(f.layout.shape, f.layout.dtype) for f in leaf}
            if len(shapes) != 1:
                raise ValueError(
                    f"PerExampleGrads: expected factors of one parameter, got shapes and dtypes {shapes} "
                    f"at {jax.tree_util.keystr(path)}."
                )
        self.chunk_bytes = chunk_bytes
        self._held: PyTree = jax.tree.unflatten(treedef, [Leaf.of(leaf) for _, leaf in leaves])

    # --- as a pytree

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, PyTree], ...], int]:
        """Flatten for JAX: the parameters' tree with a sum of factors and its weight at each leaf."""
        return ((jax.tree_util.GetAttrKey("factors"), self._held),), self.chunk_bytes

    @classmethod
    def tree_unflatten(cls, chunk_bytes: int, children: Sequence[PyTree]) -> "PerExampleGrads":
        """Unflatten for JAX: the inverse of flattening, without checks."""
        g = object.__new__(cls)
        (g._held,), g.chunk_bytes = children, chunk_bytes
        return g

    @property
    def _leaves(self) -> tuple[Leaf, ...]:
        held: tuple[Leaf, ...] = tuple(jax.tree.leaves(self._held, is_leaf=_is_leaf))
        weight: Any = getattr(held[0], "weight", None)
        if getattr(weight, "ndim", 1) != 1:
            raise ValueError(
                f"PerExampleGrads: expected one example axis, got leading axes {jnp.shape(weight)}. The result "
                f"of jax.vmap, over models for instance, is a stack of them: call its methods inside the vmap. The "
                f"result of jax.tree.map is meaningless: the function was applied to arrays of factors, not gradients."
            )
        return held

    @property
    def _treedef(self) -> Any:
        return jax.tree.structure(self._held, is_leaf=_is_leaf)

    def _with(self, leaves: Sequence[Leaf]) -> "PerExampleGrads":
        return self.tree_unflatten(self.chunk_bytes, (self._tree(leaves),))

    def _tree(self, leaves: Sequence[Any]) -> PyTree:
        return jax.tree.unflatten(self._treedef, leaves)

    def _each(self, function: Callable[[Leaf], Any]) -> PyTree:
        return self._tree([function(leaf) for leaf in self._leaves])

    # --- attributes

    @property
    def paths(self) -> list[str]:
        """The path of every parameter, in the form of `jax.tree_util.keystr`."""
        leaves = jax.tree_util.tree_leaves_with_path(self._treedef.unflatten(range(self._treedef.num_leaves)))
        return [jax.tree_util.keystr(path) for path, _ in leaves]

    @property
    def factors(self) -> PyTree:
        """The parameters' tree with each leaf replaced by its tuple of factors, scaled as the gradients are."""
        return self._each(Leaf.weighted)

    @property
    def batch_size(self) -> int:
        """B."""
        return self._leaves[0].weight.shape[0]

    @property
    def nbytes(self) -> int:
        """Number of bytes held in the factors; an array that two factors share is counted twice."""
        held = [a for leaf in self._leaves for f in leaf.factors for a in factors.arrays(f)]
        return sum(a.size * a.dtype.itemsize for a in held)

    @property
    def materialized_nbytes(self) -> int:
        """Number of bytes that `materialize` would return."""
        return sum(self.batch_size * leaf.layout.size * leaf.layout.dtype.itemsize for leaf in self._leaves)

    def __len__(self) -> int:
        return self.batch_size

    def __repr__(self) -> str:
        try:
            lines = [
                f"  {path or 'parameter'} {leaf.layout.dtype.name}{list(leaf.layout.shape)}: " + repr(leaf)
                for path, leaf in zip(self.paths, self._leaves, strict=True)
            ]
            held = f"{self.batch_size} examples, {self.nbytes} bytes held, {self.materialized_nbytes} if materialized"
        except (AttributeError, IndexError, TypeError, ValueError):  # JAX makes trees of other objects too
            return f"PerExampleGrads({self._held})"
        return "\n".join([f"PerExampleGrads({held})", *lines])

    def with_chunk_bytes(self, chunk_bytes: int) -> "PerExampleGrads":
        """Return the same gradients, whose methods materialize at most `chunk_bytes` at once.

        If the cheapest way to compute norms, moments or a Gram matrix materializes gradients, it does so for a few
        examples at a time; a single example may need more than `chunk_bytes`.

        Raises:
            ValueError: a number below 1.
        """
        if operator.index(chunk_bytes) < 1:
            raise ValueError(f"PerExampleGrads.with_chunk_bytes: expected a number of bytes ≥ 1, got {chunk_bytes}.")
        return self.tree_unflatten(operator.index(chunk_bytes), (self._held,))

    # --- norms

    @_in_chunks
    @automatic(by_example=True)
    def squared_norms(self) -> Float[Array, " B"]:
        """‖g_b‖² [B]. It overflows or underflows where the square does; `norms` does not."""
        return added([leaf.squared_norm() for leaf in self._leaves])

    @_in_chunks
    @automatic(by_example=True)
    def leaf_norms(self) -> PyTree:
        """The norm of each parameter's gradient, computed as in `norms`: the tree with a [B] at every leaf."""
        each = self._each(lambda leaf: leaf.length().norm)
        return complexes.joined(each, lambda *parts: norms.root_sum_of_squares(parts))

    @_in_chunks
    @automatic(by_example=True)
    def norms(self) -> Float[Array, " B"]:
        """‖g_b‖ [B], over all parameters together.

        Formula: √Σ_leaves ‖·‖²; the norm of an Outer with T = 1 is ‖left_b‖·‖right_b‖. Cost: see `pairs`.
        Every example and position is scaled by powers of two first, so that nothing overflows or underflows unless the
        norm itself does; if the product at every position is below the smallest normal number, their sum may be 0.
        The norms are differentiable; the derivative at a zero gradient is 0.
        """
        return norms.together([leaf.length() for leaf in self._leaves])

    @automatic(by_example=True)
    def magnitudes(self) -> Float[Array, " B"] | None:
        """Magnitude of the terms that may cancel, per example [B]; None if no gradient is a sum.

        It is at least √Σ_leaves (Σ_t ‖left_t‖ ‖right_t‖)², over the leaves that are a sum of products. The error of a
        sum of rounded products is about eps times this magnitude, however small the gradient is.
        """
        found = [size for leaf in self._leaves if (size := leaf.magnitude()) is not None]
        return norms.root_sum_of_squares(found) if found else None

    def rounding(self) -> Array:
        """How far a norm and a contribution to a sum may be off because operands of products are rounded, a number.

        It is relative to the norm and the magnitude (`magnitudes`), and 0 where products take their operands as they
        are. It is 3·2⁻⁸ for factors in bfloat16: a weighted sum rounds c_b times one side, and the compiler may use
        either side before it is rounded. By default products of float32 round their operands on accelerators, see
        `jax.default_matmul_precision`: then it is 2⁻⁹ on a GPU, 2⁻⁶ on a TPU.
        """
        return functools.reduce(jnp.maximum, [leaf.rounding() for leaf in self._leaves])

    # --- linear maps

    @naming("PerExampleGrads.dot")
    @automatic(by_example=True)
    def dot(self, tree: PyTree) -> Float[Array, " B"]:
        """G v [B]: the inner product of every example's gradient with a direction v.

        Args:
            tree: a direction with the parameters' structure and shapes, complex where they are. It follows the
                convention of gradients: for a change dp of the parameters, pass conj(dp).
        """
        leaves = self._direction(tree)
        return added([leaf.dot(v) for leaf, v in zip(self._leaves, leaves, strict=True)])

    @naming("PerExampleGrads.weighted_sum")
    def weighted_sum(self, c: Float[Array, " B"]) -> PyTree:
        """Gᵀ c: Σ_b c_b g_b, a tree with the parameters' shapes and dtypes. It costs one matrix product per factor."""
        c = checked_numbers(c, self.batch_size)
        return self._summed(c)

    def sum(self, rounded: bool = True) -> PyTree:
        """Σ_b g_b, a tree with the parameters' shapes and dtypes; if `rounded` is False, in the accumulator's dtype."""
        return self._summed(None, rounded)

    @automatic(by_example=False)
    def mean(self) -> PyTree:
        """Σ_b g_b / B, a tree with the parameters' shapes and dtypes; NaN for an empty batch, as in jnp.mean."""

        def mean(leaf: Leaf) -> Array:
            total = leaf.sum(None)
            return (total / self.batch_size if self.batch_size else jnp.full_like(total, jnp.nan)).astype(
                leaf.layout.dtype
            )

        return complexes.joined(self._each(mean), complexes.gradient)

    @automatic(by_example=False)
    def _summed(self, c: Array | None, rounded: bool = True) -> PyTree:
        def total(leaf: Leaf) -> Array:
            value = leaf.sum(c)
            return value.astype(leaf.layout.dtype) if rounded else value

        return complexes.joined(self._each(total), complexes.gradient)

    # --- products of examples

    @naming("PerExampleGrads.gram")
    @_in_chunks
    @automatic(by_example=False)
    def gram(self, other: "PerExampleGrads | None" = None) -> Float[Array, "B C"]:
        """G G′ᵀ [B, C]: the inner products of all pairs of examples, of this batch with `other` or with itself.

        Cost for an Outer with T = 1: two matrix products, B·C·(F + K) operations; never B × parameters.

        Raises:
            ValueError: the parameters of `other` have another tree, or other shapes or dtypes.
        """
        if other is not None:
            self._same_parameters(other)
        second = self if other is None else other
        pairs = zip(self._leaves, second._leaves, strict=True)
        return added([leaf.gram(leaf_) for leaf, leaf_ in pairs])

    @_in_chunks
    @automatic(by_example=False)
    def second_moment(self) -> PyTree:
        """mean_b g_b ⊙ g_b, a tree with the parameters' shapes, in float32 at least: half precision cannot hold the
        squares.

        Formula: for an Outer with T = 1, (left²)ᵀ(right²)/B, one matrix product; otherwise examples are materialized, a
        few at a time.
        """
        each = self._each(lambda leaf: leaf.second_moment())
        return complexes.joined(each, operator.add)

    @_in_chunks
    @automatic(by_example=False)
    def variance(self) -> PyTree:
        """mean_b (g_b - ḡ) ⊙ (g_b - ḡ), a tree with the parameters' shapes, in float32 at least.

        Formula: not second_moment - mean², which cancels. For an Outer with T = 1 the sides are centered first
        (`moments.variance`); otherwise examples are materialized, a few at a time, and the mean is subtracted.
        """
        return complexes.joined(self._each(lambda leaf: leaf.variance()), operator.add)

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
        return self._with([Leaf(leaf.factors, -leaf.weight) for leaf in self._leaves])

    @naming("PerExampleGrads.__add__")
    def __add__(self, other: "PerExampleGrads") -> "PerExampleGrads":
        """g_b + h_b, the gradients of a sum of two losses, with the factors of both. The batch sizes must be equal.

        Raises:
            ValueError: `other` has another number of examples or other parameters.
        """
        if not isinstance(other, PerExampleGrads):
            return NotImplemented
        self._same_parameters(other)
        if self.batch_size != other.batch_size:
            raise ValueError(
                f"{called()}: expected as many examples in both, got {self.batch_size} and "
                f"{other.batch_size}. To join two batches, use PerExampleGrads.concatenate."
            )
        pairs = zip(self._leaves, other._leaves, strict=True)
        return self._with([Leaf.of(leaf.weighted() + leaf_.weighted()) for leaf, leaf_ in pairs])

    def __sub__(self, other: "PerExampleGrads") -> "PerExampleGrads":
        """g_b - h_b, with the same requirements as `+`."""
        return self + -other if isinstance(other, PerExampleGrads) else NotImplemented

    @naming("PerExampleGrads.scale")
    def scale(self, c: Float[Array, " B"]) -> "PerExampleGrads":
        """c_b g_b, in float32 at least: the result keeps digits that rounding to the parameter's dtype would drop."""
        c = checked_numbers(c, self.batch_size)
        return self._with([Leaf(leaf.factors, leaf.weight * c.astype(leaf.weight.dtype)) for leaf in self._leaves])

    @naming("PerExampleGrads.clip")
    def clip(self, max_norm: PyTree) -> "PerExampleGrads":
        """g_b · max_norm / max(max_norm, ‖g_b‖): a gradient that is zero or exactly on the bound is unchanged.

        Args:
            max_norm: one number bounds the norm over all parameters; a tree prefix of the parameters, with a number for
                every leaf or group of leaves, bounds the norm of each group separately. The numbers must be > 0; inf
                clips nothing, and a traced number that turns out to be ≤ 0 gives NaN.

        Raises:
            ValueError: a bound that is not positive, or a tree that is not a prefix of the parameters.
        """
        bounds, groups = self.groups(max_norm)
        leaves: list[Leaf] = []
        for bound, part in zip(bounds, groups, strict=True):
            lengths = part.norms()
            limit = jnp.asarray(bound, lengths.dtype)
            leaves += part.scale(norms.shortened(lengths, limit))._leaves
        return self._with(leaves)

    @naming("PerExampleGrads.where")
    def where(self, mask: Array) -> "PerExampleGrads":
        """Return the gradients with those whose mask is False set to exactly zero, even if they are NaN.

        Args:
            mask: [B], boolean.
        """
        mask = checked_mask(mask, self.batch_size)
        return self._with([leaf.where(mask) for leaf in self._leaves])

    @naming("PerExampleGrads[...]")
    @automatic(by_example=False)
    def __getitem__(self, index: Any) -> "PerExampleGrads":
        """A subset of the examples, by a slice or an integer or boolean array; replicated on an explicit mesh."""
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
            ValueError: no parts, or parts that differ in their parameters or factors.
        """
        if not parts:
            raise ValueError("PerExampleGrads.concatenate: expected at least one batch, got none.")
        for part in parts[1:]:
            parts[0]._same_parameters(part)
        kinds = [[[(type(f), f.layout) for f in leaf.factors] for leaf in part._leaves] for part in parts]
        if any(kind != kinds[0] for kind in kinds[1:]):
            raise ValueError(
                "PerExampleGrads.concatenate: expected the same factors in every part, got different ones."
            )
        return parts[0]._with([concatenated(same) for same in zip(*(part._leaves for part in parts), strict=True)])

    @automatic(by_example=True)
    def materialize(self) -> PyTree:
        """Materialize G: the tree of [B, *shape] that `jax.vmap(jax.grad(loss))` returns, B × parameters numbers."""
        return complexes.joined(self._each(Leaf.materialize), complexes.gradient)

    # --- checks of arguments

    def _direction(self, tree: PyTree) -> list[Array]:
        structure: Any = jax.tree.structure(self._held, is_leaf=_is_parameter)
        treedef = jax.tree.structure(tree)
        if treedef != structure:
            raise ValueError(f"{called()}: expected a tree like the parameters', {structure}, got {treedef}.")
        leaves, parts = jax.tree.flatten(complexes.parts(tree, sign=-1))
        if parts != self._treedef:
            raise ValueError(
                f"{called()}: expected complex numbers where the parameters are, and only there, got "
                f"{jax.tree.map(jnp.result_type, tree)}."
            )
        for path, leaf, v in zip(self.paths, self._leaves, leaves, strict=True):
            if jnp.shape(v) != leaf.layout.shape:
                raise ValueError(f"{called()}: expected shape {leaf.layout.shape} at {path}, got {jnp.shape(v)}.")
        return [jnp.asarray(v) for v in leaves]

    def _same_parameters(self, other: "PerExampleGrads") -> None:
        checked_gradients(other)
        if other._treedef != self._treedef:
            raise ValueError(
                f"{called()}: expected the same tree of parameters, {self._treedef}, got {other._treedef}."
            )
        for path, leaf, leaf_ in zip(self.paths, self._leaves, other._leaves, strict=True):
            mine, theirs = leaf.layout, leaf_.layout
            if (mine.shape, mine.dtype) != (theirs.shape, theirs.dtype):
                raise ValueError(
                    f"{called()}: expected {mine.dtype}{list(mine.shape)} at {path}, "
                    f"got {theirs.dtype}{list(theirs.shape)}."
                )

    @naming("PerExampleGrads.groups", unless_inside=True)
    def groups(self, prefix: PyTree) -> tuple[list[Any], list["PerExampleGrads"]]:
        """Return the positive numbers in a tree prefix of the parameters, and for each the gradients it applies to.

        Args:
            prefix: one number for all parameters, or a tree prefix with a number for every leaf or group of leaves.

        Raises:
            ValueError: a number that is not positive, or a tree that is not a prefix of the parameters.
        """
        leaves = self._leaves
        bounds, groups = grouped(prefix, self._treedef)
        members = [[leaves[i] for i in group] for group in groups]
        return bounds, [self.tree_unflatten(self.chunk_bytes, (part,)) for part in members]


def _is_leaf(node: Any) -> bool:
    return isinstance(node, Leaf)


def _is_parameter(node: Any) -> bool:
    return _is_leaf(node) or complexes.is_complex(node)


def widened(g: PerExampleGrads) -> PerExampleGrads:
    """The same gradients with factors of float32 in place of bfloat16, so that weighted sums round nothing to it."""
    return jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, g)


def checked_gradients(g: Any) -> None:
    """Raise TypeError for anything but PerExampleGrads."""
    if not isinstance(g, PerExampleGrads):
        raise TypeError(
            f"{called()}: expected PerExampleGrads, as jg.per_example_grad(loss)(params, *batch) returns, got "
            f"{type(g).__name__}."
        )
