"""Kronecker factors of the Fisher matrix, one pair for every weight matrix."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxgrad.per_example.algebra.chunks import sum_examples
from jaxgrad.per_example.algebra.factors import Factor, accumulator, at_once, unfolded, wide
from jaxgrad.per_example.algebra.layout import Layout
from jaxgrad.per_example.algebra.product import Product
from jaxgrad.per_example.gradients import PerExampleGrads
from jaxgrad.sharding import replicated


@functools.partial(jax.tree_util.register_dataclass, data_fields=("left", "right"), meta_fields=("layout",))
@dataclass(frozen=True)
class KroneckerFactors:
    """left ⊗ right, an approximation of one weight matrix's block of GᵀG/n, with its entries in the order [G, F, K].

    Attributes:
        left: [G, F, F], mean_b Σ_t left leftᵀ, usually E[δδᵀ] for the cotangents δ.
        right: [G, K, K], mean_b mean_t right rightᵀ, usually E[aaᵀ] for the activations a.
        layout: where the entries of [G, F, K] are in the parameter.

    Example:
        >>> factors = kfac_factors(jg.per_example_grad(lambda W, x: (W @ x).sum())(jnp.ones((16, 9)), jnp.ones((4, 9))))
        >>> factors.left.shape, factors.right.shape, factors.layout.matrix
        ((1, 16, 16), (1, 9, 9), (1, 16, 9))
    """

    left: Any  # an Array, or its jax.ShapeDtypeStruct
    right: Any
    layout: Layout


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
        The parameters' tree with `KroneckerFactors` at every leaf. It has None where the gradient is not a single
        `Outer` or `Windows`: for biases, embeddings, matrices used in several ways, and matrices whose gradient was
        materialized because it is smaller than the sides of its product over many positions ("smaller" in `explain`).

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
            sums = _sums(f)
        case Product(kind="Windows") as f:
            sums = sum_examples(lambda w: _sums(unfolded(w)), at_once(f), f)
        case _:
            return None
    left, right = sums
    B = f.left.shape[0]
    return KroneckerFactors(left / B, right / B / f.positions, f.layout)  # not / (B * T), which may overflow int32


def _sums(f: Product) -> tuple[Float[Array, "G F F"], Float[Array, "G K K"]]:
    """Σ_bt left leftᵀ and Σ_bt right rightᵀ."""
    sides = (jnp.moveaxis(a, 1, 0).reshape(a.shape[1], a.shape[0] * a.shape[2], a.shape[3]) for a in f.sides())
    left, right = (jnp.matmul(a.mT, a, out_sharding=replicated(a)) for a in sides)
    return left, right
