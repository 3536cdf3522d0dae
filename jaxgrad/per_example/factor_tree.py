"""FactorTree: the base class of PerExampleGrads, a pytree of factors without the operations on them."""

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, PyTree

from jaxgrad.errors import caller
from jaxgrad.per_example.algebra import chunks, complexes, factors
from jaxgrad.per_example.algebra.factors import Factor
from jaxgrad.per_example.algebra.leaf import Leaf
from jaxgrad.per_example.algebra.mapped import of_examples
from jaxgrad.sharding import spread_over


class FactorTree:
    """The base class of `PerExampleGrads`: its tree of factors, the methods of a pytree, and its attributes.

    Args:
        tree: the parameters' tree with each leaf replaced by a tuple of factors.
        chunk_bytes: as in `PerExampleGrads`.

    Raises:
        TypeError: a leaf is not a tuple of factors, or there are no leaves.
        ValueError: the factors have different batch sizes, or those of one leaf belong to different parameters.
    """

    def __init__(self, tree: PyTree, chunk_bytes: int = chunks.CHUNK_BYTES):
        is_leaf = lambda node: isinstance(node, tuple) and bool(node) and all(isinstance(f, Factor) for f in node)  # noqa: E731
        leaves, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
        misplaced = [jax.tree_util.keystr(path) for path, leaf in leaves if not is_leaf(leaf)]
        if misplaced or not leaves:
            got = f"something else at tree{misplaced[0]}" if misplaced else "none"
            raise TypeError(f"PerExampleGrads: expected a tree of tuples of factors, got {got}.")
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
        """Flatten the pytree, for JAX: the child is the parameters' tree with a `Leaf` of factors at each leaf."""
        return ((jax.tree_util.GetAttrKey("factors"), self._held),), self.chunk_bytes

    @classmethod
    def tree_unflatten(cls, chunk_bytes: int, children: Sequence[PyTree]) -> Self:
        """Rebuild the pytree, for JAX, without checks."""
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

    def _with(self, leaves: Sequence[Leaf]) -> Self:
        return self.tree_unflatten(self.chunk_bytes, (self._tree(leaves),))

    def _tree(self, leaves: Sequence[Any]) -> PyTree:
        return jax.tree.unflatten(self._treedef, leaves)

    def _map_leaves(self, function: Callable[[Leaf], Any]) -> PyTree:
        return self._tree([function(leaf) for leaf in self._leaves])

    # --- on an explicit mesh

    def sharded_as(self, params: Sequence[Any]) -> Self:
        """The same gradients, whose sums are sharded as these leaves of the parameters are."""
        spreads = [tuple(spread_over(p)) for p in params]
        pairs = zip(self._leaves, spreads, strict=True)
        return self._with([dataclasses.replace(leaf, spread=s if any(s) else ()) for leaf, s in pairs])

    @property
    def specs(self) -> PyTree:
        """How sums over the examples are sharded: a tree like the parameters, with a `PartitionSpec` for each."""
        return complexes.joined(self._map_leaves(lambda leaf: PartitionSpec(*leaf.spread)), lambda real, _: real)

    # --- attributes

    @property
    def paths(self) -> list[str]:
        """The path of every parameter, in the form of `jax.tree_util.keystr`."""
        leaves = jax.tree_util.tree_leaves_with_path(self._treedef.unflatten(range(self._treedef.num_leaves)))
        return [jax.tree_util.keystr(path) for path, _ in leaves]

    @property
    def factors(self) -> PyTree:
        """The parameters' tree with each leaf replaced by its tuple of factors, scaled as the gradients are."""
        return self._map_leaves(Leaf.weighted)

    @property
    def batch_size(self) -> int:
        """The number of examples, B."""
        return self._leaves[0].weight.shape[0]

    @property
    def nbytes(self) -> int:
        """The number of bytes that the factors hold; an array that two factors share is counted twice."""
        held = [a for leaf in self._leaves for f in leaf.factors for a in factors.arrays(f)]
        return sum(a.size * a.dtype.itemsize for a in held)

    @property
    def materialized_nbytes(self) -> int:
        """The number of bytes of the arrays that `materialize` would return."""
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
        except (AttributeError, IndexError, TypeError, ValueError):  # JAX also unflattens trees of other objects
            return f"PerExampleGrads({self._held})"
        return "\n".join([f"PerExampleGrads({held})", *lines])

    def with_chunk_bytes(self, chunk_bytes: int) -> Self:
        """Return the same gradients with a new limit on what their methods materialize at once.

        If the cheapest way to compute norms, moments or a Gram matrix materializes gradients, as many examples are
        materialized at a time as fit in `chunk_bytes`, and at least one. With the default of 64 MiB, the norms of
        gradients that are smaller than their factors may take twice that, or as much as the factors hold.

        Raises:
            ValueError: the number is below 1.
        """
        if operator.index(chunk_bytes) < 1:
            raise ValueError(f"PerExampleGrads.with_chunk_bytes: expected a number of bytes ≥ 1, got {chunk_bytes}.")
        return self.tree_unflatten(operator.index(chunk_bytes), (self._held,))

    # --- checks of arguments

    def _direction(self, tree: PyTree) -> list[Array]:
        structure: Any = jax.tree.structure(self._held, is_leaf=_is_parameter)
        treedef = jax.tree.structure(tree)
        if treedef != structure:
            raise ValueError(f"{caller()}: expected a tree like the parameters', {structure}, got {treedef}.")
        leaves, parts = jax.tree.flatten(complexes.parts(tree, sign=-1))
        if parts != self._treedef:
            raise ValueError(
                f"{caller()}: expected complex numbers where the parameters are, and only there, got "
                f"{jax.tree.map(jnp.result_type, tree)}."
            )
        for path, leaf, v in zip(self.paths, self._leaves, leaves, strict=True):
            if jnp.shape(v) != leaf.layout.shape:
                raise ValueError(f"{caller()}: expected shape {leaf.layout.shape} at {path}, got {jnp.shape(v)}.")
        return [jnp.asarray(v) for v in leaves]

    def _same_parameters(self, other: "FactorTree") -> None:
        if not isinstance(other, FactorTree):
            raise TypeError(not_gradients(other))
        if other._treedef != self._treedef:
            raise ValueError(
                f"{caller()}: expected the same tree of parameters, {self._treedef}, got {other._treedef}."
            )
        for path, leaf, leaf_ in zip(self.paths, self._leaves, other._leaves, strict=True):
            expected, got = leaf.layout, leaf_.layout
            if (expected.shape, expected.dtype) != (got.shape, got.dtype):
                raise ValueError(
                    f"{caller()}: expected {expected.dtype}{list(expected.shape)} at {path}, "
                    f"got {got.dtype}{list(got.shape)}."
                )


def not_gradients(g: Any) -> str:
    """The error message for an argument that should have been PerExampleGrads."""
    return (
        f"{caller()}: expected PerExampleGrads, as jg.per_example_grad(loss)(params, *batch) returns, got "
        f"{type(g).__name__}."
    )


def _is_leaf(node: Any) -> bool:
    return isinstance(node, Leaf)


def _is_parameter(node: Any) -> bool:
    return _is_leaf(node) or complexes.is_complex(node)
