"""clipped_grad with a bound for every layer of a stack: its sums, its memory and its guarantee."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from support.quick import quick_jit
from support.zoo import ENTRIES
from test_zoo import axes_of, close

import jaxgrad as jg


@pytest.fixture(autouse=True)
def jax_defaults():
    """JAX's default promotion rules, in float64."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


L, D, H, T, B = 3, 4, 6, 5, 7


def layer(h, p):
    return h + jnp.tanh(h @ p["up"]) @ p["down"] + p["bias"], None


def loss(params, x):
    h = lax.scan(jax.checkpoint(layer), x @ params["first"], params["layers"])[0]
    return ((h @ params["last"]) ** 2).mean()


def written_out(params, x):
    """The same loss without a loop: no layer is complete before the end."""
    h = x @ params["first"]
    for k in range(L):
        h = layer(h, jax.tree.map(lambda a, k=k: a[k], params["layers"]))[0]
    return ((h @ params["last"]) ** 2).mean()


def with_penalty(params, x):
    return loss(params, x) + x.mean() * sum((a**2).sum() for a in jax.tree.leaves(params["layers"]))


def turned(params, x):
    """The stack passes a transpose, which moves the axis of layers."""
    layers = {**params["layers"], "up": params["layers"]["up"].swapaxes(0, 2).swapaxes(0, 2)}
    return loss({**params, "layers": layers}, x)


def drawn(seed=0, B=B, dtype=np.float64):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[-1]), dtype)  # noqa: E731
    layers = {"up": draw(L, D, H), "down": draw(L, H, D), "bias": draw(L, D)}
    return {"first": draw(2, D), "layers": layers, "last": draw(D, 3)}, draw(B, T, 2)


def by_hand(bounds, G, keep=None):
    """The clipped sum of a tree of materialized gradients [B, …], in float64."""
    if isinstance(bounds, dict):
        return {k: by_hand(bound, G[k], keep) for k, bound in bounds.items()}
    leaves = [np.asarray(a, np.float64) for a in jax.tree.leaves(G)]
    count = len(leaves[0])
    keep = np.ones(count, bool) if keep is None else keep
    shape = (count, *np.shape(bounds), -1)
    norms = np.sqrt(sum((a**2).reshape(shape).sum(-1) for a in leaves))
    c = np.minimum(1, np.asarray(bounds) / norms) * keep.reshape(-1, *[1] * np.ndim(bounds))

    def total(a):
        return (c.reshape(*c.shape, *[1] * (a.ndim - c.ndim)) * a).sum(0)

    return jax.tree.unflatten(jax.tree.structure(G), map(total, leaves))


def medians(G, bounds):
    """Bounds of this form at which about half of the examples are clipped."""
    if isinstance(bounds, dict):
        return {k: medians(G[k], bound) for k, bound in bounds.items()}
    leaves = [np.asarray(a, np.float64) for a in jax.tree.leaves(G)]
    norms = np.sqrt(sum((a**2).reshape(len(a), *np.shape(bounds), -1).sum(-1) for a in leaves))
    return jnp.asarray(np.median(norms, 0))


FORMS = {
    "one group": {"first": 1.0, "layers": np.ones(L), "last": 1.0},
    "each parameter": {"first": 1.0, "layers": {"up": np.ones(L), "down": np.ones(L), "bias": np.ones(L)}, "last": 1.0},
    "some parameters": {"first": 1.0, "layers": {"up": np.ones(L), "down": 1.0, "bias": 1.0}, "last": 1.0},
    "the first axis of a matrix": {"first": np.ones(2), "layers": 1.0, "last": np.ones(D)},
}
LOSSES = {"scan": loss, "written out": written_out, "penalty": with_penalty, "turned": turned}


@pytest.mark.every(5)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", LOSSES)
def test_sums_are_those_of_materialized_gradients(name, form):
    (params, X), fun = drawn(), LOSSES[name]
    mask = np.arange(B) != 2
    G = quick_jit(jax.vmap(jax.grad(fun), (None, 0)))(params, X)
    bounds = medians(G, FORMS[form])
    norms = np.sqrt(sum((np.asarray(a) ** 2).reshape(B, -1).sum(1) for a in jax.tree.leaves(G)))
    gradients = [jg.clipped_grad(fun, bounds, microbatch_size=size) for size in (None, 3)]
    for total, info in quick_jit(lambda *args: [gradient(*args, mask=mask) for gradient in gradients])(params, X):
        for a, b in zip(jax.tree.leaves(total), jax.tree.leaves(by_hand(bounds, G, mask)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(info.norms, norms * mask, rtol=1e-10)
        np.testing.assert_allclose(info.values, np.asarray(jax.vmap(fun, (None, 0))(params, X)) * mask, rtol=1e-12)
        assert 0.5 < info.clipped_fraction <= 1


def test_stacks_of_stacks():
    def two(params, x):
        outer = lambda h, p: (lax.scan(layer, h, p)[0], None)  # noqa: E731
        return (lax.scan(outer, x, params)[0] ** 2).mean()

    rng = np.random.default_rng(0)
    shapes = {"up": (2, L, D, H), "down": (2, L, H, D), "bias": (2, L, D)}
    params = {k: jnp.asarray(rng.normal(size=shape) / 3) for k, shape in shapes.items()}
    X = jnp.asarray(rng.normal(size=(B, T, D)))
    G = jax.vmap(jax.grad(two), (None, 0))(params, X)
    bounds = medians(G, np.ones(2))
    total, _ = quick_jit(jg.clipped_grad(two, bounds))(params, X)
    for a, b in zip(jax.tree.leaves(total), jax.tree.leaves(by_hand(bounds, G)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.every(37)
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_the_zoo_with_a_bound_for_every_row_of_every_parameter(entry):
    axes = axes_of(entry)
    G = quick_jit(jax.vmap(jax.grad(entry.loss), axes))(entry.params, *entry.batch)
    leaves, treedef = jax.tree.flatten(G)
    absolute = [np.abs(np.asarray(a)) for a in leaves]
    norms = [np.sqrt((a**2).sum(tuple(range(2, a.ndim)))) for a in absolute]
    bounds = [np.maximum(n.mean(0), 1e-300) for n in norms]  # [rows], or one number for a parameter without axes
    gradient = jg.clipped_grad(entry.loss, treedef.unflatten(bounds), in_axes=axes)
    total, _ = quick_jit(gradient)(entry.params, *entry.batch)
    for found, a, n, bound in zip(jax.tree.leaves(total), leaves, norms, bounds, strict=True):
        c = np.minimum(1, bound / np.where(n > 0, n, bound))
        expected = (c.reshape(*c.shape, *[1] * (a.ndim - c.ndim)) * np.asarray(a)).sum(0)
        close(found, expected, np.abs(a).sum(), max(entry.rtol, 1e-8), "clipped sum")


@pytest.mark.as_used
@pytest.mark.every(2)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("name", ["scan", "written out"])
def test_narrow_parameters_in_a_batch_of_64(name, dtype):
    fun = LOSSES[name]
    params, X = drawn(1, 64, dtype)
    wide = jax.tree.map(lambda a: a.astype(np.float64), (params, X))
    G = jax.jit(jax.vmap(jax.grad(fun), (None, 0)))(*wide)
    bounds = medians(G, FORMS["one group"])
    narrow = jax.tree.map(lambda b: b.astype(np.float32), bounds)
    total, _ = jax.jit(jg.clipped_grad(fun, narrow))(params, X)
    tolerance = 2e-5 if dtype == np.float32 else 0.1  # 3e-6 and 0.03
    for a, b in zip(jax.tree.leaves(total), jax.tree.leaves(by_hand(bounds, G)), strict=True):
        assert a.dtype == np.float32
        assert np.linalg.norm(np.asarray(a, np.float64) - b) <= tolerance * np.linalg.norm(b)


@pytest.mark.every(2)
@pytest.mark.parametrize("weighting", ["clip", "normalize"])
def test_no_example_moves_the_sum_by_more_than_the_bound(weighting):
    """One example after the other is made huge, NaN or infinite; some only in some layers."""
    params, X = drawn(2, 6, np.float32)
    bounds = {"first": 0.3, "layers": jnp.asarray([0.2, 1e-3, 0.5], jnp.float32), "last": 0.1}
    gradient = jg.clipped_grad(loss, bounds, weighting=weighting)
    limit = gradient.sensitivity(6)
    assert 0.62 < gradient.max_norm < limit < 0.64
    run = jax.jit(gradient)
    for value in (1e3, 1e18, np.nan, np.inf, 1e-30):
        for k in range(3):
            with_it = run(params, X.at[k].multiply(value))[0]
            without, info = run(params, X.at[k].multiply(value), mask=jnp.arange(6) != k)
            moved = np.sqrt(
                sum(
                    ((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2).sum()
                    for a, b in zip(jax.tree.leaves(with_it), jax.tree.leaves(without), strict=True)
                )
            )
            assert moved <= limit
            assert info.nonfinite == 0


def test_a_layer_that_is_not_finite_adds_zero_and_leaves_the_others():
    def exploding(params, x):
        """Only the gradient of the last row of `w` is infinite, where x is."""
        return lax.scan(lambda h, p: (h + p["w"] @ p["x"], None), 0.0, {"w": params, "x": x})[0]

    w, X = jnp.ones((3, 2)), jnp.ones((4, 3, 2)).at[1, 2].set(np.inf)
    total, info = jax.jit(jg.clipped_grad(exploding, jnp.ones(3)))(w, X)
    np.testing.assert_allclose(total, np.array([[4, 4], [4, 4], [3, 3]]) / np.sqrt(2), rtol=1e-6)
    assert info.nonfinite == 1
    assert np.isinf(info.norms[1])


def memory(function, *arguments):
    found = jax.jit(function).lower(*arguments).compile().memory_analysis()
    return found.temp_size_in_bytes + found.output_size_in_bytes


@pytest.mark.every(2)
@pytest.mark.parametrize("T", [512, 64])
def test_one_pass_holds_what_a_plain_gradient_holds(T):
    layers, D, H, B = 8, 128, 256, 8

    def deep(params, x):
        return (lax.scan(jax.checkpoint(layer), x, params)[0] ** 2).mean()

    shapes = {"up": (layers, D, H), "down": (layers, H, D), "bias": (layers, D)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    X = jax.ShapeDtypeStruct((B, T, D), jnp.float32)
    plain = memory(jax.grad(lambda p, X: jax.vmap(deep, (None, 0))(p, X).mean()), params, X)
    one = memory(jg.clipped_grad(deep, jnp.ones(layers)), params, X)
    assert one <= 1.45 * plain  # 1.12 and 0.97 with jaxlib 0.10.2; 1.21 with 0.10.0 and 1.40 with 0.12 for T = 512
    assert one < memory(jg.per_example_grad(deep), params, X)


@pytest.mark.every(2)
@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto], ids=["explicit", "auto"])
def test_sharded_parameters_and_examples(axis_type):
    params, X = drawn(3, 8)
    params, fun = params["layers"], lambda p, x: (lax.scan(jax.checkpoint(layer), x, p)[0] ** 2).mean()
    X = jnp.concatenate([X, X], 2)
    G = jax.jit(jax.vmap(jax.grad(fun), (None, 0)))(params, X)
    bounds = medians(G, np.ones(L))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(axis_type,))
    shardings = {k: NamedSharding(mesh, PartitionSpec(*[None] * (a.ndim - 1), "data")) for k, a in params.items()}
    placed = jax.device_put(params, shardings)
    with jax.set_mesh(mesh):
        X = jax.device_put(X, NamedSharding(mesh, PartitionSpec("data")))
        total, info = jax.jit(jg.clipped_grad(fun, bounds))(placed, X)
    for key, expected in by_hand(bounds, G).items():
        np.testing.assert_allclose(total[key], expected, rtol=1e-8, atol=1e-10)
        assert total[key].sharding.is_equivalent_to(placed[key].sharding, total[key].ndim)
    assert info.norms.sharding.spec == PartitionSpec("data")


def test_the_bounds_may_be_traced_and_differ_between_models():
    params, X = drawn()
    layers = np.array([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1]])

    def total(bound):
        gradient = jg.clipped_grad(loss, {"first": 1.0, "layers": bound, "last": 1.0})
        return gradient(params, X)[0], gradient.sensitivity(B)

    together, limits = quick_jit(jax.vmap(total))(jnp.asarray(layers))
    for k, bound in enumerate(layers):
        alone, limit = quick_jit(total)(bound)
        np.testing.assert_allclose(limits[k], limit, rtol=1e-6)
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(a[k], b, rtol=1e-10, atol=1e-12)


def test_errors():
    params, X = drawn()
    with pytest.raises(ValueError, match=r"expected one number for each group of parameters with passes=2.*passes=1"):
        jg.clipped_grad(loss, {"first": 1.0, "layers": np.ones(L), "last": 1.0}, passes=2)
    with pytest.raises(
        ValueError, match=r"one bound for each layer of .*\['layers'\]\['bias'\], of shape \(3, 4\), got .*\(4,\)"
    ):
        jg.clipped_grad(loss, {"first": 1.0, "layers": np.ones(4), "last": 1.0})(params, X)
    with pytest.raises(ValueError, match="expected positive numbers as bounds"):
        jg.clipped_grad(loss, {"first": 1.0, "layers": np.array([1.0, 0.0, 1.0]), "last": 1.0})
    with pytest.raises(ValueError, match="expected positive numbers as bounds"):
        jg.clipped_grad(loss, np.ones((2, 2)))
    with pytest.raises(ValueError, match="expected positive numbers as bounds"):
        jg.per_example_grad(loss)(params, X).clip({"first": 1.0, "layers": np.ones(L), "last": 1.0})


def test_no_examples():
    params, X = drawn()
    bounds = {"first": 1.0, "layers": np.ones(L), "last": 1.0}
    for fun in (loss, written_out):
        total, info = quick_jit(jg.clipped_grad(fun, bounds))(params, X[:0])
        assert all((a == 0).all() for a in jax.tree.leaves(total))
        assert info.norms.shape == (0,)


def test_costs_compare_one_pass_with_a_plain_gradient():
    params, X = drawn()
    costs = jg.clipped_grad(loss, {"first": 1.0, "layers": np.ones(L), "last": 1.0}).costs(params, X)
    assert sorted(costs.rows) == ["one pass", "plain gradient"]
    assert costs["plain gradient"].operations < costs["one pass"].operations < 2 * costs["plain gradient"].operations
