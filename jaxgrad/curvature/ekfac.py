"""EK-FAC: the Fisher matrix in the eigenvectors of its Kronecker factors, with the eigenvalues corrected."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxgrad.curvature.damping import absolute_damping, checked_damping
from jaxgrad.curvature.joint import Bias, to_matrix, with_outside
from jaxgrad.curvature.kronecker import KroneckerFactors, is_factors
from jaxgrad.curvature.solve import in_full_precision
from jaxgrad.errors import caller, naming
from jaxgrad.per_example.algebra import complexes, moments
from jaxgrad.per_example.algebra.chunks import chunk_size, sum_examples
from jaxgrad.per_example.algebra.factors import Factor, accumulator, wide, written_out
from jaxgrad.per_example.algebra.layout import Layout
from jaxgrad.per_example.algebra.leaf import Leaf
from jaxgrad.per_example.algebra.product import Product
from jaxgrad.per_example.gradients import PerExampleGrads, checked_gradients
from jaxgrad.precision import added
from jaxgrad.sharding import gathered, with_automatic_axes


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("left", "right", "values"), meta_fields=("layout", "bias")
)
@dataclass(frozen=True)
class Eigenbasis:
    """One parameter's block of an `EKFAC`: (left ⊗ right) diag(values) (left ⊗ right)ᵀ.

    Attributes:
        left: [G, F, F], orthogonal; None for a diagonal block.
        right: [G, K, K], orthogonal; None for a diagonal block.
        values: [G, F, K], or [*shape] for a diagonal block: the mean squares of the gradients in this basis.
        layout: where the entries of [G, F, K] are in the parameter; elsewhere the gradient is zero.
        bias: the `Bias` in the same block, if there is one; K is then one more, and its last entries are the bias's.

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
    bias: Bias | None = None

    def map(self, function: Any, parts: Sequence[Array]) -> list[Array]:
        """The matrix whose eigenvalues are function(values), which is function(0) elsewhere, times V [*shape].

        Args:
            function: a function of the eigenvalues.
            parts: [V], with a bias [V, v].
        """
        parts = [part.astype(self.values.dtype) for part in parts]
        if self.left is None:
            return [function(self.values) * parts[0]]
        inside = to_matrix(self.layout, self.bias, parts)
        coordinates = jnp.einsum("gfa,gfk,gkb->gab", self.left, inside, self.right)
        found = jnp.einsum("gfa,gab,gkb->gfk", self.left, function(self.values) * coordinates, self.right)
        outside = function(jnp.zeros((), self.values.dtype))
        return with_outside(self.layout, self.bias, found, inside, outside, parts)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("blocks",), meta_fields=())
@dataclass(frozen=True)
class EKFAC:
    """A block-diagonal approximation F of the Fisher matrix, which `ekfac` returns.

    Attributes:
        blocks: the parameters' tree with an `Eigenbasis` at every leaf; None at a bias that is in its weight's block.

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
        directions, treedef = jax.tree_util.tree_flatten_with_path(complexes.parts(v, sign=-1))
        blocks = _at_leaves(self.blocks, treedef, _is_block)
        if blocks is None:
            expected = _structure(self.blocks, _is_block)
            raise ValueError(f"{caller()}: expected a tree like the parameters', {expected}, got {treedef}.")
        arrays = {jax.tree_util.keystr(path): jnp.asarray(a) for path, a in directions}
        found: dict[str, Array] = {}
        for path, block in zip(arrays, blocks, strict=True):
            if block is not None:
                paths = [path] if block.bias is None else [path, block.bias.path]
                results = block.map(function, [arrays[name] for name in paths])
                found |= dict(zip(paths, results, strict=True))
        results = [found[path].astype(a.dtype) for path, a in arrays.items()]
        return complexes.joined(jax.tree.unflatten(treedef, results), complexes.gradient)


def _is_block(node: Any) -> bool:
    return isinstance(node, Eigenbasis)


def _at_leaves(tree: PyTree, treedef: Any, is_node: Callable[[Any], bool]) -> list[Any] | None:
    """What a tree has at the leaves of the parameters' tree: such nodes, or None; None for another tree."""
    try:
        nodes: list[Any] = treedef.flatten_up_to(tree)
    except ValueError:
        return None
    return nodes if all(node is None or is_node(node) for node in nodes) else None


def _structure(tree: PyTree, is_node: Callable[[Any], bool]) -> Any:
    return jax.tree.structure(tree, is_leaf=lambda node: node is None or is_node(node))


@naming("ekfac")
@in_full_precision
def ekfac(factors: PyTree, g: PerExampleGrads) -> EKFAC:
    """EK-FAC: the eigenvectors of Kronecker factors, with the mean squares of the gradients along them as eigenvalues.

    Formula: for factors A ⊗ S with the eigenvectors U and V, F is (U ⊗ V) diag(Λ) (U ⊗ V)ᵀ with
    Λ = mean_b (Uᵀ G_b V)². Of all matrices with these eigenvectors it is the nearest to the block of GᵀG/B, in the
    Frobenius norm; the Kronecker product itself is another of them. If the factors are those of a weight and its bias,
    the bias is the last column of G_b. A parameter without factors has a diagonal block, its second moment. Cost: two
    decompositions for each matrix, and products of the gradients with the eigenvectors; one position has its two sides
    multiplied, and what has many is materialized a few examples at a time.

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
    leaves, found = dict(zip(g.paths, g._leaves, strict=True)), _checked(factors, g)
    of_weights = {f.bias.path for f in found.values() if f is not None and f.bias is not None}
    blocks: list[Eigenbasis | None] = []
    for path, leaf in leaves.items():
        f = found[path]
        bias = leaves[f.bias.path] if f is not None and f.bias is not None else None
        blocks.append(None if path in of_weights else _block(f, leaf, bias))
    return EKFAC(jax.tree.unflatten(g._treedef, blocks))


def _checked(factors: PyTree, g: PerExampleGrads) -> dict[str, KroneckerFactors | None]:
    """The factors by path; raise ValueError if they belong to other parameters."""
    nodes = _at_leaves(factors, g._treedef, is_factors)
    if nodes is None:
        got = _structure(factors, is_factors)
        raise ValueError(f"{caller()}: expected factors in the parameters' tree, {g._treedef}, got {got}.")
    found = dict(zip(g.paths, nodes, strict=True))
    shapes = {path: leaf.layout.shape for path, leaf in zip(g.paths, g._leaves, strict=True)}
    layouts = [(path, f.layout) for path, f in found.items() if f is not None]
    layouts += [(f.bias.path, f.bias.layout) for f in found.values() if f is not None and f.bias is not None]
    for path, layout in layouts:
        if layout.shape != shapes.get(path):
            shape = shapes.get(path)
            raise ValueError(f"{caller()}: expected factors of shape {shape} at {path}, got {layout.shape}.")
    return found


def _block(factors: KroneckerFactors | None, leaf: Leaf, bias: Leaf | None) -> Eigenbasis:
    if factors is None:
        return Eigenbasis(None, None, _diagonal(leaf), leaf.layout)
    left, right = (jnp.linalg.eigh(gathered((a + a.mT) / 2))[1] for a in (factors.left, factors.right))
    values = _squares(leaf, bias, left, right, factors)
    return Eigenbasis(left, right, values, factors.layout, factors.bias)


@with_automatic_axes(by_example=False)
def _diagonal(leaf: Leaf) -> Array:
    return leaf.second_moment()


@with_automatic_axes(by_example=False)
def _squares(leaf: Leaf, bias: Leaf | None, left: Array, right: Array, factors: KroneckerFactors) -> Array:
    """mean_b (leftᵀ G_b right)² [G, F, K]; the last column of G_b is the bias's gradient, if there is one."""
    of_weight, of_bias = leaf.weighted(), () if bias is None else bias.weighted()
    acc, layout, B = accumulator(*of_weight, *of_bias), factors.layout, leaf.weight.shape[0]
    of_weight, of_bias = (tuple(wide(f, acc) for f in part) for part in (of_weight, of_bias))
    left, right = left.astype(acc), right.astype(acc)

    def materialized(parts: tuple[Factor, ...]) -> Array:
        return added([written_out(f) for f in parts]).astype(acc)

    f = _few_positions(of_weight, layout)
    if f is not None:
        a, b = f.sides()
        turned = jnp.einsum("bgtf,gfa->bgta", a, left), jnp.einsum("bgtk,gka->bgta", b, right[:, : b.shape[3]])
        if factors.bias is None:
            return layout.to_matrix(moments.second_moment((f.with_sides(*turned),)))
        column = jnp.einsum("bgfk,gfa->bgka", factors.bias.layout.to_matrix(materialized(of_bias)), left)
        return _squares_with_bias(*turned, column, right[:, -1:]) / max(B, 1)

    def block(*parts: tuple[Factor, ...]) -> Array:
        arrays = [materialized(part) for part in parts if part]
        G = to_matrix(layout, factors.bias, arrays)
        turned = jnp.einsum("bgfk,gka->bgfa", jnp.einsum("bgfk,gfa->bgak", G, left), right)
        return (turned**2).sum(0)

    size = chunk_size(3 * leaf.layout.size * acc.itemsize, B)
    return sum_examples(block, size, of_weight, of_bias) / max(B, 1)


def _squares_with_bias(x: Array, y: Array, column: Array, row: Array) -> Array:
    """Σ_b (Σ_t x_bt y_btᵀ + column_b rowᵀ)² [G, F, K] for x [B, G, T, F], y [B, G, T, K], column [B, G, 1, F] and row
    [G, 1, K].

    For T = 1 column is x, if the bias's gradients are those of the same loss. It is split into s·x + rest, so that the
    first term, x (y + s·row)ᵀ, is squared as it is: the squares of the two products would be large and cancel.
    """
    if x.shape[2] > 1:
        last = jnp.broadcast_to(row[None], (x.shape[0], *row.shape))
        sides = jnp.concatenate([x, column], 2), jnp.concatenate([y, last], 2)
        size = chunk_size(2 * x[0, :, 0].size * y.shape[3] * x.dtype.itemsize, x.shape[0])
        return sum_examples(lambda a, b: (jnp.einsum("bgtf,bgtk->bgfk", a, b) ** 2).sum(0), size, *sides)
    x, y, column = x[:, :, 0], y[:, :, 0], column[:, :, 0]
    norms = (x * x).sum(-1, keepdims=True)
    s = (column * x).sum(-1, keepdims=True) / jnp.where(norms == 0, jnp.ones_like(norms), norms)
    rest, z = column - s * x, y + s * row[None, :, 0]
    squares = jnp.einsum("bgf,bgk->gfk", x * x, z * z)
    crossed = 2 * jnp.einsum("bgf,bgk->gfk", x * rest, z) * row
    total = squares + crossed + (rest * rest).sum(0)[..., None] * row**2
    return jnp.maximum(total, jnp.zeros_like(total))


def _few_positions(parts: tuple[Factor, ...], layout: Layout) -> Product | None:
    """The only product, if turning its two sides takes less than turning what is materialized."""
    if len(parts) != 1 or not isinstance(parts[0], Product) or parts[0].kind != "Outer":
        return None
    _, F, K = layout.matrix
    for f in (parts[0], parts[0].turned()):
        if f.layout.same_place(layout) and f.positions * (F * F + K * K) <= F * F * K + F * K * K:
            return f
    return None
