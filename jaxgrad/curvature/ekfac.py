"""EK-FAC: the Fisher matrix in the eigenvectors of its Kronecker factors, with the eigenvalues corrected."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxgrad.curvature.damping import absolute_damping, checked_damping
from jaxgrad.curvature.kronecker import KroneckerFactors, is_factors
from jaxgrad.curvature.solve import in_full_precision
from jaxgrad.errors import caller, naming
from jaxgrad.per_example.algebra import complexes, moments
from jaxgrad.per_example.algebra.chunks import chunk_size, sum_examples
from jaxgrad.per_example.algebra.factors import accumulator, wide, written_out
from jaxgrad.per_example.algebra.layout import Layout
from jaxgrad.per_example.algebra.leaf import Leaf
from jaxgrad.per_example.algebra.product import Product
from jaxgrad.per_example.gradients import PerExampleGrads, checked_gradients
from jaxgrad.precision import added
from jaxgrad.sharding import gathered, with_automatic_axes


@functools.partial(jax.tree_util.register_dataclass, data_fields=("left", "right", "values"), meta_fields=("layout",))
@dataclass(frozen=True)
class Eigenbasis:
    """One parameter's block of an `EKFAC`: (left ⊗ right) diag(values) (left ⊗ right)ᵀ.

    Attributes:
        left: [G, F, F], orthogonal; None for a diagonal block.
        right: [G, K, K], orthogonal; None for a diagonal block.
        values: [G, F, K], or [*shape] for a diagonal block: the mean squares of the gradients in this basis.
        layout: where the entries of [G, F, K] are in the parameter; elsewhere the gradient is zero.

    Example:
        >>> g = jg.per_example_grad(lambda W, x: jnp.tanh(W @ x).sum())(jnp.ones((16, 9)), jnp.ones((4, 9)))
        >>> block = ekfac(jg.curvature.kfac_factors(g), g).blocks
        >>> block.left.shape, block.right.shape, block.values.shape
        ((1, 16, 16), (1, 9, 9), (1, 16, 9))
    """

    left: Any
    right: Any
    values: Any
    layout: Layout

    def map(self, function: Any, V: Array) -> Array:
        """The matrix whose eigenvalues are function(values), which is function(0) elsewhere, times V [*shape]."""
        V = V.astype(self.values.dtype)
        if self.left is None:
            return function(self.values) * V
        inside = self.layout.to_matrix(V)
        coordinates = jnp.einsum("gfa,gfk,gkb->gab", self.left, inside, self.right)
        found = jnp.einsum("gfa,gab,gkb->gfk", self.left, function(self.values) * coordinates, self.right)
        if inside.size == V.size:
            return self.layout.from_matrix(found)
        zero = function(jnp.zeros((), V.dtype))
        return self.layout.from_matrix(found - zero * inside) + zero * V


@functools.partial(jax.tree_util.register_dataclass, data_fields=("blocks",), meta_fields=())
@dataclass(frozen=True)
class EKFAC:
    """A block-diagonal approximation F of the Fisher matrix, which `ekfac` returns.

    Attributes:
        blocks: the parameters' tree with an `Eigenbasis` at every leaf.

    Example:
        >>> g = jg.per_example_grad(lambda W, x: (W @ x).sum())(jnp.ones((16, 9)), jnp.eye(9))
        >>> F = ekfac(jg.curvature.kfac_factors(g), g)
        >>> v = jnp.ones((16, 9))
        >>> bool(jnp.allclose(F.product(F.solve(v, 0.5)) + 0.5 * F.solve(v, 0.5), v, atol=1e-5))
        True
    """

    blocks: PyTree

    def trace(self) -> Array:
        """The trace of F: the mean squared norm of the gradients."""
        return added([block.values.sum() for block in jax.tree.leaves(self.blocks, is_leaf=_is_block)])

    @naming("EKFAC.product")
    def product(self, v: PyTree) -> PyTree:
        """F v, a tree like v."""
        return self._mapped(lambda values: values, v)

    @naming("EKFAC.solve")
    def solve(self, v: PyTree, damping: Any) -> PyTree:
        """(F + μI)⁻¹ v, a tree like v.

        Args:
            v: a direction with the parameters' structure and shapes.
            damping: μ > 0, or `relative(ratio)`.

        Raises:
            ValueError: the damping is not a number > 0, or the tree of the direction is not the parameters'.
        """
        checked_damping(damping, positive=True)
        mu = absolute_damping(damping, self.trace())
        return self._mapped(lambda values: 1 / (values + jnp.asarray(mu, values.dtype)), v)

    @in_full_precision
    def _mapped(self, function: Any, v: PyTree) -> PyTree:
        parts = complexes.parts(v, sign=-1)
        directions, blocks = jax.tree.leaves(parts), jax.tree.leaves(self.blocks, is_leaf=_is_block)
        treedef: Any = jax.tree.structure(parts)
        structure: Any = jax.tree.structure(self.blocks, is_leaf=_is_block)
        if treedef != structure:
            raise ValueError(f"{caller()}: expected a tree like the parameters', {structure}, got {treedef}.")
        found = [block.map(function, a).astype(a.dtype) for block, a in zip(blocks, directions, strict=True)]
        return complexes.joined(jax.tree.unflatten(treedef, found), complexes.gradient)


def _is_block(node: Any) -> bool:
    return isinstance(node, Eigenbasis)


@naming("ekfac")
@in_full_precision
def ekfac(factors: PyTree, g: PerExampleGrads) -> EKFAC:
    """EK-FAC: the eigenvectors of Kronecker factors, with the mean squares of the gradients along them as eigenvalues.

    Formula: for factors A ⊗ S with the eigenvectors U and V, F is (U ⊗ V) diag(Λ) (U ⊗ V)ᵀ with
    Λ = mean_b (Uᵀ G_b V)². Of all matrices with these eigenvectors it is the nearest to the block of GᵀG/B, in the
    Frobenius norm; the Kronecker product itself is another of them. A parameter without factors has a diagonal
    block, its second moment. Cost: two decompositions for each matrix, and products of the gradients with the
    eigenvectors; one position has its two sides multiplied, and what has many is materialized a few examples at a time.

    Averages over batches: average the factors first, call this for each batch with the same factors, and average the
    results, each with `jax.tree.map`.

    Args:
        factors: the parameters' tree with `KroneckerFactors` or None at every leaf: the result of `kfac` or
            `kfac_factors`.
        g: gradients of B examples.

    Returns:
        `EKFAC`, with `solve` and `product`.

    Raises:
        TypeError: the gradients are not PerExampleGrads.
        ValueError: the factors belong to different parameters.

    Example:
        >>> loss = lambda p, x: jnp.tanh(p["W"] @ x + p["b"]).sum()
        >>> params, x = {"W": jnp.ones((16, 9)), "b": jnp.ones(16)}, jnp.ones((4, 9))
        >>> F = ekfac(jg.curvature.kfac(loss)(params, x), jg.per_example_grad(loss)(params, x))
        >>> F.solve(params, damping=jg.curvature.relative(1e-2))["b"].shape
        (16,)

    Source: George et al. 2018; for influence, Grosse et al. 2023.
    """
    checked_gradients(g)
    structure: Any = jax.tree.structure(factors, is_leaf=_is_factors_or_none)
    found = jax.tree.leaves(factors, is_leaf=_is_factors_or_none)
    if structure != g._treedef:
        raise ValueError(f"{caller()}: expected factors in the parameters' tree, {g._treedef}, got {structure}.")
    for path, leaf, f in zip(g.paths, g._leaves, found, strict=True):
        if f is not None and f.layout.shape != leaf.layout.shape:
            raise ValueError(
                f"{caller()}: expected factors of shape {leaf.layout.shape} at {path}, got {f.layout.shape}."
            )
    blocks = [_block(f, leaf) for f, leaf in zip(found, g._leaves, strict=True)]
    return EKFAC(jax.tree.unflatten(structure, blocks))


def _block(factors: KroneckerFactors | None, leaf: Leaf) -> Eigenbasis:
    if factors is None:
        return Eigenbasis(None, None, _diagonal(leaf), leaf.layout)
    left, right = (jnp.linalg.eigh(gathered((a + a.mT) / 2))[1] for a in (factors.left, factors.right))
    return Eigenbasis(left, right, _squares(leaf, left, right, factors.layout), factors.layout)


@with_automatic_axes(by_example=False)
def _diagonal(leaf: Leaf) -> Array:
    return leaf.second_moment()


@with_automatic_axes(by_example=False)
def _squares(leaf: Leaf, left: Array, right: Array, layout: Layout) -> Array:
    """mean_b (leftᵀ G_b right)² [G, F, K]."""
    parts = leaf.weighted()
    acc = accumulator(*parts)
    parts, (left, right) = tuple(wide(f, acc) for f in parts), (a.astype(acc) for a in (left, right))
    f, B = parts[0], leaf.weight.shape[0]
    if len(parts) == 1 and isinstance(f, Product) and _few_positions(f, layout):
        a, b = f.sides()
        turned = f.with_sides(jnp.einsum("bgtf,gfa->bgta", a, left), jnp.einsum("bgtk,gka->bgta", b, right))
        return layout.to_matrix(moments.second_moment((turned,)))

    def block(parts: Any) -> Array:
        G = layout.to_matrix(added([written_out(f) for f in parts]).astype(acc))
        turned = jnp.einsum("bgfk,gka->bgfa", jnp.einsum("bgfk,gfa->bgak", G, left), right)
        return (turned**2).sum(0)

    size = chunk_size(3 * leaf.layout.size * acc.itemsize, B)
    return sum_examples(block, size, parts) / max(B, 1)


def _few_positions(f: Product, layout: Layout) -> bool:
    """Whether turning the two sides of a product takes less than turning what is materialized."""
    if f.kind != "Outer" or not f.layout.same_place(layout):
        return False
    _, F, K = layout.matrix
    return f.positions * (F * F + K * K) <= F * F * K + F * K * K


def _is_factors_or_none(node: Any) -> bool:
    return node is None or is_factors(node)
