"""Elementwise second moment and variance of one parameter's gradients."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array

from jaxgrad.per_example.algebra.chunks import chunk_size, sum_examples
from jaxgrad.per_example.algebra.factors import Factor, accumulator, wide, written_out
from jaxgrad.per_example.algebra.mapped import of_examples
from jaxgrad.per_example.algebra.product import Product
from jaxgrad.per_example.algebra.rows import Lookup, merged, with_values
from jaxgrad.per_example.algebra.weighted import weighted_sum

Factors = tuple[Factor, ...]


def second_moment(leaf: Factors) -> Array:
    """mean_b g_b ⊙ g_b of one parameter, in the accumulator's dtype, because half precision cannot hold the squares."""
    B, acc = _count(leaf), accumulator(*leaf)
    match tuple(wide(f, acc) for f in leaf):
        case (Product(left, right, row=None, windows=()) as f,) if f.positions == 1:
            squares = dataclasses.replace(f, left=left * left, right=None if right is None else right * right)
            total = weighted_sum(squares, None)
        case (Product(row=int()) as f,):
            values = merged(Lookup.of(f)) if f.positions > 1 else Lookup.of(f)
            total = weighted_sum(with_values(f, values.ids, values.values * values.values), None)
        case wide_leaf:
            total = _sum_of_squares(wide_leaf, None)
    return total / B if B else jnp.full_like(total, jnp.nan)


def variance(leaf: Factors) -> Array:
    """mean_b (g_b - ḡ) ⊙ (g_b - ḡ) of one parameter, in the accumulator's dtype.

    Formula for an Outer with T = 1: with left = l̄ + l, right = r̄ + r (l̄, r̄ their means over the examples),
    g_b - ḡ = l̄ r + l r̄ + (l r - E[l r]), and the mean square of that takes four matrix products of the centered
    sides. The terms are as small as the deviations: equal examples give 0, not the difference of two large squares.
    """
    B, acc, layout = _count(leaf), accumulator(*leaf), leaf[0].layout
    leaf = tuple(wide(f, acc) for f in leaf)
    if B == 0:
        return jnp.full(layout.shape, jnp.nan, acc)
    match leaf:
        case (Product(right=None) as f,):
            value = f.sides()[0]
            total = layout.from_matrix((_centred(value)[0] ** 2).mean(0).reshape(layout.matrix))
        case (Product(row=None, windows=()) as f,) if f.positions == 1:
            left, right = f.sides()
            total = layout.from_matrix(_outer_variance(left[:, :, 0], right[:, :, 0]))
        case _:
            terms = [weighted_sum(f, None) for f in leaf]
            total = _sum_of_squares(leaf, sum(terms[1:], terms[0]) / B) / B
    return total


def _outer_variance(left: Array, right: Array) -> Array:
    """[B, G, F], [B, G, K] → [G, F, K]."""
    B = left.shape[0]
    (dl, l_mean), (dr, r_mean) = _centred(left), _centred(right)

    def mean_of(a: Array, b: Array) -> Array:
        return jnp.einsum("bgf,bgk->gfk", a, b) / B

    l_mean, r_mean = l_mean[:, :, None], r_mean[:, None, :]
    cross = mean_of(dl, dr)
    squares = l_mean**2 * (dr * dr).mean(0)[:, None, :] + r_mean**2 * (dl * dl).mean(0)[:, :, None]
    crossed = l_mean * r_mean * cross + l_mean * mean_of(dl, dr * dr) + r_mean * mean_of(dl * dl, dr)
    total = squares + 2 * crossed + (mean_of(dl * dl, dr * dr) - cross**2)
    return jnp.maximum(total, jnp.zeros_like(total))


def _centred(a: Array) -> tuple[Array, Array]:
    """(a - mean, mean) over the examples; centered twice, because the mean itself is rounded."""
    mean = a.mean(0)
    deviation = a - mean[None]
    rest = deviation.mean(0)
    return deviation - rest[None], mean + rest


def _sum_of_squares(leaf: Factors, mean: Array | None) -> Array:
    """Σ_b (g_b - mean)², with one block of examples materialized at a time; corrected for rounding of the mean."""
    layout, B = leaf[0].layout, _count(leaf)

    def block(leaf: Factors) -> Array:
        terms = [written_out(f) for f in leaf]
        gradients = sum(terms[1:], terms[0])
        if mean is None:
            return (gradients**2).sum(0)
        deviations = gradients - mean[None]
        return jnp.stack([(deviations**2).sum(0), deviations.sum(0)])

    size = chunk_size(2 * layout.size * accumulator(*leaf).itemsize, B)
    total = sum_examples(block, size, leaf)
    if mean is None:
        return total
    return jnp.maximum(total[0] - total[1] ** 2 / B, jnp.zeros_like(total[0]))


def _count(leaf: Factors) -> int:
    return of_examples(leaf)[0].shape[0]
