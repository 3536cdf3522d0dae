"""Every loss of the zoo: each operation on factors gives what it gives on the materialized gradients."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.quick import quick_jit
from support.zoo import ENTRIES
from support.zoo.base import Loss

from jaxgrad import PerExampleGrads, explain, per_example_grad


@pytest.fixture
def jax_defaults():
    """JAX's default promotion rules, in float64."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def axes_of(entry: Loss) -> tuple:
    """One entry for the parameters, one for each argument of the batch."""
    return (None, *((0,) * len(entry.batch) if entry.in_axes is None else entry.in_axes))


def first_example(entry: Loss, batch: tuple) -> tuple:
    axes = jax.tree.flatten(axes_of(entry)[1:], is_leaf=lambda axis: axis is None)[0]
    leaves, treedef = jax.tree.flatten(batch)
    return treedef.unflatten(
        [a if k is None else a[(slice(None),) * k + (0,)] for a, k in zip(leaves, axes, strict=True)]
    )


def algebra(g: PerExampleGrads, V, c, mask, bound) -> dict:
    return {
        "materialize": g.materialize(),
        "norms": g.norms(),
        "squared_norms": g.squared_norms(),
        "leaf_norms": g.leaf_norms(),
        "dot": g.dot(V),
        "weighted_sum": g.weighted_sum(c),
        "sum": g.sum(),
        "mean": g.mean(),
        "gram": g.gram(),
        "second_moment": g.second_moment(),
        "variance": g.variance(),
        "clip": g.clip(bound).sum(),
        "where": g.where(mask).sum(),
        "index": g[1:].materialize(),
    }


def references(leaves: list, V, c, mask, bound) -> dict:
    """The same operations on the matrix, each result with the size that its rounding errors are relative to."""
    G = [np.asarray(a).reshape(len(a), -1) for a in leaves]
    whole, direction = np.concatenate(G, 1), np.concatenate([np.ravel(v) for v in V])
    lengths, size = np.linalg.norm(whole, axis=1), [np.abs(a).sum() for a in G]
    clipped = np.minimum(1, bound / np.where(lengths > 0, lengths, bound))
    largest = [np.abs(a).max(initial=0) for a in G]

    def mapped(function, scales):
        return [(function(a), scale) for a, scale in zip(leaves, scales, strict=True)]

    return {
        "materialize": mapped(lambda a: a, largest),
        "norms": [(lengths, lengths)],
        "squared_norms": [(lengths**2, lengths**2)],
        "leaf_norms": [(np.linalg.norm(a, axis=1), scale) for a, scale in zip(G, largest, strict=True)],
        "dot": [(whole @ direction, lengths * np.linalg.norm(direction))],
        "weighted_sum": mapped(lambda a: np.tensordot(c, a, 1), [n * np.abs(c).max() for n in size]),
        "sum": mapped(lambda a: a.sum(0), size),
        "mean": mapped(lambda a: a.mean(0), largest),
        "gram": [(whole @ whole.T, np.outer(lengths, lengths))],
        "second_moment": mapped(lambda a: (a**2).mean(0), [n**2 for n in largest]),
        "variance": mapped(lambda a: a.var(0), [n**2 for n in largest]),
        "clip": mapped(lambda a: np.tensordot(clipped, a, 1), size),
        "where": mapped(lambda a: a[mask].sum(0), size),
        "index": mapped(lambda a: a[1:], largest),
    }


def close(found, expected, scale, rtol, message):
    found, error = np.asarray(found), np.abs(np.asarray(found) - expected)
    assert found.shape == np.shape(expected), f"{message}: shape {found.shape}, expected {np.shape(expected)}"
    assert np.all(error <= rtol * scale), (
        f"{message}: off by {np.max(error / np.maximum(scale, 1e-300)):.1e} of its size"
    )


@pytest.mark.every(145)
@pytest.mark.usefixtures("jax_defaults")
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_agrees_with_the_materialized_gradients(entry):
    params, batch, grad = entry.params, entry.batch, jax.grad(entry.loss)

    @quick_jit
    def reference(params, batch):
        all_examples = jax.vmap(grad, in_axes=axes_of(entry))(params, *batch)
        return all_examples, grad(params, *first_example(entry, batch))

    expected, of_one = jax.tree.map(np.asarray, reference(params, batch))
    leaves, treedef = jax.tree.flatten(expected)
    B, rng = len(leaves[0]), np.random.default_rng(0)
    assert all(np.isfinite(a).all() for a in leaves)
    for one, a in zip(jax.tree.leaves(of_one), leaves, strict=True):
        close(a[0], one, np.abs(a).max(initial=0), max(entry.rtol, 1e-12), "jax.vmap")

    lengths = np.sqrt(sum(np.square(a).reshape(B, -1).sum(1) for a in leaves))
    V = [rng.normal(size=a.shape[1:]) for a in leaves]
    c, mask, bound = rng.normal(size=B), np.arange(B) % 2 == 0, lengths.mean()

    @quick_jit
    def run(params, batch, V, c, mask, bound):
        g = per_example_grad(entry.loss, in_axes=axes_of(entry))(params, *batch)
        return g, algebra(g, V, c, mask, bound)

    g, found = run(params, batch, treedef.unflatten(V), c, mask, bound)
    assert isinstance(g, PerExampleGrads)
    assert jax.tree.map(jnp.result_type, found["materialize"]) == jax.tree.map(jnp.result_type, params)
    for name, results in references(leaves, V, c, mask, bound).items():
        for a, (b, scale) in zip(jax.tree.leaves(found[name]), results, strict=True):
            close(a, b, scale, entry.rtol, name)


@pytest.mark.every(5)
@pytest.mark.usefixtures("jax_defaults")
@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.factored or e.products], ids=lambda entry: entry.name)
def test_matrices_do_not_take_the_direct_route(entry):
    explained = explain(entry.loss, in_axes=axes_of(entry))(entry.params, *entry.batch)
    assert {path: explained[path].how for path in entry.factored} == dict.fromkeys(entry.factored, "factored"), (
        f"\n{explained}"
    )
    assert all(explained[path].how == "factored" or explained[path].why == "smaller" for path in entry.products), (
        f"\n{explained}"
    )


def sizes_held(function, *arguments) -> set[int]:
    """The sizes of the arrays in the compiled program, without those inside fusions."""
    sizes: set[int] = set()
    for computation in quick_jit(function).lower(*arguments).compile().as_text().split("\n\n"):
        if re.match(r"%(fused|wrapped)_", computation.strip()):
            continue
        for result in re.findall(r"^\s+(?:ROOT )?%?\S+ = (.*?) (?!parameter|bitcast)[a-z][\w-]*\(", computation, re.M):
            shapes = re.findall(r"\w\[([\d,]*)\]", result)
            sizes |= {math.prod(int(n) for n in shape.split(",") if n) for shape in shapes}
    return sizes


def materialized_parameters(entry: Loss, function) -> set[str]:
    """The factored parameters whose B gradients are an array of the program that a plain gradient does not have."""

    def ours(params, batch):
        return function(per_example_grad(entry.loss, in_axes=axes_of(entry))(params, *batch))

    def plain(params, batch):
        losses = jax.vmap(entry.loss, axes_of(entry))
        return jax.value_and_grad(lambda params: losses(params, *batch).mean())(params)

    B = jax.eval_shape(per_example_grad(entry.loss, in_axes=axes_of(entry)), entry.params, *entry.batch).batch_size
    new_sizes = sizes_held(ours, entry.params, entry.batch) - sizes_held(plain, entry.params, entry.batch)
    leaves = {jax.tree_util.keystr(path): a for path, a in jax.tree_util.tree_leaves_with_path(entry.params)}
    return {path for path in entry.factored if B * leaves[path].size in new_sizes}


@pytest.mark.every(71)
@pytest.mark.usefixtures("jax_defaults")
@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.factored], ids=lambda e: e.name)
def test_the_compiled_clipped_sum_holds_no_batch_of_gradients(entry):
    assert not materialized_parameters(entry, lambda g: g.with_chunk_bytes(1).clip(1.0).sum())


@pytest.mark.usefixtures("jax_defaults")
def test_a_batch_of_gradients_would_be_found():
    entries = [e for e in ENTRIES if e.factored][::12]
    found = [entry.name for entry in entries if materialized_parameters(entry, lambda g: g.materialize())]
    assert len(found) > 0.7 * len(entries), found  # the others have an activation of that size


def test_the_zoo_is_large_and_its_names_are_unique():
    names = [entry.name for entry in ENTRIES]
    assert len(names) == len(set(names)) >= 60
    assert sum(bool(entry.factored or entry.products) for entry in ENTRIES) >= 60


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_an_entry_names_parameters_that_it_has(entry):
    leaves = {jax.tree_util.keystr(path): a for path, a in jax.tree_util.tree_leaves_with_path(entry.params)}
    assert {*entry.factored, *entry.products} <= set(leaves)
    assert all(a.dtype == np.float64 for a in leaves.values())
