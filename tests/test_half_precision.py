"""Every loss of the zoo in bfloat16 and float16: as exact as the gradients that `jax.vmap(jax.grad)` materializes.

Parameters and inputs are rounded to the dtype, and both are compared with the gradients of the same numbers in float64.
Where a loss does not work in the dtype, both fail with the same kind of error.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.quick import quick_jit
from support.zoo import ENTRIES
from support.zoo.base import Loss
from test_projections import KEY, dense_one, is_sides
from test_zoo import axes_of

from jaxgrad import attribution, per_example_grad
from jaxgrad.per_example.algebra.product import einsum
from jaxgrad.precision import contracted

NAMES = ("norms", "gram", "weighted sum", "clipped sum", "projections")
DTYPES = (jnp.bfloat16, jnp.float16)
MULTIPLE, ROUNDINGS = 2.0, 4.0  # of the materialized gradients' error, and of the dtype's eps, that are allowed


def in_dtype(tree, dtype):
    """The tree with its floating arrays in the dtype."""
    return jax.tree.map(lambda a: np.asarray(a).astype(dtype) if jnp.issubdtype(a.dtype, np.floating) else a, tree)


def drawn_sides(params):
    """`random_sides`, with the signs from NumPy: nothing to compile."""
    shapes, rng = jax.eval_shape(lambda: attribution.random_sides(params, KEY, 3)), np.random.default_rng(1)
    return jax.tree.map(lambda a: rng.choice(np.int8([-1, 1]), a.shape), shapes)


def leaves_of(sides):
    return jax.tree.leaves(sides, is_leaf=is_sides)


def of_rows(leaves: list, c, bound, sides) -> dict:
    """Every operation on materialized gradients; those with a result for each parameter, in a list."""
    rows = [a.reshape(len(a), -1) for a in leaves]
    G = np.concatenate(rows, 1)
    lengths = np.linalg.norm(G, axis=1)
    kept = np.minimum(1, bound / np.where(lengths > 0, lengths, bound))
    return {
        "norms": [lengths],
        "gram": [G @ G.T],
        "weighted sum": [c @ a for a in rows],
        "clipped sum": [kept @ a for a in rows],
        "projections": [dense_one(a, s) for a, s in zip(leaves, sides, strict=True)],
    }


def sizes(leaves: list, c, bound, sides) -> dict:
    """What the error of each of these results is relative to: the gradients' lengths, of each parameter where apart."""
    each = [np.linalg.norm(a.reshape(len(a), -1), axis=1) for a in leaves]
    lengths = np.linalg.norm(each, axis=0)
    kept = np.minimum(1, bound / np.where(lengths > 0, lengths, bound))
    return {
        "norms": [lengths],
        "gram": [np.outer(lengths, lengths)],
        "weighted sum": [np.abs(c) @ a for a in each],
        "clipped sum": [kept @ a for a in each],
        "projections": [np.max(a, initial=0) for a in each],
    }


def computed(entry: Loss, dtype):
    """(ours, the materialized gradients in the dtype, those in float64, the arguments of the operations).

    None if JAX cannot compute the gradients in this dtype.
    """
    params, batch = in_dtype(entry.params, dtype), in_dtype(entry.batch, dtype)
    sides = drawn_sides(params)
    plain = quick_jit(jax.vmap(jax.grad(entry.loss), axes_of(entry)))
    exact = [np.asarray(a) for a in jax.tree.leaves(plain(*in_dtype((params, *batch), np.float64)))]
    lengths = np.linalg.norm(np.concatenate([a.reshape(len(a), -1) for a in exact], 1), axis=1)
    c, bound = np.random.default_rng(0).normal(size=len(lengths)).astype(np.float32), np.float32(lengths.mean())

    @quick_jit
    def ours(params, batch, c, bound, sides):
        g = per_example_grad(entry.loss, in_axes=axes_of(entry))(params, *batch)
        sums = [jax.tree.leaves(tree) for tree in (g.weighted_sum(c, jnp.float32), g.clip(bound).sum(jnp.float32))]
        weighted, clipped = ([a.ravel() for a in leaves] for leaves in sums)
        pairs = zip(leaves_of(sides), jax.tree.leaves(params), strict=True)
        cuts = np.cumsum([np.prod(s.result(p.shape), dtype=int) for s, p in pairs])
        projections = jnp.split(attribution.project(g, sides), [int(n) for n in cuts[:-1]], 1)
        results = [g.norms()], [g.gram()], weighted, clipped, projections
        return dict(zip(NAMES, results, strict=True))

    try:
        materialized = jax.tree.leaves(plain(params, *batch))
    except Exception as error:
        with pytest.raises(type(error)):
            ours(params, batch, c, bound, sides)
        return None
    found = ours(params, batch, c, bound, sides)
    return found, materialized, exact, (np.float64(c), np.float64(bound), leaves_of(sides))


def errors(entry: Loss, dtype) -> dict:
    """The pairs (our error, that of the materialized gradients) of each result; none where those are not finite."""
    outcome = computed(entry, dtype)
    if outcome is None:
        return {}
    found, materialized, exact, arguments = outcome
    materialized = [np.asarray(a).astype(np.float64) for a in materialized]
    if not all(np.isfinite(a).all() for a in (*materialized, *exact)):
        return {}
    expected, plain, size = of_rows(exact, *arguments), of_rows(materialized, *arguments), sizes(exact, *arguments)

    def error(name, results):
        parts = zip(results[name], expected[name], size[name], strict=True)
        return [float(np.max(np.abs(a - b) / np.maximum(scale, 1e-300), initial=0)) for a, b, scale in parts]

    return {name: list(zip(error(name, found), error(name, plain), strict=True)) for name in NAMES}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize(
    "spec", ["btf,btkn->bfkn", "cs,bts->cbt", "tfg,tk->fgk", "btf,btk->fk", "bf,bk->bfk", "tf,tf->tf"]
)
def test_products_with_any_axes_are_accumulated_in_float32(spec, dtype):
    """XLA's CPU refuses some products of bfloat16 numbers that are accumulated in float32."""
    rng = np.random.default_rng(0)
    names = spec.split("->")[0].split(",")
    a, b = (rng.normal(size=[3 + ord(x) % 5 for x in labels]).astype(dtype) for labels in names)
    found = jax.jit(lambda a, b: contracted(spec, a, b, jnp.float32))(a, b)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, np.einsum(spec, np.float64(a), np.float64(b)), rtol=1e-5, atol=1e-5)
    labels = [tuple(ord(x) for x in part) for part in (*names, spec.split("->")[1])]
    same = jax.jit(lambda a, b: einsum(a, labels[0], b, labels[1], labels[2], jnp.dtype(jnp.float32)))(a, b)
    np.testing.assert_allclose(same, found, rtol=1e-5, atol=1e-5)


@pytest.mark.every(81)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_results_are_as_exact_as_the_materialized_gradients(entry, dtype):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        found = errors(entry, dtype)
    for name, pairs in found.items():
        for ours, plain in pairs:
            allowed = MULTIPLE * plain + ROUNDINGS * float(jnp.finfo(dtype).eps)
            assert ours <= allowed, f"{name}: error {ours:.1e}, that of the materialized gradients {plain:.1e}"
