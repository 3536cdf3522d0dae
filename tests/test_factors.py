"""Every operation on factors gives what it gives on the materialized matrix: float64, 1e-12, by hypothesis."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import FUZZ
from jaxgrad.per_example import Dense, Outer, PerExampleGrads, Rows
from jaxgrad.per_example.algebra import chunks, inner_products, sums
from jaxgrad.per_example.algebra.rows import Lookup

# The parameter always has this many rows and columns; a factor may see it transposed or in groups.
SHAPES = [(4, 6), (6, 4), (1, 3), (2, 2)]
KINDS = ["outer", "outer transposed", "outer grouped", "rows", "rows transposed", "rows repeated", "dense"]
CHUNKS = [1, 700, 2**26]


def normal(seed, *shape, dtype=np.float64):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(dtype))


def factor(kind, seed, B, T, shape, dtype=np.float64):
    F, K = shape
    match kind:
        case "outer":
            return outer(normal(seed, B, T, F, dtype=dtype), normal(seed + 1, B, T, K, dtype=dtype))
        case "outer transposed":
            left, right = normal(seed, B, T, K, dtype=dtype), normal(seed + 1, B, T, F, dtype=dtype)
            return Outer.of("tk,tf->fk", left, right, dtype)
        case "outer grouped":  # the rows fall into two groups, if they do
            G = 2 if F % 2 == 0 else 1
            left, right = normal(seed, B, G, T, F // G, dtype=dtype), normal(seed + 1, B, G, T, K, dtype=dtype)
            return Outer.of("gtf,gtk->(gf)k", left, right, dtype)
        case "rows" | "rows transposed" | "rows repeated":
            N, E = (K, F) if kind == "rows transposed" else (F, K)
            # repeated ids, and padding ids on both sides of the table; in any dtype that an index may have
            ids = jnp.asarray(np.random.default_rng(seed).integers(-2, N + 2, size=(B, T)))
            ids = ids.astype([jnp.int64, jnp.int32, jnp.int16, jnp.int8][seed % 4])
            values = normal(seed, *((B, E) if kind == "rows repeated" else (B, T, E)), dtype=dtype)
            return Rows.of_table(ids, values, N, dtype, transposed=kind == "rows transposed")
        case "dense":
            return Dense.of(normal(seed, B, F, K, dtype=dtype), dtype)


def outer(left, right):
    """Σ_t left ⊗ right for an [F, K] matrix."""
    return Outer.of("tf,tk->fk", left, right, left.dtype)


def dense_of(f):
    """The matrix, materialized by loops: the reference for everything."""
    G, F, K = f.layout.matrix
    if f.kind == "Dense":
        return np.asarray(f.left, np.float64).reshape(len(f.left), *f.shape)
    if f.kind == "Outer":
        left, right = (np.asarray(a, np.float64) for a in f.sides())
        out = np.zeros((len(left), G, F, K))
        for b, g, t in np.ndindex(left.shape[:3]):
            out[b, g] += np.outer(left[b, g, t], right[b, g, t])
    else:
        table = Lookup.of(f)
        ids, values = np.asarray(table.ids), np.asarray(table.values, np.float64)
        values = np.broadcast_to(values, (*ids.shape, values.shape[2]))
        out = np.zeros((len(ids), 1, F, K))
        for b, t in np.ndindex(ids.shape):
            if 0 <= ids[b, t] < F:
                out[b, 0, ids[b, t]] += values[b, t]
    order = [label for part in f.layout.order for label in part]
    out = out.reshape(len(out), *(f.sizes[label] for label in order))
    total = np.zeros((len(out), *f.shape))
    for index in np.ndindex(out.shape[1:]):
        at = tuple(a.start + sum(stride * index[order.index(x)] for x, stride in a.steps) for a in f.place)
        total[(slice(None), *at)] += out[(slice(None), *index)]
    return total


def close(found, expected, scale=1.0):
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12 * max(scale, 1e-300))


batches = st.sampled_from([0, 1, 2, 5])
positions = st.sampled_from([0, 1, 3, 9])
seeds = st.integers(0, 10**6)
shapes = st.sampled_from(SHAPES)
kinds = st.sampled_from(KINDS)


@given(kinds, seeds, batches, positions, shapes)
def test_materialize_and_the_linear_maps(kind, seed, B, T, shape):
    f = factor(kind, seed, B, T, shape)
    g, G = PerExampleGrads({"p": (f,)}), dense_of(f)
    V, c = normal(seed + 2, *shape), normal(seed + 3, B)
    close(g.materialize()["p"], G)
    close(g.dot({"p": V}), np.einsum("bij,ij->b", G, V), np.abs(G).sum())
    close(g.weighted_sum(c)["p"], np.einsum("bij,b->ij", G, c), np.abs(G).sum())
    close(g.sum()["p"], G.sum(0), np.abs(G).sum())
    if B:
        close(g.mean()["p"], G.mean(0), np.abs(G).sum())
    else:
        assert np.isnan(g.mean()["p"]).all()


@pytest.mark.every(0)
@given(kinds, kinds, seeds, batches, batches, positions, positions, shapes, st.sampled_from(CHUNKS))
@settings(max_examples=12 * FUZZ)
def test_inner_and_gram_of_every_pair_of_kinds(kind, kind_, seed, B, C, T, S, shape, chunk_bytes):
    f, f_ = factor(kind, seed, B, T, shape), factor(kind_, seed + 7, C, S, shape)
    expected = np.einsum("bij,cij->bc", dense_of(f), dense_of(f_))
    size = np.abs(dense_of(f)).sum() * np.abs(dense_of(f_)).sum()
    with chunks.at_most(chunk_bytes):
        close(inner_products.gram(f, f_), expected, size)
        if B == C:
            close(inner_products.inner(f, f_), np.diag(expected), size)


@pytest.mark.slow
@given(st.lists(kinds, min_size=1, max_size=3), seeds, batches, positions, shapes, st.sampled_from(CHUNKS))
@settings(max_examples=8 * FUZZ)
def test_norms_moments_and_gram_of_sums_of_factors(sum_of, seed, B, T, shape, chunk_bytes):
    fs = tuple(factor(kind, seed + 3 * i, B, T + i, shape) for i, kind in enumerate(sum_of))
    g, G = PerExampleGrads([fs], chunk_bytes), sum(dense_of(f) for f in fs)
    size = sum(np.abs(dense_of(f)).sum() for f in fs) ** 2
    close(g.squared_norms(), (G**2).sum((1, 2)), size)
    close(g.norms() ** 2, (G**2).sum((1, 2)), size)
    close(g.gram(), np.einsum("bij,cij->bc", G, G), size)
    if B:
        close(g.second_moment()[0], (G**2).mean(0), size)
        close(g.variance()[0], G.var(0), size)
    else:
        assert np.isnan(g.second_moment()[0]).all()
        assert np.isnan(g.variance()[0]).all()


@pytest.mark.every(0)
@given(kinds, seeds, batches, positions, shapes)
@settings(max_examples=3 * FUZZ)
def test_new_batches(kind, seed, B, T, shape):
    f = factor(kind, seed, B, T, shape)
    g, G = PerExampleGrads((f,)), dense_of(f)
    c, mask = normal(seed + 1, B), jnp.arange(B) % 2 == 0
    close(g.scale(c).materialize(), np.asarray(c)[:, None, None] * G)
    close(g.where(mask).materialize(), np.where(np.asarray(mask)[:, None, None], G, 0))
    close(g[1:].materialize(), G[1:])
    close(g[::-2].materialize(), G[::-2])
    close(g[jnp.flatnonzero(mask)].materialize(), G[::2])
    close(g[np.asarray(mask)].materialize(), G[::2])
    other = PerExampleGrads((factor(kind, seed + 1, 3, T + 2, shape),))
    both = PerExampleGrads.concatenate([g, other, g[:1]])
    close(both.materialize(), np.concatenate([G, dense_of(other.factors[0]), G[:1]]))


@pytest.mark.every(0)
@given(seeds, st.sampled_from([1, 4]), st.sampled_from([1, 2]), st.sampled_from([1, 5, 30]), st.sampled_from(CHUNKS))
@settings(max_examples=6 * FUZZ)
def test_both_ways_of_an_inner_product_are_exact(seed, B, G, T, chunk_bytes):
    """Through positions and through the matrix, whichever the cost model takes."""

    def grouped(seed, T):
        sides = normal(seed, B, G, T, 3), normal(seed + 1, B, G, T, 2)
        return Outer.of("gtf,gtk->gfk", *sides, jnp.float64)

    f, f_ = grouped(seed, T), grouped(seed + 2, 7)
    A, C = (dense_of(o).reshape(B, -1) for o in (f, f_))
    size = np.abs(A).sum() * np.abs(C).sum()
    with chunks.at_most(chunk_bytes):
        for pair in (inner_products._outer_outer, inner_products.inner):
            close(pair(f, f_), (A * C).sum(1), size)
        close(inner_products._through_matrix(f, f_), A @ C.T, size)
        close(inner_products._by_blocks(inner_products._outer_outer, f, f_, 100), A @ C.T, size)
        close(inner_products._written_out_blocks(f, f_), A @ C.T, size)


@pytest.mark.every(3)
@pytest.mark.parametrize("matrix", [(7, 2, 3), (2, 7, 3), (2, 3, 7)])
@pytest.mark.parametrize("chunk_bytes", [1, 3000, 2**26])
def test_the_matrix_is_sliced_along_its_longest_side(matrix, chunk_bytes):
    G, F, K = matrix
    sides = [(normal(s, B, G, 40, F), normal(s + 1, B, G, 40, K)) for s, B in ((0, 4), (2, 3))]
    f, f_ = (Outer.of("gtf,gtk->gfk", *pair, jnp.float64) for pair in sides)
    A, C = (dense_of(o).reshape(len(o.left), -1) for o in (f, f_))
    with chunks.at_most(chunk_bytes):
        close(inner_products.gram(f, f_), A @ C.T, np.abs(A).sum() * np.abs(C).sum())


def test_a_layout_is_a_bijection():
    layout = Outer.of("gfh,gk->fkgh", normal(0, 7, 4, 2, 5), normal(1, 7, 4, 3), jnp.float64).layout
    value = normal(0, 7, 2, 3, 4, 5)
    assert layout.to_matrix(value).shape == (7, 4, 10, 3)
    np.testing.assert_array_equal(layout.from_matrix(layout.to_matrix(value)), value)


@pytest.mark.usefixtures("plain_types")
def test_sides_that_do_not_fit_the_pattern_are_refused():
    with pytest.raises(ValueError, match=r"Outer\.of: expected sides as in tf,tk->fk, got \(4, 5, 3\) and \(4, 6, 2\)"):
        Outer.of("tf,tk->fk", normal(0, 4, 5, 3), normal(1, 4, 6, 2), jnp.float64)


# --- Numerics --------------------------------------------------------------------------------------------------


@pytest.mark.every(9)
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_low_precision_accumulates_in_float32(kind, dtype):
    f = factor(kind, 5, 4, 300, (4, 6), np.dtype(dtype))
    if kind == "dense":
        f = Dense.of(normal(1, 4, 4, 6, dtype=np.dtype(dtype)), dtype)
    g, G = PerExampleGrads((f,)), dense_of(f)
    assert g.norms().dtype == jnp.float32
    assert g.gram().dtype == jnp.float32
    assert g.materialize().dtype == dtype
    assert g.sum().dtype == dtype
    size = np.abs(G).sum((1, 2))
    np.testing.assert_allclose(g.norms(), np.sqrt((G**2).sum((1, 2))), rtol=2e-5)
    np.testing.assert_allclose(g.gram(), np.einsum("bij,cij->bc", G, G), atol=1e-5 * size.max() ** 2)
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(g.materialize(), np.float64), G, rtol=eps, atol=1e-4)


@pytest.mark.every(37)
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1e-30, 1e-4, 1e4, 1e30])
def test_a_norm_neither_overflows_nor_loses_its_small_terms(kind, dtype, size):
    """Squares of these numbers are beyond float32; their norms are not."""
    if dtype == jnp.float16 and size in (1e-30, 1e30):
        size = 1e-4 if size < 1 else 3e3
    f = factor(kind, 3, 5, 3, (4, 6), np.dtype(np.float32))
    if f.kind == "Outer":
        f = replace(f, left=(f.left * size).astype(dtype), right=f.right.astype(dtype))
    elif f.kind == "Rows":
        f = replace(f, right=(f.right * size).astype(dtype))
    else:
        f = Dense.of((f.left * size).astype(dtype), dtype)
    G = dense_of(f)
    expected = np.sqrt((G**2).sum((1, 2)))
    np.testing.assert_allclose(PerExampleGrads((f,)).norms(), expected, rtol=2e-5)
    sum_of_two = PerExampleGrads((f, f))
    np.testing.assert_allclose(sum_of_two.norms(), 2 * expected, rtol=2e-5)
    two_leaves = PerExampleGrads([(f,), (f,)])
    np.testing.assert_allclose(two_leaves.norms(), np.sqrt(2) * expected, rtol=2e-5)


@pytest.mark.every(4)
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("size", [1e-16, 1.0, 1e17])
@pytest.mark.parametrize("B", [3, 64])
def test_norms_through_matrices_are_those_of_float64(dtype, size, B):
    """With so many positions, gradients are materialized; the squares of their entries are beyond float32."""
    if dtype == jnp.float16:
        size = min(max(size, 0.01), 30.0)
    left, right = (np.asarray(normal(k, B, 300, n, dtype=np.float32)) * size for k, n in ((0, 40), (1, 24)))
    f = outer(jnp.asarray(left, dtype), jnp.asarray(right, dtype))
    assert inner_products.as_matrices((f,))
    expected = np.sqrt((dense_of(f) ** 2).sum((1, 2)))
    for g, times in ((PerExampleGrads((f,)), 1), (PerExampleGrads((f, f)), 2)):
        for norms in (g.norms(), jax.jit(lambda g: g.norms())(g), g.with_chunk_bytes(2 * 40 * 24 * 4).norms()):
            np.testing.assert_allclose(norms, times * expected, rtol=2e-6)


def test_norms_through_matrices_take_what_the_factors_hold_but_no_more_than_is_asked_for():
    f = jax.eval_shape(lambda: outer(*[jnp.zeros((64, 1024, 1024), jnp.float32)] * 2))  # holds 512 MiB

    def temporary(f, **options):
        def norms(f):
            g = PerExampleGrads((f,))
            return (g.with_chunk_bytes(**options) if options else g).norms()

        return jax.jit(norms).lower(f).compile().memory_analysis().temp_size_in_bytes

    materialized = 2**28
    assert materialized <= temporary(f) <= 1.1 * materialized
    assert temporary(f, chunk_bytes=2**24) < 2**27


def test_a_norm_counts_positions_where_a_huge_side_meets_a_tiny_one():
    """Each position's product is near 1; a single scale for all positions would lose both."""
    sizes = np.array([1e30, 1.0, 1e-30, 0.0], np.float32)[None, :, None]
    left = normal(0, 5, 4, 3, dtype=np.float32) * sizes
    right = normal(1, 5, 4, 6, dtype=np.float32) * sizes[:, [2, 1, 0, 3]]
    f = outer(left, right)
    expected = np.sqrt((dense_of(f) ** 2).sum((1, 2)))
    np.testing.assert_allclose(PerExampleGrads((f,)).norms(), expected, rtol=2e-6)
    huge = outer(left.at[:, 1].mul(np.float32(1e30)), right.at[:, 1].mul(np.float32(1e30)))
    assert np.isinf(PerExampleGrads((huge,)).norms()).all()


@pytest.mark.every(5)
@pytest.mark.parametrize("small", [1e-25, 1.0])
@pytest.mark.parametrize("T", [1, 2])
def test_a_zero_gradient_beside_huge_sides_does_not_hide_the_others(T, small):
    """As of a parameter behind units that are off, whose inputs are large; in another parameter, or in the same."""
    nothing = outer(jnp.zeros((3, T, 70), jnp.float32), jnp.full((3, T, 60), 1e30, jnp.float32))
    tiny = normal(1, 3, T, 60, dtype=np.float32) * np.float32(small)
    something = outer(normal(0, 3, T, 70, dtype=np.float32), tiny)
    vector = Dense.of(normal(2, 3, 4, dtype=np.float32) * np.float32(small), jnp.float32)
    expected = np.sqrt((dense_of(something) ** 2).sum((1, 2)))
    np.testing.assert_allclose(PerExampleGrads([(nothing,), (something,)]).norms(), expected, rtol=1e-5)
    np.testing.assert_allclose(PerExampleGrads([(nothing, something)]).norms(), expected, rtol=1e-5)
    expected = np.sqrt((dense_of(vector) ** 2).sum(1))
    g = PerExampleGrads([(nothing,), (vector,)])
    np.testing.assert_allclose(g.norms(), expected, rtol=1e-5)
    bound = np.float32(small * 1e-3)
    np.testing.assert_allclose(g.clip(bound).norms(), np.full(3, bound), rtol=1e-5)
    slope = jax.grad(lambda v: PerExampleGrads([(nothing,), (Dense.of(v, jnp.float32),)]).norms().sum())(vector.left)
    np.testing.assert_allclose(slope, dense_of(vector) / expected[:, None], rtol=1e-5)


@pytest.mark.every(2)
@pytest.mark.parametrize("n", [400, 600])
def test_a_norm_just_below_the_largest_number_is_finite(n):
    left, right = jnp.full((2, n), 1e17, jnp.float32), jnp.full((2, n), 2e17, jnp.float32)
    g = PerExampleGrads([(Outer.of_matrix(left, right, jnp.float32),), (Dense.of(left, jnp.float32),)])
    np.testing.assert_allclose(g.norms(), n * 2e34, rtol=1e-5)


def test_factors_of_a_loop_and_of_a_mean_of_rows_concatenate_with_others():
    plain = factor("outer", 0, 3, 4, (4, 6))
    looped = replace(plain, stepped=True)
    rows = factor("rows", 0, 3, 4, (4, 6))
    repeated = Rows.of_table(rows.left, rows.right[:, 0], 4, rows.dtype)
    for f, f_ in ((plain, looped), (rows, repeated)):
        both = PerExampleGrads.concatenate([PerExampleGrads([(f,)]), PerExampleGrads([(f_,)])])
        close(both.materialize()[0], np.concatenate([dense_of(f), dense_of(f_)]))


@pytest.mark.every(0)
def test_variance_does_not_cancel():
    """A mean a million times the deviations: mean of squares minus square of mean has no digit left in float32."""
    deviations = 1e-3 * np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    left, right = jnp.asarray(1000 + deviations), jnp.ones((50, 2), jnp.float32)
    g = PerExampleGrads((Outer.of_matrix(left, right, jnp.float32),))
    expected = np.broadcast_to(np.asarray(left, np.float64).var(0)[:, None], (3, 2))
    np.testing.assert_allclose(g.variance(), expected, rtol=1e-3)
    same = PerExampleGrads((Outer.of_matrix(left[:1].repeat(7, 0), right[:7], jnp.float32),))
    np.testing.assert_array_equal(same.variance(), 0)


@pytest.mark.every(9)
@pytest.mark.parametrize("kind", KINDS)
def test_one_nan_example_leaves_the_others_bit_identical_and_where_removes_it_from_sums(kind):
    f = factor(kind, 11, 5, 3, (4, 6), np.dtype(np.float32))

    def poisoned(a):
        return a.at[2].set(jnp.nan) if jnp.issubdtype(a.dtype, jnp.floating) else a

    if f.kind == "Rows":
        f = replace(f, left=jnp.abs(f.left) % f.rows)
    g, bad = PerExampleGrads((f,)), PerExampleGrads((jax.tree.map(poisoned, f),))
    others, mask = jnp.array([0, 1, 3, 4]), jnp.array([True, True, False, True, True])
    V, c = normal(0, 4, 6, dtype=np.float32), normal(1, 5, dtype=np.float32)
    for operation in (
        lambda g: g.norms(),
        lambda g: g.squared_norms(),
        lambda g: g.dot(V),
        lambda g: g.materialize(),
        lambda g: g.clip(1.0).materialize(),
        lambda g: g.gram()[:, others],
    ):
        np.testing.assert_array_equal(operation(bad)[others], operation(g)[others])
        assert np.isnan(operation(bad)[2]).any()
    for operation in (
        lambda g: g.sum(),
        lambda g: g.weighted_sum(c),
        lambda g: g.mean(),
        lambda g: g.second_moment(),
        lambda g: g.variance(),
        lambda g: g.gram(),
        lambda g: g.norms(),
        lambda g: g.clip(0.5).sum(),
    ):
        np.testing.assert_array_equal(operation(bad.where(mask)), operation(g.where(mask)))
        assert np.isfinite(operation(bad.where(mask))).all()


# --- Sums over very many examples ------------------------------------------------------------------------------


def equal(kind, B):
    """Equal gradients of one parameter, and their entry; added one by one, the sum would be off by B/4 roundings."""
    value = jnp.float32(0.1)
    match kind:
        case "dense":
            return Dense.of(jnp.full((B, 3), value), jnp.float32), (np.float64(value),)
        case "dense of many entries":
            return Dense.of(jnp.full((B, 100), value), jnp.float32), (np.float64(value),)
        case "scalar":
            return Dense.of(jnp.full(B, value), jnp.float32), (np.float64(value),)
        case "positions":  # a bias that is added at every position
            ones = jnp.ones((B // 5, 5), jnp.float32)
            return Outer.of("tf,t->f", jnp.full((B // 5, 5, 3), value), ones, jnp.float32), (np.float64(value),)
        case "small matrix" | "groups":
            G = 2 if kind == "groups" else 1
            sides = jnp.full((B, G, 3), value), jnp.full((B, G, 2), value)
            return Outer.of("gf,gk->gfk", *sides, jnp.float32), (np.float64(value) ** 2,)
        case "rows":  # half of them in each of two rows
            ids = jnp.arange(B).reshape(B // 5, 5) % 2
            return Rows.of_table(ids, jnp.full((B // 5, 5, 3), value), 2, jnp.float32), (np.float64(value) / 2,)


@pytest.mark.every(15)
@pytest.mark.parametrize(
    "kind", ["dense", "dense of many entries", "scalar", "positions", "small matrix", "groups", "rows"]
)
@pytest.mark.parametrize("B", [10_000, 100_020, 2_000_000])
def test_sums_over_many_equal_gradients_are_accurate(kind, B):
    if kind == "dense of many entries":
        B = min(B, 100_020)
    f, (each,) = equal(kind, B)
    g = PerExampleGrads((f,))
    c = jnp.full(g.batch_size, 0.7, jnp.float32)
    for verb, factor_of in (
        (lambda g: g.sum(), 1.0),
        (lambda g: g.weighted_sum(c), np.float64(c[0])),
        (lambda g: g.mean(), 1 / g.batch_size),
    ):
        expected = np.full(f.layout.shape, B * each * factor_of)
        np.testing.assert_allclose(jax.jit(verb)(g), expected, rtol=1e-6)


@pytest.mark.every(5)
@pytest.mark.parametrize(("N", "D"), [(1025, 3), (2048, 1), (5000, 100), (3000, 400), (1500, 0)])
def test_sums_in_blocks_are_linear_maps_of_both_sides(N, D):
    c, v, direction = normal(0, N), normal(1, N, D), normal(2, N, D)
    close(sums.weighted_rows(c, v), np.asarray(c) @ np.asarray(v), N)
    value, slope = jax.jvp(lambda v: sums.weighted_rows(c, v), (v,), (direction,))
    close(value, np.asarray(c) @ np.asarray(v), N)
    close(slope, np.asarray(c) @ np.asarray(direction), N)
    close(jax.grad(lambda c: sums.weighted_rows(c, v).sum())(c), np.asarray(v).sum(1), N)
    close(jax.vmap(sums.weighted_rows, (None, 0))(c, jnp.stack([v, 2 * v]))[1], 2 * np.asarray(c) @ np.asarray(v), N)


@pytest.mark.every(2)
@pytest.mark.parametrize(("N", "F", "K"), [(1100, 3, 2), (1100, 1, 7), (1100, 7, 1), (1100, 4, 5), (131_100, 4, 5)])
def test_products_in_blocks_are_bilinear(N, F, K):
    left, right = normal(0, N, F), normal(1, N, K)
    expected = np.asarray(left).T @ np.asarray(right)
    close(sums.products(left, right), expected, N)
    close(
        jax.grad(lambda left: sums.products(left, right).sum())(left),
        np.asarray(right).sum(1)[:, None] + np.zeros(F),
        N,
    )


# --- Rows with many positions ------------------------------------------------------------------------------------


def many_rows(seed, B, T, rows=40, K=3, repeated=False, dtype=np.float64):
    """Ids that repeat, with padding ids on both sides of the table, whose values no sum may include."""
    ids = jnp.asarray(np.random.default_rng(seed).integers(-2, rows + 2, size=(B, T)))
    values = normal(seed, *((B, K) if repeated else (B, T, K)), dtype=dtype)
    if not repeated:
        values = jnp.where(((ids >= 0) & (ids < rows))[..., None], values, jnp.nan)
    return Rows.of_table(ids, values, rows, dtype)


@pytest.mark.every(0)
@pytest.mark.parametrize("rows", [40, 5000])
@pytest.mark.parametrize("repeated", [(False, False), (True, True), (True, False)])
def test_rows_with_many_positions_are_matched_by_id(rows, repeated):
    f, f_ = (
        many_rows(s, B, T, rows, repeated=r) for s, B, T, r in zip((0, 9), (3, 4), (130, 70), repeated, strict=True)
    )
    A, A_ = (dense_of(o).reshape(len(o.left), -1) for o in (f, f_))
    for chunk_bytes in CHUNKS:
        with chunks.at_most(chunk_bytes):
            close(inner_products.inner(f, f), (A**2).sum(1), np.abs(A).sum() ** 2)
            close(inner_products.inner(f, jax.tree.map(lambda a: a[:3], f_)), (A * A_[:3]).sum(1), np.abs(A).sum() ** 2)
            close(jax.jit(lambda f, f_: inner_products.gram(f, f_))(f, f_), A @ A_.T, np.abs(A).sum() ** 2)
    close(jax.vmap(lambda f: PerExampleGrads((f,)).norms())(jax.tree.map(lambda a: a[None], f))[0] ** 2, (A**2).sum(1))
    second_moment = PerExampleGrads((f,)).second_moment()
    close(second_moment, (A**2).mean(0).reshape(rows, 3))


def test_norms_of_rows_with_many_positions_are_differentiable():
    f = many_rows(0, 3, 130)
    slope = jax.grad(lambda v: PerExampleGrads((replace(f, right=v),)).norms().sum())(f.right)
    A = dense_of(f)
    A = A / np.linalg.norm(A, axis=(1, 2), keepdims=True)
    ids, inside = np.clip(f.left, 0, f.rows - 1), np.asarray(Lookup.of(f).inside)[..., None]
    close(slope, np.where(inside, np.take_along_axis(A, ids[..., None], 1), 0))


@pytest.mark.every(2)
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_norms_of_rows_with_many_positions_in_float32(size):
    f = many_rows(0, 4, 500, dtype=np.float32)
    f = replace(f, right=f.right * np.float32(size))
    np.testing.assert_allclose(PerExampleGrads((f,)).norms(), np.linalg.norm(dense_of(f), axis=(1, 2)), rtol=1e-6)


def test_no_table_is_materialized_for_norms_of_rows_with_many_positions():
    f = many_rows(0, 4, 300, rows=10_000, K=8, dtype=np.float32)
    text = jax.jit(lambda f: PerExampleGrads((f,)).norms()).lower(f).compile().as_text()
    shapes = [s.split(",") for s in re.findall(r"f32\[([\d,]+)\]", text)]
    assert max(np.prod([int(n) for n in shape]) for shape in shapes) <= 4 * 300 * 8


# --- Squares of half precision -------------------------------------------------------------------------------------


@pytest.mark.every(9)
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("size", [1e-4, 10.0, 500.0])
@pytest.mark.parametrize("kind", ["outer", "rows", "dense", "positions"])
def test_squares_of_half_precision_are_not_rounded_to_it(kind, dtype, size):
    """1e-8 is 0 in float16, and 1024 squares of 10 are more than its largest number."""
    B, T = 1024, 2 if kind == "positions" else 1
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 4, size=(B, T)))
    values = normal(0, B, T, 3).astype(dtype) * jnp.asarray(size, dtype)
    match kind:
        case "rows":
            f = Rows.of_table(ids, values, 4, dtype)
        case "dense":
            f = Dense.of(values[:, 0], dtype)
        case _:
            f = outer(normal(1, B, T, 4).astype(dtype), values)
    g, G = PerExampleGrads({"p": (f,)}), dense_of(f)
    for found, expected in ((g.second_moment()["p"], (G**2).mean(0)), (g.variance()["p"], G.var(0))):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * expected.max())
