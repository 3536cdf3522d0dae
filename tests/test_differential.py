"""Compiled operations, clipped sums and batches: in float32, under jit, at real sizes, against NumPy in float64.

The other tests are small and in float64, where a bug in a compiler's vectorized code might not show.
"""

import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.two_layers import (
    Claim,
    Claims,
    Size,
    TwoLayers,
    assert_held,
    check,
    direction,
    drawn,
    gradients,
    lengths,
    loss,
    single,
    two_layers,
    value_magnitude,
)

import jaxgrad as jg
from jaxgrad import clipping, streams
from jaxgrad.per_example.algebra.factors import written_out

# --- PerExampleGrads -------------------------------------------------------------------------------------------------


def operations(data: TwoLayers, G: np.ndarray, M: np.ndarray) -> dict[str, Claim]:
    """A claim for each operation on gradients G with magnitude M."""
    B, split, v = len(G), data.split, direction(data)
    c, mask = np.float64(np.linspace(-1, 1, B, dtype=np.float32)), np.arange(B) % 3 > 0
    bound = float(np.float32(np.median(lengths(G))))
    short = np.minimum(1, bound / lengths(G))[:, None]
    parts, parts_ = split(G), split(M)
    of_part = lambda tree: {k: lengths(a.reshape(B, -1)) for k, a in tree.items()}  # noqa: E731
    return {
        "materialize": Claim(lambda g: g.materialize(), parts, parts_),
        "norms": Claim(lambda g: g.norms(), lengths(G), lengths(M)),
        "squared_norms": Claim(lambda g: g.squared_norms(), (G**2).sum(1), 2 * (M**2).sum(1)),
        "leaf_norms": Claim(lambda g: g.leaf_norms(), of_part(parts), of_part(parts_)),
        "dot": Claim(lambda g: g.dot(single(split(v))), G @ v, M @ np.abs(v)),
        "weighted_sum": Claim(lambda g: g.weighted_sum(single(c)), split(c @ G), split(np.abs(c) @ M)),
        "sum": Claim(lambda g: g.sum(), split(G.sum(0)), split(M.sum(0))),
        "mean": Claim(lambda g: g.mean(), split(G.mean(0)), split(M.mean(0))),
        "gram": Claim(lambda g: g.gram(), G @ G.T, 2 * M @ M.T),
        "gram with others": Claim(lambda g: g[1::2].gram(g), G[1::2] @ G.T, 2 * M[1::2] @ M.T),
        "second_moment": Claim(lambda g: g.second_moment(), split((G**2).mean(0)), split(2 * (M**2).mean(0))),
        "variance": Claim(lambda g: g.variance(), split(G.var(0)), split(2 * (M**2).mean(0))),
        "scale": Claim(lambda g: g.scale(single(c)).sum(), split(c @ G), split(np.abs(c) @ M)),
        "clip": Claim(
            lambda g: g.clip(bound).sum(),
            split((short * G).sum(0)),
            split((short * (M + np.abs(G) * (lengths(M) / lengths(G))[:, None])).sum(0)),
        ),
        "where": Claim(lambda g: g.where(jnp.asarray(mask)).sum(), split(mask @ G), split(mask @ M)),
        "concatenate": Claim(
            lambda g: jg.PerExampleGrads.concatenate([g[1:], g[:1]]).norms(),
            lengths(np.roll(G, -1, 0)),
            lengths(np.roll(M, -1, 0)),
        ),
    }


OPERATIONS = list(operations(two_layers(Size(2, 3, 4)), np.ones((2, 128)), np.ones((2, 128))))
OF_SEQUENCES = ["norms", "squared_norms", "dot", "sum", "gram", "gram with others", "second_moment", "variance", "clip"]
T = 3


@pytest.mark.every(19)
@pytest.mark.parametrize(("name", "size"), [run for name in OPERATIONS for run in drawn(name)])
def test_operations(name, size):
    data = two_layers(size)
    claim = operations(data, data.G, data.M)[name]
    check(claim._replace(function=lambda *a: claim.function(gradients(*a))), data)


@pytest.mark.every(19)
@pytest.mark.parametrize(("name", "size"), [run for name in OF_SEQUENCES for run in drawn(name, lambda s: T * s.B)])
def test_operations_on_sequences(name, size):
    data = two_layers(size._replace(B=T * size.B))
    claim = operations(data, *(A.reshape(size.B, T, -1).sum(1) for A in (data.G, data.M)))[name]

    def function(params, x, y):
        each = lambda params, x, y: jax.vmap(loss, (None, 0, 0))(params, x, y).sum()  # noqa: E731
        x, y = x.reshape(size.B, T, size.D), y.reshape(size.B, T)
        return claim.function(jg.per_example_grad(each)(params, x, y))

    check(claim._replace(function=function), data)


# --- Half precision ---------------------------------------------------------------------------------------------------


@pytest.mark.every(31)
@pytest.mark.parametrize(
    ("name", "size"), [run for name in OPERATIONS if name != "concatenate" for run in drawn(name)[:2]]
)
def test_operations_in_bfloat16(name, size):
    """Sides are in bfloat16 and sums in float32: results have float32's rounding, and are then rounded once."""
    data = two_layers(size)
    half = lambda tree: jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), tree)  # noqa: E731
    with jax.enable_x64(False):
        g = jax.jit(gradients)(half(data.params), half(data.x), data.y)
        assert jnp.dtype(jnp.bfloat16) in {a.dtype for a in jax.tree.leaves(g)}
    G = np.concatenate([materialized_in_float64(leaf).reshape(size.B, -1) for leaf in g.factors.values()], 1)
    claim = operations(data, G, np.abs(G))[name]
    with jax.enable_x64(False):
        found = jax.jit(claim.function)(g)
    assert_held(found, claim.expected, claim.magnitude, size.rounding, rounded_to=2.0**-8)


def materialized_in_float64(leaf: tuple[Any, ...]) -> np.ndarray:
    return sum(np.asarray(written_out(jax.tree.map(lambda a: a.astype(np.float64), f))) for f in leaf)


# --- Clipping --------------------------------------------------------------------------------------------------------

claims = Claims()


@claims()
def values(data):
    expected = -np.log(data.p[np.arange(data.size.B), data.y])
    return Claim(lambda *a: jg.per_example_value_and_grad(loss)(*a)[0], expected, value_magnitude(data))


def clipped(data, weights, moved, rounded=1, **options):
    """A claim about a clipped sum.

    weights: weights(norms, bound). moved: the relative change of a weight for a relative change of its norm.
    rounded: how often the gradients are rounded; the second of two passes rounds them again, with their weights.
    """
    G, M, n = data.G, data.M, lengths(data.G)
    mask, bound = np.arange(len(G)) % 4 > 0, float(np.float32(np.median(n)))
    w, each = weights(n, bound) * mask, (rounded * M + np.abs(G) * (moved * lengths(M) / n)[:, None])
    gradient = clipping.clipped_grad(loss, bound, **options)

    def function(params, x, y):
        total, info = gradient(params, x, y, mask=jnp.asarray(mask))
        return total, info.norms, info.values

    value = -np.log(data.p[np.arange(len(G)), data.y])
    expected = data.split(w @ G), n * mask, value * mask
    return Claim(function, expected, (data.split(w @ each), lengths(M) * mask, value_magnitude(data) * mask))


@claims()
def clipped_grad(data):
    return clipped(data, lambda n, bound: np.minimum(1, bound / n), 1)


@claims()
def clipped_grad_in_microbatches(data):
    return clipped(data, lambda n, bound: np.minimum(1, bound / n), 1, microbatch_size=60)


@claims()
def clipped_grad_in_two_passes(data):
    return clipped(data, lambda n, bound: np.minimum(1, bound / n), 1, passes=2)


@claims()
def norms_alone(data):
    return Claim(lambda *a: jg.per_example_norms(loss)(*a)[1], lengths(data.G), lengths(data.M))


@claims()
def clipped_grad_normalized(data):
    return clipped(data, lambda n, bound: bound / n, 1, weighting="normalize")


@claims()
def clipped_grad_automatic(data):
    return clipped(data, lambda n, bound: bound / (n + 0.5), 1, weighting=clipping.automatic(0.5))


# --- Batches from disk -----------------------------------------------------------------------------------------------


def batches(x, y, size=100):
    return streams.Batches(x, y, size=size)


@claims()
def gram_in_blocks(data):
    function = lambda params, x, y: streams.gram(loss)(params, batches(x, y), batches(x[:20], y[:20]))  # noqa: E731
    return Claim(function, data.G @ data.G[:20].T, 2 * data.M @ data.M[:20].T, jitted=False)


@claims()
def top_k(data):
    rows = data.G[:5] @ data.G.T
    kth = -np.sort(-rows, 1)[:, :3]

    def function(params, x, y):
        test = gradients(params, x[:5], y[:5])
        scores = jax.tree_util.Partial(lambda test, *args: test.gram(gradients(*args)), test)
        return streams.top_k(scores, 3)(params, batches(x, y)).values

    return Claim(function, kth, np.broadcast_to((2 * data.M[:5] @ data.M.T).max(1, keepdims=True), kth.shape), False)


def streamed(function, params, x, y):
    with tempfile.TemporaryDirectory() as folder:
        results = streams.run(function)(params, batches(x, y), folder)
        return {k: np.array(v) for k, v in results.rows.items()}, results.sums


@claims()
def streams_of_norms(data):
    value = -np.log(data.p[np.arange(data.size.B), data.y])
    expected = {"values": value, "norms": lengths(data.G)}, {}
    magnitude = {"values": value_magnitude(data), "norms": lengths(data.M)}, {}
    return Claim(lambda params, x, y: streamed(streams.norms(loss), params, x, y), expected, magnitude, False)


@claims()
def streams_of_moments(data):
    function = lambda params, x, y: jax.tree.map(  # noqa: E731
        np.float32, streamed(streams.second_moments(loss), params, x, y)[1]
    )
    named = lambda total, squares: {  # noqa: E731
        f"{name}['{k}']": a for name, A in (("sum", total), ("squares", squares)) for k, a in data.split(A).items()
    }
    G, M = data.G, data.M
    return Claim(function, named(G.sum(0), (G**2).sum(0)), named(M.sum(0), 2 * (M**2).sum(0)), False)


@claims()
def streams_of_inner_products(data):
    def function(params, x, y):
        fixed = gradients(params, x[:8], y[:8])
        return streamed(streams.inner_products(loss, fixed), params, x, y)[0]["products"]

    return Claim(function, data.G @ data.G[:8].T, 2 * data.M @ data.M[:8].T, False)


@pytest.mark.every(31)
@pytest.mark.parametrize(("name", "size"), claims.runs)
def test_losses_clipped_sums_and_batches(name, size):
    data = two_layers(size)
    check(claims[name](data), data)
