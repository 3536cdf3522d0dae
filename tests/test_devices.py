"""Batches sharded over eight devices: the results of one device, and what the devices communicate."""

import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from support.quick import quick_jit

import jaxgrad as jg
from jaxgrad import network
from jaxgrad.per_example.algebra import factors

DEVICES, B = 8, 32
COLLECTIVES = r"all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast"


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) / math.sqrt(shape[-1]), jnp.float32)


def weights(shapes):
    return {name: normal(k, *shape) for k, (name, shape) in enumerate(shapes.items())}


def ids(seed, high, *shape):
    return jnp.asarray(np.random.default_rng(seed).integers(0, high, shape), jnp.int32)


def attention(params, x, y):
    """T > 1: products over positions, with normalization and a residual connection."""
    h = x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-3) * params["scale"][None]
    q, k, v = jnp.split(h @ params["qkv"], 3, -1)
    h = x + jax.nn.softmax(q @ k.T / 4) @ v @ params["out"]
    return ((jnp.tanh(h @ params["up"]) @ params["down"]).mean(0) @ params["w"] - y) ** 2


def tied(params, words, y):
    """An embedding that is also the output layer."""
    h = jnp.tanh(params["E"][words] @ params["W"])
    return jax.nn.logsumexp(h @ params["E"].T, -1).mean() + (h.mean() - y) ** 2


def conv(params, x, y):
    """Two kernels: the gradient of one is held as windows, that of the other is materialized."""

    def layer(h, k):
        return jax.nn.relu(lax.conv_general_dilated(h, k, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")))

    h = layer(layer(x[None], params["first"]), params["second"])
    return (h.mean((0, 1, 2)) @ params["w"] - y) ** 2


ATTENTION = {"qkv": (32, 96), "out": (32, 32), "up": (32, 64), "down": (64, 32), "w": (32,)}
CONV = {"first": (3, 3, 2, 16), "second": (3, 3, 16, 32), "w": (32,)}
TIED = {"E": (200, 24), "W": (24, 24)}
MODELS = {
    "exercise": (
        network.loss,
        network.init_params(jax.random.key(0), 24, 40, jnp.float32),
        (normal(1, B, 24), jnp.sign(normal(2, B))),
    ),
    "attention": (
        attention,
        weights(ATTENTION) | {"scale": jnp.ones(32, jnp.float32)},
        (normal(5, B, 6, 32), normal(6, B)),
    ),
    "tied": (tied, weights(TIED), (ids(2, 200, B, 5), normal(3, B))),
    "conv": (conv, weights(CONV), (normal(3, B, 8, 8, 2), normal(4, B))),
}
MODEL = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(autouse=True)
def jax_defaults():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def mesh(axis_type=AxisType.Auto):
    return jax.make_mesh((DEVICES,), ("data",), axis_types=(axis_type,))


def placed(name, device_mesh, over_parameters=False):
    """The model with its batch sharded over the devices, and its parameters replicated or sharded too."""
    loss, params, batch = MODELS[name]

    def sharding(a):
        axis = next((k for k, n in enumerate(a.shape) if n % DEVICES == 0), None) if over_parameters else None
        spec = [*[None] * axis, "data"] if axis is not None else []
        return NamedSharding(device_mesh, PartitionSpec(*spec))

    params = jax.tree.map(lambda a: jax.device_put(a, sharding(a)), params)
    return loss, params, jax.device_put(batch, NamedSharding(device_mesh, PartitionSpec("data")))


def communicated(function, *arguments):
    """[(kind, numbers)] of each collective in the compiled program; one inside a loop is counted once."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    found = re.findall(rf"^\s*(?:ROOT )?%?\S+ = (.*?) ({COLLECTIVES})(?:-start)?\(", text, re.M)
    shapes = [(kind, re.findall(r"\w\[([\d,]*)\]", result)) for result, kind in found]
    return [(kind, sum(math.prod(map(int, filter(None, s.split(",")))) for s in each)) for kind, each in shapes]


def results(loss, bound=0.1):
    gradient = jg.clipped_grad(loss, bound)

    def run(params, *batch):
        values, g = jg.per_example_value_and_grad(loss)(params, *batch)
        total, info = gradient(params, *batch, mask=jnp.arange(len(values)) % 5 != 0)
        return values, g.norms(), g.sum(), g.gram(), g.second_moment(), total, info

    return run


@pytest.mark.every(9)
@MODEL
@pytest.mark.parametrize("over_parameters", [False, True], ids=["replicated", "parameters sharded"])
def test_the_results_are_those_of_one_device(name, over_parameters):
    loss, params, batch = MODELS[name]
    expected = jax.jit(results(loss))(params, *batch)
    loss, params, batch = placed(name, mesh(), over_parameters)
    found = jax.jit(results(loss))(params, *batch)
    chex.assert_trees_all_close(jax.tree.map(np.asarray, found), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.every(5)
@MODEL
def test_norms_communicate_nothing(name):
    loss, params, batch = placed(name, mesh())
    assert communicated(lambda p, *b: jg.per_example_grad(loss)(p, *b).norms(), params, *batch) == []


@pytest.mark.every(5)
@MODEL
def test_norms_and_moments_block_by_block_move_no_example(name, monkeypatch):
    """A moment is one reduction of the parameters' size for each parameter, whatever it takes to get there."""
    monkeypatch.setattr(factors, "UNFOLDED_BYTES", 1)
    expected = jax.jit(results(MODELS[name][0]))(MODELS[name][1], *MODELS[name][2])
    loss, params, batch = placed(name, mesh())

    def blocks(params, *batch):
        g = jg.per_example_grad(loss)(params, *batch).with_chunk_bytes(1)
        return g.norms(), g.second_moment()

    assert communicated(lambda *args: blocks(*args)[0], params, *batch) == []
    collectives = communicated(lambda *args: blocks(*args)[1], params, *batch)
    assert {kind for kind, _ in collectives} == {"all-reduce"}
    norms, moment = jax.jit(blocks)(params, *batch)
    np.testing.assert_allclose(norms, expected[1], rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(jax.tree.map(np.asarray, moment), expected[4], rtol=1e-4, atol=1e-6)


@pytest.mark.every(5)
@MODEL
def test_a_clipped_sum_communicates_one_reduction_of_the_parameters_size(name):
    """A table tied to the output layer has a factor for each of its two uses, and one reduction for each."""
    loss, params, batch = placed(name, mesh())
    gradient = jg.clipped_grad(loss, 0.1)
    collectives = communicated(lambda p, *b: gradient(p, *b)[0], params, *batch)
    size = sum(leaf.size for leaf in jax.tree.leaves(params)) + (params["E"].size if name == "tied" else 0)
    assert {kind for kind, _ in collectives} == {"all-reduce"}
    assert sum(numbers for _, numbers in collectives) == size


WHOLE, EACH = PartitionSpec(), PartitionSpec("data")
ON_EXPLICIT = {
    "a matrix": (lambda W, x: jnp.sin(W @ x).sum(), normal(0, 4, 3), (normal(1, B, 3),)),
    "every route": (
        lambda p, x: jnp.sin(p["W"] @ x).sum() + p["b"] @ x + jnp.exp(p["D"] * x).sum(),
        weights({"W": (40, 30), "b": (30,), "D": (20, 30)}),
        (normal(1, B, 30),),
    ),
    "an embedding by one-hot products": (
        lambda p, words, y: jnp.square(jax.nn.one_hot(words, 20) @ p["E"] @ p["W"] - y).sum(),
        weights({"E": (20, 6), "W": (6, 2)}),
        (ids(0, 20, B, 5), normal(1, B, 5, 2)),
    ),
    "an embedding by a lookup": (
        lambda p, words, y: jnp.square(p["E"].at[words].get(out_sharding=WHOLE) @ p["W"] - y).sum(),
        weights({"E": (20, 6), "W": (6, 2)}),
        (ids(0, 20, B, 5), normal(1, B, 5, 2)),
    ),
}


@pytest.mark.every(0)
@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("name", ON_EXPLICIT)
@pytest.mark.parametrize("passes", [1, 2])
def test_a_clipped_sum_on_an_explicit_mesh_is_that_of_one_device(passes, name, jit):
    loss, params, batch = ON_EXPLICIT[name]
    device_mesh, mask = mesh(AxisType.Explicit), jnp.arange(B) % 3 != 0
    with jax.set_mesh(mesh()):
        materialized = jax.vmap(jax.grad(loss), (None, *[0] * len(batch)))(params, *batch)
    norms = np.sqrt(sum(np.square(a.reshape(B, -1)).sum(1) for a in jax.tree.leaves(materialized)))
    bound = float(np.median(norms))
    with jax.set_mesh(device_mesh):
        params, batch = jax.device_put(
            (params, batch), (NamedSharding(device_mesh, WHOLE), NamedSharding(device_mesh, EACH))
        )
        spread = jax.device_put(mask, NamedSharding(device_mesh, EACH))
        ways = [(mask, None)] if jit is not jax.jit else [(None, None), (mask, None), (spread, 16), (None, 5)]
        for example_mask, size in ways:
            total, info = jit(jg.clipped_grad(loss, bound, microbatch_size=size, passes=passes))(
                params, *batch, mask=example_mask
            )
            kept = np.ones(B) if example_mask is None else np.asarray(mask, float)
            c = kept * np.minimum(1, bound / norms)
            expected = jax.tree.map(lambda a, c=c: np.tensordot(c, a, 1), materialized)
            chex.assert_trees_all_close(jax.tree.map(np.asarray, total), expected, rtol=1e-4, atol=1e-4 * bound)
            np.testing.assert_allclose(info.norms, kept * norms, rtol=1e-4)
            assert size == 5 or jax.typeof(info.norms).sharding.spec == EACH


EXPLICIT = [("exercise", AxisType.Explicit), ("attention", AxisType.Explicit)]


@pytest.mark.every(7)
@pytest.mark.parametrize(("name", "axis_type"), [*EXPLICIT, *((n, AxisType.Auto) for n in MODELS)])
def test_a_gram_matrix_communicates_factors(name, axis_type):
    device_mesh = mesh(axis_type)
    loss, params, batch = placed(name, device_mesh)
    gram = lambda params, *batch: jg.per_example_grad(loss)(params, *batch).gram()  # noqa: E731
    with jax.set_mesh(device_mesh):
        collectives, found = communicated(gram, params, *batch), jax.jit(gram)(params, *batch)
        held = jg.explain(loss)(params, *batch).nbytes // 4
    np.testing.assert_allclose(found, jax.jit(gram)(*MODELS[name][1:2], *MODELS[name][2]), rtol=1e-3, atol=1e-4)
    assert sum(numbers for _, numbers in collectives) <= 2 * held + B * B


@pytest.mark.every(3)
@pytest.mark.parametrize(("name", "axis_type"), [*EXPLICIT, *((n, AxisType.Auto) for n in MODELS)])
def test_a_projection_communicates_nothing(name, axis_type):
    device_mesh = mesh(axis_type)
    loss, params, batch = placed(name, device_mesh)
    sides = jg.attribution.random_sides(params, jax.random.key(0), 4)

    def project(params, *batch):
        inside = jg.attribution.per_example_projection(loss, sides)(params, *batch)[1]
        return jg.attribution.project(jg.per_example_grad(loss)(params, *batch), sides), inside

    expected = jax.jit(project)(*MODELS[name][1:2], *MODELS[name][2])
    with jax.set_mesh(device_mesh):
        collectives, found = communicated(project, params, *batch), jax.jit(project)(params, *batch)
    chex.assert_trees_all_close(jax.tree.map(np.asarray, found), expected, rtol=1e-3, atol=1e-4)
    assert sum(numbers for _, numbers in collectives) == 0
    assert all(a.sharding.spec[0] == "data" for a in found)


@pytest.mark.every(0)
@pytest.mark.parametrize(
    ("name", "axis_type"), [*EXPLICIT, *((n, AxisType.Auto) for n in ("exercise", "tied", "conv"))]
)
def test_steps_and_attribution_are_those_of_one_device(name, axis_type):
    loss, params, batch = MODELS[name]

    def run(params, *batch):
        g = jg.per_example_grad(loss)(params, *batch)
        several = (
            jg.curvature.natural_gradient(g, 0.1),
            jg.curvature.fisher_vector_product(g, params),
            jg.attribution.self_influence(g, 0.1),
        )
        projected = jg.attribution.random_projection(g, jax.random.key(0), 3)
        return (
            *several,
            jg.attribution.influence(g, g[:8], 0.1),
            jg.attribution.noise_scale(g),
            jg.curvature.kfac_factors(g),
            projected,
        )

    expected = jax.jit(run)(params, *batch)
    device_mesh = mesh(axis_type)
    loss, params, batch = placed(name, device_mesh)
    with jax.set_mesh(device_mesh):
        found = jax.jit(run)(params, *batch)
    chex.assert_trees_all_close(jax.tree.map(np.asarray, found), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.every(9)
@MODEL
@pytest.mark.parametrize("microbatch_size", [None, 2])
def test_under_shard_map_there_is_one_reduction(name, microbatch_size):
    """Microbatches and the factors of one parameter are added up before the reduction over devices."""
    loss, params, batch = MODELS[name]
    _, norms, *_, total, _ = jax.jit(results(loss))(params, *batch)
    gradient = jg.clipped_grad(loss, 0.1, microbatch_size=microbatch_size)
    each, whole = PartitionSpec("data"), PartitionSpec()

    def part(params, mask, *batch):
        total, info = gradient(params, *batch, mask=mask)
        return lax.psum(total, "data"), info.norms

    specs = {"in_specs": (whole, *[each] * (1 + len(batch))), "out_specs": (whole, each)}
    function, mask = jax.shard_map(part, mesh=mesh(), **specs), jnp.arange(B) % 5 != 0
    found, found_norms = jax.jit(function)(params, mask, *batch)
    chex.assert_trees_all_close(found, total, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found_norms, jnp.where(mask, norms, 0), rtol=1e-4, atol=1e-5)
    collectives = communicated(function, params, mask, *batch)
    assert {kind for kind, _ in collectives} == {"all-reduce"}
    assert sum(numbers for _, numbers in collectives) == sum(leaf.size for leaf in jax.tree.leaves(params))


def cell(p, h, a):
    return jax.nn.relu(p["W"] @ h + a) + jax.jit(jnp.tanh)(h)


def in_a_branch(p, x, otherwise):
    return lax.cond(x.sum() > 0, lambda: cell(p, x[0], x[1]).sum(), otherwise)


CONTROL = {
    "scan": lambda p, x, k: lax.scan(lambda h, a: (cell(p, h, a), h), x[0], x)[1].sum(),
    "scan over layers": lambda p, x, k: lax.scan(lambda h, w: (jnp.tanh(w @ h), None), x[0], p["L"])[0].sum(),
    "fori_loop": lambda p, x, k: lax.fori_loop(0, 3, lambda i, h: cell(p, h, x[i]), x[0]).sum(),
    "map": lambda p, x, k: lax.map(lambda a: cell(p, a, x[0]), x).sum(),
    "cond": lambda p, x, k: in_a_branch(p, x, lambda: p["V"][0] @ x[2]),
    "cond on what is shared": lambda p, x, k: lax.cond(
        p["V"].sum() > 0, lambda: cell(p, x[0], x[1]).sum(), lambda: (p["W"] @ x[2]).sum()
    ),
    "cond of numbers": lambda p, x, k: cell(p, x[0], x[1]).sum() * lax.cond(x.sum() > 0, lambda: 1.0, lambda: 0.5),
    "cond without the weight": lambda p, x, k: in_a_branch(p, x, lambda: x[2].sum()),
    "switch": lambda p, x, k: lax.switch(
        k, [lambda: cell(p, x[0], x[1]).sum(), lambda: p["V"][0] @ x[2], lambda: jnp.sin(p["W"]).sum()]
    ),
    "cond in scan": lambda p, x, k: lax.scan(
        lambda h, a: (lax.cond(a[0] > 0, lambda: cell(p, h, a), lambda: h), p["V"] @ h), x[0], x
    )[1].sum(),
    "scan in checkpoint": lambda p, x, k: jax.checkpoint(CONTROL["scan"])(p, x, k),
    "associative_scan": lambda p, x, k: lax.associative_scan(jnp.add, x @ p["W"]).sum(),
}


@pytest.mark.every(13)
@pytest.mark.parametrize("name", CONTROL)
def test_control_flow_under_shard_map(name):
    """With the check of what varies between devices on, as it is by default."""
    loss, params = CONTROL[name], weights({"W": (6, 6), "V": (2, 6), "L": (2, 6, 6)})
    batch = normal(7, 16, 5, 6), jnp.arange(16) % 3
    expected = jax.vmap(jax.grad(loss), (None, 0, 0))(params, *batch)

    def part(params, *batch):
        g = jg.per_example_grad(loss)(params, *batch)
        total, _ = jg.clipped_grad(loss, np.inf, microbatch_size=1)(params, *batch)
        return g.materialize(), lax.psum((g.sum(), total), "data")

    specs = {"in_specs": (WHOLE, EACH, EACH), "out_specs": (EACH, WHOLE)}
    found, totals = quick_jit(jax.shard_map(part, mesh=mesh(), **specs))(params, *batch)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)
    for total in totals:
        chex.assert_trees_all_close(total, jax.tree.map(lambda a: a.sum(0), expected), rtol=1e-4, atol=1e-5)


@pytest.mark.every(2)
@pytest.mark.parametrize("spec", [PartitionSpec(), PartitionSpec(None, "data")], ids=["replicated", "sharded"])
def test_a_weight_that_is_resharded_inside_the_loss_keeps_its_factors(spec):
    def loss(W, x):
        return jnp.tanh(jax.sharding.reshard(W, PartitionSpec(None, None)) @ x).sum()

    device_mesh = mesh(AxisType.Explicit)
    with jax.set_mesh(device_mesh):
        W = jax.device_put(normal(0, 24, 16), NamedSharding(device_mesh, spec))
        X = jax.device_put(normal(1, 8, 16), NamedSharding(device_mesh, PartitionSpec()))
        assert jg.explain(loss)(W, X).rows[0].how == "factored"
        g = jg.per_example_grad(loss)(W, X)
        want = jax.vmap(jax.grad(loss), (None, 0))(W, X)
        np.testing.assert_allclose(g.sum(), want.sum(0), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(g.norms(), np.linalg.norm(np.asarray(want).reshape(8, -1), axis=1), rtol=1e-5)


@pytest.mark.every(3)
@pytest.mark.parametrize("transform", ["per_example_grad", "per_example_jacobian", "clipped_grad"])
def test_a_constraint_inside_the_loss_leaves_the_examples_where_they_are(transform):
    """As in `jax.vmap` with `spmd_axis_name`: the constraint includes the axis that the examples are sharded over."""
    device_mesh = mesh()
    sharding = NamedSharding(device_mesh, PartitionSpec(None))

    def loss(W, x):
        return jnp.tanh(jax.lax.with_sharding_constraint(W @ x, sharding)).sum()

    W, X = normal(0, 24, 16), jax.device_put(normal(1, 16, 16), NamedSharding(device_mesh, PartitionSpec("data")))

    def result(name):
        options = {"max_norm": 1.0} if transform == "clipped_grad" else {}
        out = getattr(jg, transform)(loss, spmd_axis_name=name, **options)
        return lambda W, X: out(W, X)[0] if options else out(W, X).norms()

    compiled = jax.jit(result("data")).lower(W, X).compile().as_text()
    assert "all-gather" not in compiled
    programs = [str(jax.make_jaxpr(result(name))(W, X)) for name in ("data", None)]
    constrained = [bool(re.search(r"sharding_constraint\[[^\]]*spec=P\([^)]*'data'", program)) for program in programs]
    assert constrained == [True, False]
    np.testing.assert_allclose(
        jax.jit(result("data"))(W, X), result(None)(W, jnp.asarray(np.asarray(X))), rtol=1e-5, atol=1e-5
    )


@pytest.mark.every(3)
@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto], ids=["explicit", "auto"])
@pytest.mark.parametrize("block_size", [3, 8, None])
def test_kernels_in_blocks_are_those_of_one_device(block_size, axis_type):
    model = lambda W, x: jnp.tanh(W @ x)  # noqa: E731
    W, X = normal(0, 4, 6), normal(1, 16, 6)
    device_mesh = mesh(axis_type)
    for x2 in (None, normal(2, 8, 6)):
        with jax.set_mesh(device_mesh):
            sharding = NamedSharding(device_mesh, PartitionSpec("data"))
            args = W, jax.device_put(X, sharding), None if x2 is None else jax.device_put(x2, sharding)
            found = jax.jit(jg.attribution.ntk(model, block_size=block_size))(*args)
        np.testing.assert_allclose(found, jax.jit(jg.attribution.ntk(model))(W, X, x2), rtol=1e-5, atol=1e-6)
