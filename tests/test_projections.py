"""Two-sided projections: those of the materialized gradients, by the same matrices, for every loss of the zoo."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.quick import quick_jit
from support.zoo import ENTRIES
from test_zoo import axes_of

import jaxgrad as jg
from jaxgrad import attribution
from jaxgrad.attribution import Sides, normalized, random_sides

project = quick_jit(attribution.project)
materialized = quick_jit(lambda g: g.materialize())
KEY = jax.random.key(0)


@pytest.fixture
def jax_defaults():
    """JAX's default promotion rules, in float64."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def is_sides(node):
    return isinstance(node, Sides)


def dense_one(a, sides):
    """[B, numbers]: the definition, on one parameter's materialized gradients [B, *shape]."""
    a = np.asarray(a)
    a = a if sides.weights is None else a * np.asarray(sides.weights)
    axes = list(range(1, a.ndim))
    operands, names = [a, [0, *axes]], []
    for matrix, of_matrix in sides.matrices:
        names.append(a.ndim + len(names))
        operands += [np.asarray(matrix).astype(np.float64), [names[-1], *(1 + k for k in of_matrix)]]
    kept = [k for k in axes if k - 1 not in sides.summed]
    found = sides.scale * np.einsum(*operands, [0, *kept, *names], optimize=True)
    found = found.reshape(len(a), -1)
    return np.concatenate([found.real, found.imag], 1) if np.iscomplexobj(a) else found


def dense(G, sides):
    leaves = zip(jax.tree.leaves(G), jax.tree.leaves(sides, is_leaf=is_sides), strict=True)
    return np.concatenate([dense_one(a, s) for a, s in leaves], 1)


def assert_projects(found, G, sides, rtol=1e-10):
    expected = dense(G, sides)
    assert found.shape == expected.shape
    leaves = [np.abs(np.asarray(a)) for a in jax.tree.leaves(G)]
    largest = max([a.max(initial=0) for a in leaves])
    np.testing.assert_allclose(found, expected, rtol=0, atol=rtol * max(largest, 1e-300))


def gradients(entry):
    axes = axes_of(entry)
    g = quick_jit(jg.per_example_grad(entry.loss, in_axes=axes))(entry.params, *entry.batch)
    return g, materialized(g)


@pytest.mark.every(140)
@pytest.mark.usefixtures("jax_defaults")
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_the_zoo_has_the_projections_of_its_materialized_gradients(entry):
    sides = random_sides(entry.params, KEY, 3)
    g, G = gradients(entry)
    assert_projects(project(g, sides), G, sides, max(entry.rtol, 1e-10))


NAMED = ("mlp", "conv_2d", "conv_channels_first_in_groups_and_dilated", "tied_to_the_output_layer")


@pytest.mark.every(3)
@pytest.mark.usefixtures("jax_defaults")
@pytest.mark.parametrize("name", NAMED)
def test_gaussian_sides_of_several_sizes(name):
    (entry,) = [e for e in ENTRIES if e.name == name]
    leaves, treedef = jax.tree.flatten(entry.params)
    sizes = treedef.unflatten([2 + k % 3 for k in range(len(leaves))])
    sides = random_sides(entry.params, KEY, sizes, gaussian=True)
    g, G = gradients(entry)
    assert_projects(project(g, sides), G, sides)


def layers(params, x):
    """Layers in a loop, each computed again in the backward pass, between two uses of one matrix."""

    def layer(h, p):
        return h + jnp.tanh(h @ p["up"]) @ p["down"] + p["bias"][None], None

    h = x @ params["E"].T
    h = jax.lax.scan(jax.checkpoint(layer), h, params["layers"])[0]
    return jnp.sin(h @ params["E"]).sum()


def scanned(L=4, D=6, H=9, B=5, T=3):
    rng = np.random.default_rng(0)
    shapes = {"up": (L, D, H), "down": (L, H, D), "bias": (L, D)}
    params = {"E": rng.normal(size=(D, 7)), "layers": {name: rng.normal(size=shape) for name, shape in shapes.items()}}
    return jax.tree.map(jnp.asarray, params), jnp.asarray(rng.normal(size=(B, T, 7)))


STACKED = {"E": 0, "layers": 1}
of_layers = quick_jit(jg.per_example_grad(layers))


def test_stacked_layers_have_matrices_and_numbers_of_their_own():
    params, x = scanned()
    sides = random_sides(params, KEY, 3, stacked=STACKED)
    results = jax.tree.map(lambda p, s: s.result(p.shape), params, sides)
    assert results["layers"] == {"up": (4, 3, 3), "down": (4, 3, 3), "bias": (4, 3)}
    assert len({bytes(np.asarray(rows)) for rows in jnp.moveaxis(sides["layers"]["up"].rows, 1, 0)}) == 4
    g = of_layers(params, x)
    G = materialized(g)
    found = project(g, sides)
    assert_projects(found, G, sides)
    one = {
        "up": jax.tree.map(lambda a: a[:, 2], sides["layers"]["up"]).replace(
            row_axes=(0,), column_axes=(1,), stacked=()
        )
    }
    start = 9 + 4 * (3 + 9) + 9 * 2  # E, the biases and `down`, and two layers of `up`
    np.testing.assert_allclose(found[:, start : start + 9], dense({"up": G["layers"]["up"][:, 2]}, one), rtol=1e-10)


def test_projections_are_linear_and_keep_inner_products():
    params, x = scanned()
    g = of_layers(params, x)
    c = jnp.linspace(-1, 1, 5)
    sides = random_sides(params, KEY, 4, stacked=STACKED)
    twice = quick_jit(lambda g, sides: attribution.project(g.scale(c) + g, sides))(g, sides)
    np.testing.assert_allclose(twice, (1 + c)[:, None] * project(g, sides), rtol=1e-9, atol=1e-9)
    lengths, gram = quick_jit(lambda g: (g.norms(), g.gram()))(g)
    for gaussian in (False, True):

        def products(key, gaussian=gaussian):
            rows = attribution.project(g, random_sides(params, key, 2, stacked=STACKED, gaussian=gaussian))
            return rows @ rows.T / jnp.outer(lengths, lengths)

        many = quick_jit(jax.vmap(products))(jax.random.split(KEY, 400))
        spread = np.std(many, 0) / np.sqrt(len(many))
        assert np.all(np.abs(np.mean(many, 0) - gram / jnp.outer(lengths, lengths)) < 4 * spread)


@pytest.mark.every(0)
def test_the_matrices_depend_on_the_key_and_the_shapes_alone():
    params, _ = scanned()
    half = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16), params)
    for gaussian in (False, True):
        draw = lambda params, gaussian=gaussian: quick_jit(lambda: random_sides(params, KEY, 3, gaussian=gaussian))()  # noqa: E731
        sides = draw(params)
        with jax.enable_x64(False):
            again = draw(half)
        assert jax.tree.structure(sides) == jax.tree.structure(again)
        jax.tree.map(np.testing.assert_array_equal, sides, again)
    rows = random_sides(params, KEY, 3)["E"].rows
    assert rows.dtype == jnp.int8
    assert set(np.unique(rows)) == {-1, 1}


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_lower_precision(dtype):
    params, x = jax.tree.map(lambda a: a.astype(dtype), scanned())
    sides = random_sides(params, KEY, 3, stacked=STACKED)
    loss = lambda p, x: layers(p, x).astype(jnp.float32)  # noqa: E731
    g = quick_jit(jg.per_example_grad(loss))(params, x)
    found, expected = project(g, sides), project(wide(g), sides)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def wide(g):
    """The same gradients, with every array in float64."""
    return jax.tree.map(lambda a: a.astype(jnp.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a, g)


def test_no_examples_and_one():
    params, x = scanned()
    sides = random_sides(params, KEY, 3)
    assert project(of_layers(params, x[:0]), sides).shape == (0, 4 * 9)
    g = of_layers(params, x[:1])
    assert_projects(project(g, sides), materialized(g), sides)


def test_complex_weights():
    rng = np.random.default_rng(1)
    params = {"c": jnp.asarray(rng.normal(size=(8, 6)) + 1j * rng.normal(size=(8, 6))), "r": jnp.ones(8, jnp.float64)}
    loss = lambda p, x: jnp.abs(p["c"] @ x).sum() + (p["r"] * jnp.real(p["c"] @ x)).sum()  # noqa: E731
    g = quick_jit(jg.per_example_grad(loss))(params, jnp.asarray(rng.normal(size=(5, 6)) + 0j))
    sides = random_sides(params, KEY, 3)
    found = project(g, sides)
    assert found.shape == (5, 18 + 3)
    assert_projects(found, materialized(g), sides)


def test_sides_of_the_caller_on_any_axes():
    rng = np.random.default_rng(2)
    params = jnp.asarray(rng.normal(size=(3, 4, 5, 6)))
    loss = lambda p, x: jnp.tanh(jnp.einsum("ghij,gj->ghi", p, x)).sum()  # noqa: E731
    g = quick_jit(jg.per_example_grad(loss))(params, jnp.asarray(rng.normal(size=(7, 3, 6))))
    G = materialized(g)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape))  # noqa: E731
    for sides in (
        Sides(draw(2, 3, 4), draw(3, 5, 6), (0, 1), (2, 3)),
        Sides(draw(2, 3, 5), draw(3, 3, 6), (0, 2), (0, 3), stacked=(0,)),
        Sides(draw(2, 4, 6), draw(3, 3, 5), (1, 3), (0, 2), scale=0.5),
        Sides(columns=draw(2, 6), column_axes=(3,), weights=draw(3, 4, 5, 1)),
        Sides(draw(2, 4, 5), draw(3, 6), (1, 2), (3,), weights=draw(3, 1, 5, 6)),
        Sides(),
    ):
        assert_projects(project(g, sides), G, sides)


@pytest.mark.every(3)
@pytest.mark.parametrize("factored", [True, False])
def test_second_moments(factored):
    params, x = scanned()
    g = of_layers(params, x)
    G = materialized(g)
    v = jax.tree.map(lambda a: (a**2).mean(0) + 0.1, G)
    sides = random_sides(params, KEY, 3, stacked=STACKED)
    found = project(g, normalized(sides, v, 1e-3, factored=factored))

    def divided(a, v):
        v = np.asarray(v) + 1e-6
        if factored and v.ndim == 3:
            v = v.mean(2, keepdims=True) * v.mean(1, keepdims=True) / v.mean((1, 2), keepdims=True)
        elif factored and v.shape == (6, 7):
            v = v.mean(1, keepdims=True) * v.mean(0) / v.mean()
        return np.asarray(a) / np.sqrt(v)

    assert_projects(found, jax.tree.map(divided, G, v), sides)


def test_factored_second_moments_of_a_side_that_is_kept():
    rng = np.random.default_rng(3)
    W, v = rng.normal(size=(8, 2)), rng.uniform(0.5, 2, size=(8, 2))
    g = jg.per_example_grad(lambda W, x: jnp.tanh(W @ x).sum())(W, jnp.asarray(rng.normal(size=(5, 2))))
    sides = random_sides(W, KEY, 3)
    assert sides.columns is None
    rank_one = v.mean(1, keepdims=True) * v.mean(0) / v.mean()
    assert_projects(project(g, normalized(sides, v, 0.0)), np.asarray(materialized(g)) / np.sqrt(rank_one), sides)


@pytest.mark.usefixtures("plain_types")
def test_exported_for_any_number_of_examples():
    params, x = scanned()
    sides = random_sides(params, KEY, 3, stacked=STACKED)

    def both(sides, params, x):
        inside = attribution.per_example_projection(layers, sides)(params, x)[1]
        return inside, attribution.project(jg.per_example_grad(layers)(params, x), sides)

    symbolic = jax.ShapeDtypeStruct(jax.export.symbolic_shape("B, 3, 7"), x.dtype)
    exported = jax.export.export(jax.jit(both))(sides, params, symbolic)
    found = jax.export.deserialize(exported.serialize()).call(sides, params, x)
    for numbers in found:
        np.testing.assert_allclose(numbers, project(of_layers(params, x), sides), rtol=1e-9, atol=1e-12)


def test_errors_name_the_call():
    params, x = scanned()
    g = of_layers(params, x)
    sides = random_sides(params, KEY, 3)
    with pytest.raises(ValueError, match="project: expected a tree like the parameters'"):
        project(g, sides["layers"])
    with pytest.raises(ValueError, match=r"project: expected Sides.rows at sides\['E'\] of shape"):
        project(g, sides | {"E": Sides(jnp.ones((2, 5)))})
    with pytest.raises(ValueError, match="share only stacked axes"):
        project(g, sides | {"E": Sides(jnp.ones((2, 6)), jnp.ones((2, 6, 7)), (0,), (0, 1))})
    with pytest.raises(ValueError, match=r"expected axes of \[6, 7\] in increasing order as Sides.row_axes"):
        project(g, sides | {"E": Sides(jnp.ones((2, 7, 6)), None, (1, 0))})
    with pytest.raises(ValueError, match=r"expected Sides.weights .* with the sizes"):
        project(g, sides | {"E": Sides(weights=jnp.ones(7))})
    with pytest.raises(ValueError, match="random_sides: expected a size of at least 1"):
        random_sides(params, KEY, 0)
    with pytest.raises(ValueError, match="random_sides: expected a number or a tree prefix"):
        random_sides(params, KEY, {"E": 1})
    with pytest.raises(ValueError, match="normalized: expected second moments like the sides"):
        normalized(sides, params["layers"])


def test_the_number_of_operations_for_a_long_sequence():
    """A product over positions takes T·k(F + K) + T·k² multiplications, also where it is larger than its gradient."""
    B, T, F, K, k = 3, 64, 40, 30, 4
    left, right = jnp.ones((B, T, F), jnp.float32), jnp.ones((B, T, K), jnp.float32)
    g = jg.PerExampleGrads((jg.per_example.Outer.of("tf,tk->fk", left, right, jnp.float32),))
    sides = random_sides(jnp.ones((F, K)), KEY, k)
    cost = jax.jit(attribution.project).lower(g, sides).compile().cost_analysis()
    assert cost["flops"] < 1.3 * 2 * B * T * (k * (F + K) + k * k)


# --- Inside the loop that computes a gradient ------------------------------------------------------------------------


def found_twice(loss, sides, params, *batch, **options):
    """(the projections inside the loops, the projections of the factors)."""

    @quick_jit
    def run(sides, params, *batch):
        _, numbers = attribution.per_example_projection(loss, sides, **options)(params, *batch)
        return numbers, attribution.project(jg.per_example_grad(loss, **options)(params, *batch), sides)

    return run(sides, params, *batch)


@pytest.mark.every(140)
@pytest.mark.usefixtures("jax_defaults")
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_the_zoo_is_projected_inside_its_loops(entry):
    stacked = jax.tree.map(lambda a: int(np.ndim(a) > 2), entry.params)
    sides = random_sides(entry.params, KEY, 2, stacked=stacked)
    inside, after = found_twice(entry.loss, sides, entry.params, *entry.batch, in_axes=axes_of(entry))
    np.testing.assert_allclose(inside, after, rtol=0, atol=max(entry.rtol, 1e-10) * np.abs(after).max(initial=0))


PLACES = {  # how layers [L, D, H] are stored: (stored from layers, layers from stored, its stacked axes)
    "transposed": (lambda a: a.transpose(2, 0, 1), lambda a: a.transpose(1, 2, 0), 0),
    "merged": (lambda a: a.reshape(24, 9), lambda a: a.reshape(4, 6, 9), 0),
    "divided": (lambda a: a.reshape(2, 2, 6, 3, 3), lambda a: a.reshape(4, 6, 9), 2),
    "divided and transposed": (
        lambda a: a.reshape(2, 2, 6, 9).transpose(1, 0, 3, 2),
        lambda a: a.transpose(1, 0, 3, 2).reshape(4, 6, 9),
        2,
    ),
    "backwards": (lambda a: a[:, ::-1, ::-1], lambda a: jax.lax.rev(a, (1, 2)), 1),
    "the last layer first": (lambda a: a[::-1], lambda a: jax.lax.rev(a, (0,)), 1),
    "with an axis of one": (lambda a: a[:, None], lambda a: a.reshape(4, 6, 9), 1),
    "in one": (lambda a: a.reshape(-1), lambda a: a.reshape(4, 6, 9), 0),
    "cast": (lambda a: a.astype(jnp.float32), lambda a: a.astype(jnp.float64), 1),
}


@pytest.mark.every(3)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", PLACES)
def test_stacked_layers_in_any_place_of_a_parameter(name, weighted):
    stored, layers_of, stacked = PLACES[name]
    params, x = scanned()
    params["layers"]["up"] = stored(params["layers"]["up"])

    def loss(p, x):
        return layers({"E": p["E"], "layers": p["layers"] | {"up": layers_of(p["layers"]["up"])}}, x)

    sides = random_sides(params, KEY, 2, stacked={"E": 0, "layers": {"bias": 1, "down": 1, "up": stacked}})
    if weighted:
        sides = normalized(sides, jax.tree.map(lambda a: 1.5 + jnp.sin(a), params))
    inside, after = found_twice(loss, sides, params, x)
    tolerance = 1e-6 if name == "cast" else 1e-10
    np.testing.assert_allclose(inside, after, rtol=0, atol=tolerance * np.abs(after).max())


@pytest.mark.every(0)
def test_has_aux_argnums_and_keywords():
    params, x = scanned()
    loss = lambda x, p, *, scale: (scale * layers(p, x), x.sum())  # noqa: E731
    sides = random_sides((params,), KEY, 2, stacked=(STACKED,))
    options = {"argnums": (1,), "has_aux": True, "in_axes": (0, None)}
    (values, aux), numbers = attribution.per_example_projection(loss, sides, **options)(x, params, scale=jnp.ones(5))
    g, _ = jg.per_example_grad(loss, **options)(x, params, scale=jnp.ones(5))
    assert (values.shape, aux.shape) == ((5,), (5,))
    np.testing.assert_allclose(numbers, project(g, sides), rtol=1e-9, atol=1e-12)


def held(function, *arguments):
    found = jax.jit(function).lower(*arguments).compile().memory_analysis()
    return found.temp_size_in_bytes + found.output_size_in_bytes


def recurrent(params, x):
    """A recurrent network whose weights every step uses."""
    step = jax.checkpoint(lambda h, a: (jnp.tanh(params["W"] @ h + params["V"] @ a), None))
    return jax.lax.scan(step, jnp.zeros(len(params["W"]), x.dtype), x)[0].sum()


@pytest.mark.as_used
@pytest.mark.parametrize("name", ["layers", "recurrent"])
def test_a_loop_holds_no_factors(name):
    shapes, loss, T, stacked = {
        "layers": (jax.eval_shape(lambda: scanned(8, 128, 256)[0]), layers, 64, STACKED),
        "recurrent": ({"W": jnp.ones((64, 64)), "V": jnp.ones((64, 7))}, recurrent, 256, 0),
    }[name]
    params = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.float32), shapes)
    X = jax.ShapeDtypeStruct((8, T, 7), jnp.float32)
    plain = held(jax.grad(lambda p, X: jax.vmap(loss, (None, 0))(p, X).mean()), params, X)

    def numbers(params, X):
        return attribution.per_example_projection(loss, random_sides(params, KEY, 8, stacked=stacked))(params, X)

    def factors(params, X):
        return attribution.project(jg.per_example_grad(loss)(params, X), random_sides(params, KEY, 8, stacked=stacked))

    inside = held(numbers, params, X)
    print(name, plain, inside, held(factors, params, X))
    assert inside <= 1.2 * plain
    assert inside < held(factors, params, X)


def small_net(params, x):
    """A convolution, layers in a loop and a table, in one loss of x [8, 8, 3]."""
    out = jax.lax.conv_general_dilated(x[None], params["K"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    h = jnp.tanh(out[0].reshape(16, 16))
    step = jax.checkpoint(lambda h, W: (h + jnp.tanh(h @ W), None))
    h = jax.lax.scan(step, h, params["layers"])[0]
    ids = jnp.clip((3 * x[:, 0, 0]).astype(jnp.int32) + 5, 0, 9)
    return jnp.mean((h[:8] - params["E"][ids]) ** 2).astype(jnp.float32)


@pytest.mark.as_used
@pytest.mark.every(2)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "f32"])
def test_projections_under_jit_in_a_batch_of_64_are_as_accurate_as_the_gradients(dtype):
    """Against float64 from the same numbers: no further off than those of materialized gradients."""
    rng = np.random.default_rng(0)
    shapes = {"K": (3, 3, 3, 16), "layers": (3, 16, 16), "E": (10, 16)}
    params = {k: jnp.asarray(rng.normal(size=s) / np.sqrt(s[-2]), dtype) for k, s in shapes.items()}
    X = jnp.asarray(rng.normal(size=(64, 8, 8, 3)), dtype)
    sides = random_sides(params, KEY, 6, stacked={"K": 0, "layers": 1, "E": 0})

    def both(params, X):
        inside = attribution.per_example_projection(small_net, sides)(params, X)[1]
        return inside, attribution.project(jg.per_example_grad(small_net)(params, X), sides)

    gradients = jax.jit(jax.vmap(jax.grad(small_net), (None, 0)))
    wide = jax.tree.map(lambda a: a.astype(jnp.float64), (params, X))
    expected = dense(gradients(*wide), sides)

    def off(found):
        return np.linalg.norm(np.asarray(found, np.float64) - expected, axis=1) / np.linalg.norm(expected, axis=1)

    narrow = off(dense(jax.tree.map(lambda a: np.asarray(a, np.float64), gradients(params, X)), sides))
    for found in jax.jit(both)(params, X):
        assert found.dtype == jnp.float32
        assert np.median(off(found)) <= 1.5 * np.median(narrow)
        assert off(found).max() <= 1.5 * narrow.max()
