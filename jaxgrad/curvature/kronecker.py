"""Kronecker factors of the Fisher matrix, one pair for every matrix of the parameters."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxgrad.per_example.algebra.chunks import sum_examples
from jaxgrad.per_example.algebra.factors import Factor, Outer, Windows, accumulator, wide
from jaxgrad.per_example.algebra.layout import Layout
from jaxgrad.per_example.gradients import PerExampleGrads
from jaxgrad.sharding import replicated


@functools.partial(jax.tree_util.register_dataclass, data_fields=("left", "right"), meta_fields=("layout",))
@dataclass(frozen=True)
class KroneckerFactors:
    """left ⊗ right ≈ the block of GᵀG/n of one matrix, with its entries in the order [G, F, K].

    Attributes:
        left: [G, F, F], mean_b Σ_t left left ᵀ, as a rule E[δδᵀ] of the cotangents.
        right: [G, K, K], mean_b mean_t right rightᵀ, as a rule E[aaᵀ] of the activations.
        layout: where [G, F, K] lies in the parameter.

    Example:
        >>> factors = kfac_factors(jg.per_example_grad(lambda W, x: (W @ x).sum())(jnp.ones((16, 9)), jnp.ones((4, 9))))
        >>> factors.left.shape, factors.right.shape, factors.layout.axes
        ((1, 16, 16), (1, 9, 9), (0, 1))
    """

    left: Any  # an Array, or what jax.eval_shape makes of one
    right: Any
    layout: Layout


def kfac_factors(g: PerExampleGrads) -> PyTree:
    """The Kronecker factors of every parameter whose gradient is held as one product: read off its two sides.

    Formula: for Σ_t left ⊗ right, (Σ_bt left leftᵀ/B, Σ_bt right rightᵀ/(BT)). Positions t (of a sequence, of a
    convolution) count as examples, as in KFC and KFAC-expand. Cost: a matrix product a side in place of the
    gradient's own, for square matrices 4/3 of a plain gradient's operations.

    The gradients of the loss on the data make this the empirical Fisher's; with labels drawn from the model it is the
    Fisher's. A constant that scales a product is on either side, and the Kronecker product does not depend on it; a
    number that differs from example to example belongs in the loss, and not in `scale` or `clip`.

    Args:
        g: gradients of B examples.

    Returns:
        The parameters' tree with `KroneckerFactors` at every leaf; None where it is no single `Outer` or `Windows`:
        biases, embeddings, matrices used in several ways, and those whose product over many positions was the smaller
        thing and is carried out (`explain` says "formed").

    Example:
        >>> loss = lambda p, x: jnp.tanh(p["W"] @ x + p["b"]).sum()
        >>> g = jg.per_example_grad(loss)({"W": jnp.ones((16, 9)), "b": jnp.ones(16)}, jnp.ones((4, 9)))
        >>> factors = kfac_factors(g)
        >>> factors["W"].left.shape, factors["W"].right.shape, factors["b"]
        ((1, 16, 16), (1, 9, 9), None)

    Source: Martens and Grosse 2015; Grosse and Martens 2016; Eschenhagen et al. 2023.
    """
    is_leaf = lambda node: isinstance(node, tuple) and all(isinstance(f, Factor) for f in node)  # noqa: E731
    return jax.tree.map(lambda leaf: _of(leaf), g.factors, is_leaf=is_leaf)


def _of(leaf: tuple[Factor, ...]) -> KroneckerFactors | None:
    if len(leaf) != 1:
        return None
    match wide(leaf[0], accumulator(*leaf)):
        case Outer() as f:
            sums, T = _sums(f), f.left.shape[2]
        case Windows() as f:
            sums = sum_examples(lambda w: _sums(w.unfolded()), f.at_once, f)
            T = jax.eval_shape(Windows.unfolded, f).left.shape[2]
        case _:
            return None
    left, right = sums
    B = f.left.shape[0]
    return KroneckerFactors(left / B, right / B / T, f.layout)  # B·T may not be an int32


def _sums(f: Outer) -> tuple[Float[Array, "G F F"], Float[Array, "G K K"]]:
    """Σ_bt left leftᵀ and Σ_bt right rightᵀ."""
    sides = (jnp.moveaxis(a, 1, 0).reshape(a.shape[1], a.shape[0] * a.shape[2], a.shape[3]) for a in (f.left, f.right))
    left, right = (jnp.matmul(a.mT, a, out_sharding=replicated(a)) for a in sides)
    return left, right
