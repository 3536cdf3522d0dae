"""Kronecker factors of the Fisher matrix, one pair for each weight matrix whose gradient is a product."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxgrad.curvature.damping import absolute_damping, checked_damping
from jaxgrad.curvature.joint import Bias, checked_parts, to_matrix, with_outside
from jaxgrad.curvature.solve import damped_solve, in_full_precision
from jaxgrad.errors import naming
from jaxgrad.per_example.algebra.chunks import sum_examples
from jaxgrad.per_example.algebra.factors import Factor, accumulator, at_once, unfolded, wide
from jaxgrad.per_example.algebra.layout import Layout
from jaxgrad.per_example.algebra.product import Product
from jaxgrad.per_example.gradients import PerExampleGrads
from jaxgrad.sharding import replicated


@functools.partial(jax.tree_util.register_dataclass, data_fields=("left", "right"), meta_fields=("layout", "bias"))
@dataclass(frozen=True)
class KroneckerFactors:
    """left ⊗ right, an approximation of one weight matrix's block of GᵀG/n, with its entries in the order [G, F, K].

    Attributes:
        left: [G, F, F], mean_b Σ_t left leftᵀ, usually E[δδᵀ] for the cotangents δ.
        right: [G, K, K], mean_b mean_t right rightᵀ, usually E[aaᵀ] for the activations a.
        layout: where the entries of [G, F, K] are in the parameter.
        bias: the `Bias` that is in the same block, if there is one: `left` is then the moment of δ, and `right`,
            [G, K + 1, K + 1], that of (a, 1).

    Example:
        >>> factors = kfac_factors(jg.per_example_grad(lambda W, x: (W @ x).sum())(jnp.ones((16, 9)), jnp.ones((4, 9))))
        >>> factors.left.shape, factors.right.shape, factors.layout.matrix
        ((1, 16, 16), (1, 9, 9), (1, 16, 9))
    """

    left: Any  # an Array, or its jax.ShapeDtypeStruct
    right: Any
    layout: Layout
    bias: Bias | None = None

    @in_full_precision
    def solve(self, V: Any, damping: Any) -> Any:
        """(left + √μ/π I)⁻¹ V (right + π√μ I)⁻¹ for a V of the parameter's shape, with the damping split as in K-FAC.

        π² is the mean eigenvalue of `right` divided by that of `left`, so that both are damped to the same degree. The
        result approximates (left ⊗ right + μI)⁻¹ V; `ekfac` has that inverse without this approximation.

        Args:
            V: an array of the parameter's shape; what is outside the layout is divided by μ. If there is a bias, a
                pair: an array of the weight's shape and one of the bias's.
            damping: μ > 0, or `relative(ratio)`, for that multiple of the trace of left ⊗ right.

        Returns:
            An array or a pair, like V.

        Raises:
            ValueError: the damping is not a number > 0; or V is not a pair where there is a bias, or is one where there
                is none.
        """
        with naming("KroneckerFactors.solve"):
            checked_damping(damping, positive=True)
            parts = checked_parts(self.layout, self.bias, V)
        traces = [jnp.trace(a, axis1=1, axis2=2) for a in (self.left, self.right)]
        mu = jnp.asarray(absolute_damping(damping, (traces[0] * traces[1]).sum()), self.left.dtype)
        means = [t / a.shape[1] for t, a in zip(traces, (self.left, self.right), strict=True)]
        either = (means[0] == 0) | (means[1] == 0)
        pi = jnp.sqrt(jnp.where(either, jnp.ones_like(mu), means[1] / jnp.where(either, jnp.ones_like(mu), means[0])))
        wide_parts = [part.astype(self.left.dtype) for part in parts]
        inside = to_matrix(self.layout, self.bias, wide_parts)
        found = _damped(self.left, jnp.sqrt(mu) / pi, inside)
        found = _damped(self.right, jnp.sqrt(mu) * pi, found.mT).mT
        solved = with_outside(self.layout, self.bias, found, inside, 1 / mu, wide_parts)
        results = [a.astype(part.dtype) for a, part in zip(solved, parts, strict=True)]
        return results[0] if self.bias is None else tuple(results)


def _damped(a: Array, ridge: Array, b: Array) -> Array:
    """(a + ridge I)⁻¹ b for each group."""
    return jax.vmap(damped_solve)(a, b, ridge)


def is_factors(node: Any) -> bool:
    """Test for `KroneckerFactors`, for JAX's `is_leaf`."""
    return isinstance(node, KroneckerFactors)


def kfac_factors(g: PerExampleGrads) -> PyTree:
    """The Kronecker factors of every parameter whose gradient is held as one product, from the product's two sides.

    Formula: for Σ_t left ⊗ right, (Σ_bt left leftᵀ/B, Σ_bt right rightᵀ/(BT)). Positions t (in a sequence or a
    convolution) count as examples, as in KFC and KFAC-expand. Cost: one matrix product per side replaces the matrix
    product of the gradient; for square matrices, this takes 4/3 of the operations of a plain gradient.

    If the gradients are those of the loss on the data, the factors approximate the empirical Fisher matrix; if the
    labels are drawn from the model, the factors approximate the Fisher matrix. A constant that scales a product may be
    on either side, because the Kronecker product is the same. Put a number that differs between examples into the loss,
    not into `scale` or `clip`.

    Args:
        g: gradients of B examples.

    Returns:
        The parameters' tree with `KroneckerFactors` at every leaf, without biases: gradients do not tell whether a bias
        is added to a product of a weight, which `kfac` sees. The tree has None where the gradient is not a single
        `Outer` or `Windows`: for biases, embeddings, matrices used in several ways, and matrices whose gradient was
        materialized because it is smaller than the sides of its product over many positions ("smaller" in `explain`);
        `kfac` has factors for the last.

    Example:
        >>> loss = lambda p, x: jnp.tanh(p["W"] @ x + p["b"]).sum()
        >>> g = jg.per_example_grad(loss)({"W": jnp.ones((16, 9)), "b": jnp.ones(16)}, jnp.ones((4, 9)))
        >>> factors = kfac_factors(g)
        >>> factors["W"].left.shape, factors["W"].right.shape, factors["b"]
        ((1, 16, 16), (1, 9, 9), None)

    Source: Martens and Grosse 2015; Grosse and Martens 2016; Eschenhagen et al. 2023.
    """
    is_leaf = lambda node: isinstance(node, tuple) and all(isinstance(f, Factor) for f in node)  # noqa: E731
    return jax.tree.map(_leaf_factors, g.factors, is_leaf=is_leaf)


def _leaf_factors(leaf: tuple[Factor, ...]) -> KroneckerFactors | None:
    if len(leaf) != 1:
        return None
    match wide(leaf[0], accumulator(*leaf)):
        case Product(kind="Outer") as f:
            left, right = sums(f)
        case Product(kind="Windows") as f:
            left, right = sum_examples(lambda w: sums(unfolded(w)), at_once(f), f)
        case _:
            return None
    B = f.left.shape[0]
    return KroneckerFactors(left / B, right / B / f.positions, f.layout)  # not / (B * T), which may overflow int32


def sums(f: Product, reduced: bool = False, extended: bool = False) -> tuple[Array, Array]:
    """Σ_bt left leftᵀ [G, F, F] and Σ_bt right rightᵀ [G, K, K].

    Args:
        f: a product of arrays.
        reduced: whether each side is first summed over t.
        extended: whether `right` is first extended by a 1 at each position, for a bias.
    """
    left, right = f.sides()
    if extended:
        right = jnp.concatenate([right, jnp.ones_like(right[..., :1])], -1)
    both = (a.sum(2, keepdims=True) if reduced else a for a in (left, right))
    sides = (jnp.moveaxis(a, 1, 0).reshape(a.shape[1], a.shape[0] * a.shape[2], a.shape[3]) for a in both)
    left, right = (jnp.matmul(a.mT, a, out_sharding=replicated(a)) for a in sides)
    return left, right
