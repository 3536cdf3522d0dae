"""Rows for each position of a sequence: the projected gradients of the single terms of a loss, stored and searched."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.quick import quick_jit
from test_projections import dense

from jaxgrad import attribution, streams

V, D, L, H, B, T = 19, 7, 3, 11, 4, 6
KEY = jax.random.key(0)
STACKED = {"E": 0, "layers": 1}


@pytest.fixture(autouse=True)
def jax_defaults():
    """JAX's default promotion rules, in float64."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def losses(params, ids):
    """The loss at each token but the first, of a causal transformer with a tied table and scanned layers."""
    h = params["E"][ids[:-1]]
    causal = jnp.tril(jnp.ones((len(h), len(h)), bool))

    def layer(h, p):
        scores = jnp.where(causal, (h @ p["q"]) @ (h @ p["k"]).T, -jnp.inf)
        h = h + jax.nn.softmax(scores) @ (h @ p["v"])
        return h + jnp.tanh(h @ p["up"] + p["bias"]) @ p["down"], None

    h = jax.lax.scan(jax.checkpoint(layer), h, params["layers"])[0]
    log_probabilities = jax.nn.log_softmax(h @ params["E"].T)
    return -jnp.take_along_axis(log_probabilities, ids[1:, None], 1)[:, 0]


def inputs(dtype=jnp.float64, count=B, length=T + 1):
    rng = np.random.default_rng(0)
    shapes = {"q": (L, D, D), "k": (L, D, D), "v": (L, D, D), "up": (L, D, H), "bias": (L, H), "down": (L, H, D)}
    draw = lambda shape: jnp.asarray(rng.normal(size=shape) / 2, dtype)  # noqa: E731
    params = {"E": draw((V, D)), "layers": {name: draw(shape) for name, shape in shapes.items()}}
    return params, jnp.asarray(rng.integers(0, V, (count, length)))


def sides_of(params, size=3):
    return attribution.random_sides(params, KEY, size, stacked=STACKED)


def of_single_terms(losses, params, *batch):
    """The gradients of one term after another, [B, T, …]: `jax.grad` of the term alone."""
    T = jax.eval_shape(losses, params, *(a[0] for a in batch)).shape[0]

    def at(t):
        gradient = jax.grad(lambda params, *example: losses(params, *example)[t])
        return jax.vmap(gradient, (None, *(0 for _ in batch)))(params, *batch)

    return jax.tree.map(lambda *terms: np.stack(terms, 1), *(at(t) for t in range(T)))


def expected_rows(losses, sides, params, *batch):
    G = of_single_terms(losses, params, *batch)
    B, T = jax.tree.leaves(G)[0].shape[:2]
    return dense(jax.tree.map(lambda a: a.reshape(B * T, *a.shape[2:]), G), sides).reshape(B, T, -1)


@pytest.mark.parametrize("block_size", [1, 4, 100])
def test_rows_are_the_projected_gradients_of_the_single_terms(block_size):
    params, ids = inputs()
    sides = sides_of(params)
    terms, rows = quick_jit(attribution.per_position_projection(losses, sides, block_size=block_size))(params, ids)
    np.testing.assert_allclose(terms, jax.vmap(losses, (None, 0))(params, ids), rtol=1e-12)
    np.testing.assert_allclose(rows, expected_rows(losses, sides, params, ids), rtol=0, atol=1e-11)
    total = attribution.per_example_projection(lambda params, ids: losses(params, ids).sum(), sides)
    np.testing.assert_allclose(rows.sum(1), quick_jit(total)(params, ids)[1], rtol=0, atol=1e-10)


def test_rows_do_not_depend_on_later_tokens():
    params, ids = inputs()
    project = quick_jit(attribution.per_position_projection(losses, sides_of(params)))
    changed = ids.at[:, 4:].set((ids[:, 4:] + 1) % V)
    np.testing.assert_array_equal(project(params, ids)[1][:, :3], project(params, changed)[1][:, :3])
    assert not np.allclose(project(params, ids)[1][:, 3], project(params, changed)[1][:, 3])


def test_arguments_of_every_role():
    rng = np.random.default_rng(1)
    x, scale, W, c = (rng.normal(size=shape) for shape in ((4, 2, 3), (4,), (5, 2), (3, 4)))

    def terms(x, scale, W, *, c):
        return jnp.tanh(W @ (x * scale[None, :2]).T).sum(0) * c

    sides = attribution.random_sides(W, KEY, 1)
    project = attribution.per_position_projection(terms, sides, argnums=-1, in_axes=(2, None, None))
    values, rows = quick_jit(project)(x, scale, W, c=c)
    each = lambda W, x, c: terms(x, scale, W, c=c)  # noqa: E731
    moved = np.moveaxis(x, 2, 0)
    np.testing.assert_allclose(values, jax.vmap(each, (None, 0, 0))(W, moved, c), rtol=1e-12)
    np.testing.assert_allclose(rows, expected_rows(each, sides, W, moved, c), atol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_lower_precision(dtype):
    params, ids = inputs(dtype)
    sides = sides_of(params)
    wide = jax.tree.map(lambda a: a.astype(jnp.float64), params)
    in_float32 = lambda params, ids: losses(jax.tree.map(lambda a: a.astype(jnp.float32), params), ids)  # noqa: E731
    terms, rows = quick_jit(attribution.per_position_projection(in_float32, sides))(params, ids)
    assert terms.dtype == rows.dtype == jnp.float32
    expected = expected_rows(losses, sides, wide, ids)
    rounding = float(jnp.finfo(dtype).eps) + 64 * float(jnp.finfo(jnp.float32).eps)
    np.testing.assert_allclose(rows, expected, rtol=0, atol=rounding * np.abs(expected).max())


@pytest.mark.parametrize("block_size", [1, 3])
def test_no_examples_and_one_example_with_one_position(block_size):
    params, ids = inputs()
    sides = sides_of(params)
    project = quick_jit(attribution.per_position_projection(losses, sides, block_size=block_size))
    S = expected_rows(losses, sides, params, ids[:1, :2]).shape[-1]
    assert [a.shape for a in project(params, ids[:0])] == [(0, T), (0, T, S)]
    assert [a.shape for a in project(params, ids[:1, :2])] == [(1, 1), (1, 1, S)]


@pytest.mark.as_used
def test_the_memory_is_that_of_one_backward_pass_whatever_the_number_of_positions():
    params, _ = inputs(jnp.float32)
    sides = sides_of(params)
    project = attribution.per_position_projection(losses, sides)
    whole = attribution.per_example_projection(lambda params, ids: losses(params, ids).sum(), sides)
    ids = jnp.zeros((16, 65), jnp.int32)
    rows, one = (jax.jit(f).lower(params, ids).compile().memory_analysis() for f in (project, whole))
    assert rows.temp_size_in_bytes < 1.5 * one.temp_size_in_bytes + 2 * rows.output_size_in_bytes
    at_once = attribution.per_position_projection(losses, sides, block_size=64)
    assert (
        jax.jit(at_once).lower(params, ids).compile().memory_analysis().temp_size_in_bytes
        > 10 * rows.temp_size_in_bytes
    )


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_examples_on_several_devices(kind):
    rng = np.random.default_rng(2)
    W, x = jnp.asarray(rng.normal(size=(9, 7))), jnp.asarray(rng.normal(size=(8, 5, 7)))
    terms = lambda W, x: jnp.tanh(x @ W.T).sum(1) * jnp.tanh(x[0] @ W.T).sum()  # noqa: E731
    sides = attribution.random_sides(W, KEY, 3)
    project = jax.jit(attribution.per_position_projection(terms, sides, block_size=2))
    mesh = jax.make_mesh((4,), ("examples",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.P("examples")))
        np.testing.assert_allclose(project(W, sharded)[1], expected_rows(terms, sides, W, x), atol=1e-12)


def test_errors_name_the_call():
    params, ids = inputs()
    sides = sides_of(params)
    for fun, got in (
        (lambda p, ids: losses(p, ids).sum(), r"float64 of shape \[\]"),
        (lambda p, ids: ids, r"int64 of shape"),
        (lambda p, ids: losses(p, ids[:1]), r"float64 of shape \[0\]"),
        (lambda p, ids: (losses(p, ids),), "tuple"),
    ):
        with pytest.raises(TypeError, match=rf"per_position_projection: expected a function .* got {got}"):
            attribution.per_position_projection(fun, sides)(params, ids)
    with pytest.raises(ValueError, match="per_position_projection: expected a tree like the parameters'"):
        attribution.per_position_projection(losses, sides["E"])(params, ids)
    for make in (attribution.per_position_projection, streams.position_projections):
        with pytest.raises(ValueError, match="a block size of at least 1, got 0"):
            make(losses, sides, block_size=0)


# --- Stored rows -----------------------------------------------------------------------------------------------------


def stored(folder, dtype):
    """(sides, expected rows, the results of a run)."""
    params, ids = inputs(count=10)
    sides = sides_of(params)
    each = streams.position_projections(losses, sides, dtype=dtype, block_size=2)
    results = streams.run(each)(params, streams.Batches(np.asarray(ids), size=4), folder)
    return np.asarray(jax.vmap(losses, (None, 0))(params, ids)), expected_rows(losses, sides, params, ids), results


@pytest.mark.every(2)
@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_rows_are_stored_and_found_by_example_and_position(tmp_path, dtype):
    values, expected, results = stored(tmp_path, dtype)
    rows = streams.load(tmp_path, check=True).rows["projections"]
    assert isinstance(rows, np.memmap)
    assert (rows.shape, rows.dtype, results.examples) == (expected.shape, dtype, 10)
    np.testing.assert_allclose(results.rows["values"], values, rtol=1e-12)
    tolerance = {"float64": 1e-12, "float16": 1e-3, "bfloat16": 1e-2}[dtype]
    np.testing.assert_allclose(np.float64(rows), expected, rtol=0, atol=tolerance * np.abs(expected).max())
    queries = expected[[1, 7], [2, 5]] if dtype == "float64" else np.float32(expected[[1, 7], [2, 5]])
    products = np.einsum("cs,nts->cnt", queries, np.asarray(rows).astype(queries.dtype))
    mask = np.random.default_rng(0).random(rows.shape[:2]) < 0.5
    for where in (None, mask):
        masked = products if where is None else np.where(where, products, -np.inf)
        order = np.argsort(-masked.reshape(2, -1), 1, stable=True)[:, :5]
        pairs = np.stack(np.unravel_index(order, rows.shape[:2]), -1)
        for size in (1, 13, 1000):
            found = streams.search(5, size=size)(queries, rows, where=where)
            np.testing.assert_array_equal(found.indices, pairs)
            best = np.take_along_axis(masked.reshape(2, -1), order, 1)
            np.testing.assert_allclose(found.values, best, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(streams.scores(size=13)(queries, rows), products, rtol=1e-5, atol=1e-5)


def test_ties_go_to_the_earlier_row_and_rows_that_do_not_count_come_last():
    rows = np.zeros((3, 2, 1), np.float32)
    rows[2, 1] = 1
    query, where = np.ones((1, 1), np.float32), np.array([[0, 1], [1, 1], [0, 1]], bool)
    found = streams.search(10, size=2)(query, rows, where=where)
    assert found.indices[0].tolist() == [[2, 1], [0, 1], [1, 0], [1, 1], [0, 0], [2, 0]]
    assert np.asarray(found.values)[0].tolist() == [1, 0, 0, 0, -np.inf, -np.inf]
    flat = streams.search(2, size=1)(query, rows[:, 1], where=np.array([True, True, False]))
    assert flat.indices.tolist() == [[0, 1]]


@pytest.mark.usefixtures("plain_types")
def test_searches_refuse_shapes_that_do_not_fit():
    rows = np.zeros((3, 2, 5), np.float32)
    for call in (streams.search(1), streams.scores()):
        for queries, rows_ in ((np.ones((1, 4)), rows), (np.ones(5), rows), (np.ones((1, 3)), np.zeros(3))):
            with pytest.raises(ValueError, match=r"streams\.\w+: expected queries \[C, S\] and rows \[N, S\]"):
                call(queries, rows_)
    with pytest.raises(ValueError, match=r"streams.search: expected where of shape \[3, 2\]"):
        streams.search(1)(np.ones((1, 5)), rows, where=np.ones(3, bool))
