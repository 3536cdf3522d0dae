"""PerExampleGrads as JAX users use it: transformations, trees, clipping, errors, the compiled program."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxgrad as jg
from jaxgrad.network import ACTIVATIONS, Params, autodiff, closed_form, init_params, loss
from jaxgrad.per_example import Dense, Outer, PerExampleGrads, Rows

B, H, D = 6, 3, 5


def batch(dtype=jnp.float64, B=B, H=H, D=D):
    kp, kx, ky = jax.random.split(jax.random.key(0), 3)
    X = jax.random.normal(kx, (B, D), jnp.float64).astype(dtype)
    return init_params(kp, D, H, dtype), X, jnp.where(jax.random.bernoulli(ky, shape=(B,)), 1, -1).astype(dtype)


@pytest.fixture
def g():
    return closed_form.factored_grads(*batch())


def flat(tree):
    """A tree of [B, …] as one matrix."""
    return np.concatenate([np.asarray(a).reshape(len(a), -1) for a in jax.tree.leaves(tree)], axis=1)


def close(a, b, rtol=1e-12):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol)


@pytest.mark.every(9)
@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_the_exercises_factors_are_its_gradients(name):
    params, X, Y = batch()
    g = closed_form.factored_grads(params, X, Y, ACTIVATIONS[name])
    close(g.materialize(), autodiff.batched_grad(params, X, Y, ACTIVATIONS[name]), 1e-11)
    G = flat(closed_form.batched_grad(params, X, Y, ACTIVATIONS[name]))
    close(g.norms(), np.linalg.norm(G, axis=1))
    close(g.gram(), G @ G.T)
    close(flat(jax.tree.map(lambda a: a[None], g.second_moment())), (G**2).mean(0)[None])
    close(flat(jax.tree.map(lambda a: a[None], g.variance())), G.var(0)[None])
    close(flat(jax.tree.map(lambda a: a[None], g.mean())), G.mean(0)[None])
    close(g.mean(), closed_form.value_and_grad(params, X, Y, ACTIVATIONS[name])[1])


@pytest.mark.every(3)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_exercises_factors_in_low_precision(dtype):
    params, X, Y = batch(dtype)
    g = closed_form.factored_grads(params, X, Y)
    assert {leaf.dtype for leaf in g.sum()} == {jnp.dtype(dtype)}
    wide = jax.tree.map(lambda a: a.astype(jnp.float64), (params, X, Y))
    np.testing.assert_allclose(g.norms(), closed_form.factored_grads(*wide).norms(), rtol=1e-5)


def test_a_batch_of_factors_is_a_candidate_for_check_gradient():
    report = jg.check_gradient(closed_form.factored_grads, loss, *batch())
    assert report.agrees
    wrong = jg.check_gradient(lambda p, X, Y: closed_form.factored_grads(p, X, -Y), loss, *batch())
    assert not wrong.agrees


def test_it_works_under_jit_vmap_scan_and_tree_map(g):
    close(jax.jit(lambda g: g.clip(0.3))(g).sum(), g.clip(0.3).sum())
    several = jax.tree.map(lambda a: jnp.stack([a, 3 * a]), g)
    norms = jax.vmap(lambda g: g.norms())(several)
    close(norms[0], g.norms())
    assert (norms[1] > norms[0]).all()

    def step(total, i):
        return jax.tree.map(jnp.add, total, g.scale(jnp.full(B, i)).sum()), None

    total, _ = jax.lax.scan(step, jax.tree.map(jnp.zeros_like, g.sum()), jnp.arange(3.0))
    close(total, jax.tree.map(lambda a: 3 * a, g.sum()))
    carried, _ = jax.lax.scan(lambda g, _: (g.scale(jnp.full(B, 2.0)), None), g, length=3)
    close(carried.norms(), 8 * g.norms())


def test_norms_are_differentiable_zero_gradients_included():
    params, X, Y = batch()

    def penalty(module_norms):
        return lambda p: jnp.sum((module_norms(p) - 1) ** 2)

    by_factors = jax.grad(penalty(lambda p: closed_form.factored_grads(p, X, Y).norms()))(params)

    def materialized_norms(p):
        G = autodiff.batched_grad(p, X, Y)
        return jnp.sqrt(sum(jnp.sum(a.reshape(B, -1) ** 2, 1) for a in G))

    close(by_factors, jax.grad(penalty(materialized_norms))(params), 1e-10)

    def through(c):  # every gradient zero at c = 0
        return closed_form.factored_grads(params, X, Y).scale(jnp.full(B, c)).norms().sum()

    assert np.isfinite(jax.grad(through)(0.0))
    assert closed_form.factored_grads(params, X, Y).where(jnp.zeros(B, bool)).norms().tolist() == [0.0] * B
    leaves = jax.grad(lambda c: sum(n.sum() for n in closed_form.factored_grads(params, X, Y).scale(c).leaf_norms()))
    assert np.isfinite(leaves(jnp.zeros(B))).all()


def test_clip_bounds_the_norm_and_keeps_shorter_gradients(g):
    norms = g.norms()
    bound = float(jnp.median(norms))
    clipped = g.clip(bound)
    np.testing.assert_allclose(clipped.norms(), np.minimum(norms, bound), rtol=1e-12)
    inside = np.asarray(norms) <= bound
    np.testing.assert_array_equal(flat(clipped.materialize())[inside], flat(g.materialize())[inside])
    np.testing.assert_allclose(jax.jit(lambda g, c: g.clip(c).norms())(g, bound), np.minimum(norms, bound), rtol=1e-12)


def test_clip_is_exact_on_the_boundary_and_at_zero():
    value = jnp.array([[3.0, 4.0], [0.0, 0.0], [30.0, 40.0]], jnp.float32)
    g = PerExampleGrads({"v": (Dense.of(value, jnp.float32),)})
    np.testing.assert_array_equal(g.clip(5.0).materialize()["v"], [[3, 4], [0, 0], [3, 4]])


def test_clip_by_leaf_and_by_group():
    f = lambda seed: (Dense.of(jax.random.normal(jax.random.key(seed), (4, 3)), jnp.float64),)  # noqa: E731
    g = PerExampleGrads({"a": {"x": f(0), "y": f(1)}, "b": f(2)})
    clipped = g.clip({"a": 0.5, "b": 0.1})
    leaf = clipped.leaf_norms()
    np.testing.assert_allclose(np.hypot(leaf["a"]["x"], leaf["a"]["y"]), 0.5)
    np.testing.assert_allclose(leaf["b"], 0.1)
    by_leaf = g.clip({"a": {"x": 0.1, "y": 0.2}, "b": 0.3}).leaf_norms()
    close(
        jax.tree.map(lambda n: n, by_leaf), {"a": {"x": jnp.full(4, 0.1), "y": jnp.full(4, 0.2)}, "b": jnp.full(4, 0.3)}
    )


@pytest.mark.usefixtures("plain_types")
def test_what_is_held_is_shown(g):
    assert g.batch_size == len(g) == B
    assert g.nbytes == 8 * B * (H + D + H + H)
    assert g.materialized_nbytes == 8 * B * (H * D + H + H)
    assert repr(g).splitlines() == [
        f"PerExampleGrads({B} examples, {g.nbytes} bytes held, {g.materialized_nbytes} if materialized)",
        f"  .W float64[{H}, {D}]: Outer(float64[{B}, {H}], float64[{B}, {D}])",
        f"  .b float64[{H}]: Dense(float64[{B}, {H}])",
        f"  .w float64[{H}]: Dense(float64[{B}, {H}])",
    ]
    assert isinstance(g.factors, Params)
    assert repr(jax.tree.map(lambda a: None, g))


@pytest.mark.every(0)
def test_an_embedding_tied_to_the_output_layer():
    """Rows + Outer on one parameter: the cross term counts."""

    def tied_loss(E, ids, target):
        h = E[ids].mean(0)
        return -jax.nn.log_softmax(E @ h)[target]

    E = jax.random.normal(jax.random.key(0), (7, 3), jnp.float64)
    ids = jax.random.randint(jax.random.key(1), (4, 5), 0, 7)
    targets = jnp.array([0, 3, 3, 6])
    G = jax.vmap(jax.grad(tied_loss), (None, 0, 0))(E, ids, targets)

    def parts(ids, target):
        h = E[ids].mean(0)
        delta = jax.nn.softmax(E @ h) - jax.nn.one_hot(target, 7, dtype=E.dtype)
        return delta, h, jnp.tile((E.T @ delta)[None] / 5, (5, 1))

    delta, h, rows = jax.vmap(parts)(ids, targets)
    g = PerExampleGrads((Outer.of_matrix(delta, h, E.dtype), Rows.of_table(ids, rows, 7, E.dtype)))
    close(g.materialize(), G)
    close(g.norms(), np.linalg.norm(flat(G), axis=1))
    close(g.gram(), flat(G) @ flat(G).T)


@pytest.mark.every(2)
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_sharded_factors_give_the_same_numbers(kind, g):
    mesh = jax.make_mesh((len(jax.devices()),), ("batch",), axis_types=(jax.sharding.AxisType[kind],))
    n = B - B % len(jax.devices())
    with jax.set_mesh(mesh):
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
        sharded = jax.device_put(g[:n], sharding)
        for of in (
            lambda g: g.norms(),
            lambda g: g.clip(0.3).sum(),
            lambda g: g.gram(),
            lambda g: g.second_moment(),
            lambda g: g.variance(),
            lambda g: g.mean(),
        ):
            found = jax.tree.map(np.asarray, jax.jit(of)(sharded))
            close(found, of(g[:n]))


# --- The compiled program --------------------------------------------------------------------------------------


OPERATIONS = {
    "norms": lambda g, params: g.norms(),
    "squared_norms": lambda g, params: g.squared_norms(),
    "leaf_norms": lambda g, params: g.leaf_norms(),
    "dot": lambda g, params: g.dot(params),
    "weighted_sum": lambda g, params: g.weighted_sum(g.norms()),
    "sum": lambda g, params: g.sum(),
    "mean": lambda g, params: g.mean(),
    "gram": lambda g, params: g.gram(),
    "second_moment": lambda g, params: g.second_moment(),
    "variance": lambda g, params: g.variance(),
    "scale": lambda g, params: g.scale(g.norms()),
    "clip": lambda g, params: g.clip(1.0).sum(),
    "where": lambda g, params: g.where(g.norms() > 0).sum(),
    "indexing": lambda g, params: g[1:].sum(),
    "concatenate": lambda g, params: PerExampleGrads.concatenate([g, g]).sum(),
}


def largest_array(function, *arguments):
    text = jax.jit(function).lower(*arguments).compile().as_text()
    shapes = re.findall(r"f32\[([\d,]*)\]", text)
    return max(int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes)


@pytest.mark.every(7)
@pytest.mark.parametrize("name", OPERATIONS)
def test_no_array_of_batch_times_parameters_is_in_the_compiled_program(name):
    params, X, Y = batch(jnp.float32, B=29, H=31, D=37)

    def program(params, X, Y):
        return OPERATIONS[name](closed_form.factored_grads(params, X, Y), params)

    assert largest_array(program, params, X, Y) <= 2 * 31 * 37 + 2 * 29 * 37
    assert largest_array(lambda *a: closed_form.factored_grads(*a).materialize(), params, X, Y) == 29 * 31 * 37


# --- Errors ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("plain_types")
def test_bad_input_is_named(g):
    matrix = (Dense.of(jnp.ones((2, 3)), jnp.float64),)
    other = PerExampleGrads({"W": matrix})
    cases = [
        (
            lambda: PerExampleGrads({"W": jnp.ones(3)}),
            TypeError,
            r"expected a tree of tuples of factors, got something",
        ),
        (lambda: PerExampleGrads({}), TypeError, "got none"),
        (
            lambda: PerExampleGrads([matrix, (Dense.of(jnp.ones((4, 3)), jnp.float64),)]),
            ValueError,
            r"expected one number of examples in every factor, got \[2, 4\]",
        ),
        (
            lambda: PerExampleGrads((matrix[0], Dense.of(jnp.ones((2, 4)), jnp.float64))),
            ValueError,
            "expected factors of one parameter",
        ),
        (lambda: g.gram(other), ValueError, "gram: expected the same tree of parameters"),
        (lambda: g.gram(3), TypeError, "gram: expected PerExampleGrads, .* got int"),
        (
            lambda: other.gram(PerExampleGrads({"W": (Dense.of(jnp.ones((2, 4)), jnp.float64),)})),
            ValueError,
            r"gram: expected float64\[3\] at \['W'\], got float64\[4\]",
        ),
        (
            lambda: other.gram(PerExampleGrads({"W": (Dense.of(jnp.ones((2, 3)), jnp.float32),)})),
            ValueError,
            r"got float32\[3\]",
        ),
        (lambda: g.dot({"W": 1}), ValueError, "dot: expected a tree like the parameters'"),
        (lambda: other.dot({"W": jnp.ones(4)}), ValueError, r"dot: expected shape \(3,\) at \['W'\], got \(4,\)"),
        (
            lambda: g.weighted_sum(jnp.ones(B + 1)),
            ValueError,
            r"weighted_sum: expected one floating number per example",
        ),
        (lambda: g.scale(jnp.ones(B, int)), ValueError, "scale: expected one floating number per example"),
        (lambda: g.where(jnp.ones(B)), ValueError, "where: expected a boolean mask"),
        (lambda: g.clip(-1.0), ValueError, "clip: expected positive numbers as bounds, got -1.0"),
        (lambda: g.clip([1.0, 2.0]), ValueError, "clip: expected a number or a tree prefix"),
        (lambda: g[3], TypeError, r"For one example take g\[i : i \+ 1\]"),
        (lambda: g[jnp.ones(B)], TypeError, "expected a slice or a one-dimensional array"),
        (lambda: PerExampleGrads.concatenate([]), ValueError, "concatenate: expected at least one batch"),
        (lambda: PerExampleGrads.concatenate([g, other]), ValueError, "concatenate: expected the same tree"),
        (
            lambda: PerExampleGrads.concatenate(
                [
                    other,
                    PerExampleGrads({"W": (Outer.of("t,tk->k", jnp.ones((1, 2)), jnp.ones((1, 2, 3)), jnp.float64),)}),
                ]
            ),
            ValueError,
            "concatenate: expected the same factors",
        ),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()


# --- debug_nans and debug_infs ----------------------------------------------------------------------------------------


EVERY_OPERATION = {
    "norms": lambda g: g.norms(),
    "squared_norms": lambda g: g.squared_norms(),
    "leaf_norms": lambda g: g.leaf_norms(),
    "magnitudes": lambda g: g.magnitudes(),
    "dot": lambda g: g.dot(jax.tree.map(jnp.ones_like, g.sum())),
    "weighted_sum": lambda g: g.weighted_sum(g.norms()),
    "sum": lambda g: g.sum(),
    "mean": lambda g: g.mean(),
    "gram": lambda g: g.gram(),
    "second_moment": lambda g: g.second_moment(),
    "variance": lambda g: g.variance(),
    "scale": lambda g: g.scale(g.norms()).factors,
    "clip": lambda g: g.clip(30.0).factors,
    "clip nothing": lambda g: g.clip(jnp.inf).sum(),
    "clip by leaf": lambda g: g.clip(jax.tree.map(lambda a: 0.1, g.sum())).norms(),
    "where": lambda g: g.where(g.norms() > 0).factors,
    "nothing": lambda g: g.where(jnp.zeros(g.batch_size, bool)).clip(30.0).norms(),
    "indexing": lambda g: g[jnp.arange(2)].factors,
    "concatenate": lambda g: PerExampleGrads.concatenate([g, g]).norms(),
    "materialize": lambda g: g.materialize(),
    "slope of norms": lambda g: jax.grad(lambda c: g.scale(c).norms().sum())(jnp.zeros(g.batch_size)),
    "noise_scale": lambda g: jg.attribution.noise_scale(g[jnp.array([0, 2, 3])]),
}


def healthy():
    """A zero gradient beside others, in factors of every kind; a parameter that is not used."""
    zero = lambda a: jnp.asarray(a).at[1].set(0)  # noqa: E731
    normal = lambda seed, *shape: zero(jax.random.normal(jax.random.key(seed), shape))  # noqa: E731
    conv = lambda kernel, x: jnp.sin(jax.lax.conv(x[None], kernel, (1, 1), "VALID")).sum()  # noqa: E731
    windows = jg.per_example_grad(conv)(jnp.ones((64, 32, 3, 3)), normal(8, 4, 32, 6, 6)).factors
    ids = jnp.array([[0, 2, 2], [1, 1, 1], [4, 0, 9], [-1, 3, 3]])
    outer = lambda left, right: Outer.of("tf,tk->fk", left, right, jnp.float64)  # noqa: E731
    return PerExampleGrads(
        {
            "one": (Outer.of_matrix(normal(0, 4, 3), normal(1, 4, 2), jnp.float64),),
            "positions": (outer(normal(2, 4, 3, 4), normal(3, 4, 3, 5)),),
            "rows": (Rows.of_table(ids, normal(4, 4, 3, 5), 5, jnp.float64),),
            "tied": (
                Rows.of_table(ids, normal(5, 4, 3, 5), 4, jnp.float64),
                outer(normal(6, 4, 3, 4), normal(7, 4, 3, 5)),
            ),
            "vector": (Dense.of(normal(9, 4, 3), jnp.float64),),
            "windows": windows,
            "unused": (outer(jnp.zeros((4, 0, 4)), jnp.zeros((4, 0, 5))),),
        }
    )


@pytest.mark.every(49)
@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize("name", EVERY_OPERATION)
def test_intermediate_results_are_finite(name, jit):
    g = healthy()
    found = (jax.jit(EVERY_OPERATION[name]) if jit else EVERY_OPERATION[name])(g)
    with jax.debug_nans(True), jax.debug_infs(name != "clip nothing"):  # its bound is infinite
        close((jax.jit(EVERY_OPERATION[name]) if jit else EVERY_OPERATION[name])(g), found)


@pytest.mark.every(13)
@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize("weighting", ["clip", "normalize", jg.clipping.automatic(0.1)])
@pytest.mark.parametrize("microbatch_size", [None, 2])
def test_intermediate_results_of_a_clipped_sum_are_finite(jit, weighting, microbatch_size):
    params, X, Y = batch(jnp.float32)
    gradient = jg.clipped_grad(
        lambda p, x, y: loss(p, x, y) * (x[0] != 0).astype(x.dtype),
        30.0,
        weighting=weighting,
        microbatch_size=microbatch_size,
    )
    if jit:
        gradient = jax.jit(gradient)
    X, mask = X.at[2].set(0), jnp.arange(B) > 0
    with jax.debug_nans(True), jax.debug_infs(True):
        total, info = gradient(params, X, Y, mask=mask)
        assert float(info.norms[2]) == float(info.norms[0]) == 0
        assert jnp.isfinite(total.W).all()


# --- One weight in many slices ---------------------------------------------------------------------------------


SLICED = {  # loss of (W, x), the shape of W, and how many factors there are
    "experts": (lambda W, x: [W[e] @ x[:4] for e in range(6)], (6, 5, 4), 1),
    "experts of two axes": (lambda W, x: [W[i, j] @ x[:4] for i in range(4) for j in range(4)], (4, 4, 5, 4), 1),
    "experts used twice": (lambda W, x: [W[e] @ (i + 1.0) ** x[:4] for e in range(5) for i in range(2)], (5, 5, 4), 2),
    "blocks of rows": (lambda W, x: [W[3 * e : 3 * e + 3] @ x[:4] for e in range(5)], (15, 4), 1),
    "blocks of columns": (lambda W, x: [W[:, 2 * e : 2 * e + 2] @ x[:2] for e in range(5)], (7, 10), 1),
    "last axis": (lambda W, x: [W[..., e] @ x[:6] for e in range(5)], (7, 6, 5), 1),
    "interleaved": (lambda W, x: [W[e::5] @ x[:4] for e in range(5)], (15, 4), 1),
    "with gaps": (lambda W, x: [W[e] @ x[:4] for e in (0, 2, 4, 6, 7, 8, 9, 10)], (11, 5, 4), 2),
    "blocks with gaps": (lambda W, x: [W[5 * e : 5 * e + 4] @ x[:4] for e in range(5)], (25, 4), 1),
    "other sizes": (
        lambda W, x: [W[e * (e + 1) : (e + 1) * (e + 2)] @ x[:4] for e in range(1, 5)],
        (30, 4),
        4,
    ),
    "overlapping": (lambda W, x: [W[e : e + 16] @ x[:20] for e in range(5)], (20, 20), 5),
    "convolutions": (
        lambda W, x: [jax.lax.conv(x[None, :60].reshape(1, 1, 12, 5), W[e], (1, 1), "VALID") for e in range(3)],
        (3, 40, 1, 3, 3),
        None,
    ),
}


@pytest.mark.every(13)
@pytest.mark.parametrize("name", SLICED)
def test_a_weight_used_in_slices_has_one_factor_where_they_lie_side_by_side(name):
    parts, shape, count = SLICED[name]
    W = jax.random.normal(jax.random.key(0), shape)
    X = jax.random.normal(jax.random.key(1), (3, 60))
    loss = lambda W, x: sum(jnp.tanh(part).sum() for part in parts(W, x))  # noqa: E731
    G = jax.vmap(jax.grad(loss), (None, 0))(W, X)
    g = jg.per_example_grad(loss)(W, X)
    if count is not None:
        assert len(g.factors) == count
    close(g.materialize(), G)
    close(g.norms(), np.linalg.norm(flat(G), axis=1))
    close(g.gram(), flat(G) @ flat(G).T)
    close(g.sum(), G.sum(0))
    close(g.dot(W), flat(G) @ W.ravel())
    close(g.variance(), G.var(0))


@pytest.mark.every(5)
@pytest.mark.parametrize("verb", [lambda g: g.norms(), lambda g: g.gram(), lambda g: g.sum(), lambda g: g.variance()])
@pytest.mark.parametrize("regular", [True, False])
def test_the_number_of_equations_is_linear_in_the_slices(verb, regular):
    def equations(n):
        start = [8 * e if regular else 8 * e + e % 2 for e in range(n)]  # slices that do not join into one box
        loss = lambda W, x: sum(jnp.tanh(W[s : s + 6 + 2 * regular] @ x).sum() for s in start)  # noqa: E731
        g = jax.eval_shape(jg.per_example_grad(loss), jnp.ones((n * 8, 6)), jnp.ones((4, 6)))
        return len(jax.make_jaxpr(verb)(g).eqns)

    assert equations(32) <= (1.1 if regular else 2.2) * equations(16)


def test_an_empty_index_selects_no_examples():
    g = jg.per_example_grad(lambda W, x: jnp.tanh(W @ x).sum())(jnp.ones((5, 4)), jnp.ones((3, 4)))
    for index in ([], np.array([], int), slice(0, 0)):
        empty = g[index]
        assert empty.batch_size == 0
        assert empty.norms().shape == (0,)
        assert not empty.sum().any()


def test_gradients_of_several_models_say_where_their_methods_are_to_be_called():
    gradients = jax.vmap(jg.per_example_grad(lambda W, x: jnp.tanh(W @ x).sum()), (0, None))
    g = gradients(jnp.ones((2, 5, 4)), jnp.ones((3, 4)))
    assert "PerExampleGrads" in repr(g)
    for verb in (lambda g: g.norms(), lambda g: g.sum(), lambda g: g.clip(1.0), lambda g: g.gram(), lambda g: g[:1]):
        with pytest.raises(ValueError, match="call its methods inside the vmap"):
            verb(g)
    assert jax.vmap(lambda g: g.norms())(g).shape == (2, 3)


def test_products_written_with_an_operator():
    params, X, Y = batch()
    g, c = closed_form.factored_grads(params, X, Y), jnp.arange(float(len(X)))
    G, v = jax.tree.map(lambda a: a.reshape(len(X), -1), g.materialize()), jax.tree.map(lambda p: p + 1, params)
    flat = np.concatenate(jax.tree.leaves(G), 1)
    np.testing.assert_allclose(g @ v, flat @ np.concatenate([a.ravel() for a in jax.tree.leaves(v)]), rtol=1e-10)
    np.testing.assert_allclose(g @ g[:3].T, flat @ flat[:3].T, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose((g.T @ c).W.ravel(), c @ G.W, rtol=1e-10)


def test_sums_have_the_requested_dtype():
    g = closed_form.factored_grads(*batch(jnp.bfloat16))
    c = jnp.ones(g.batch_size)
    for function in (g.sum, g.mean, lambda dtype=None: g.weighted_sum(c, dtype)):
        assert function().W.dtype == jnp.bfloat16
        wide = function(jnp.float32)
        assert wide.W.dtype == jnp.float32
        assert not np.array_equal(wide.W, np.float32(function().W))  # digits that rounding drops
        np.testing.assert_array_equal(wide.W.astype(jnp.bfloat16), function().W)


def test_a_weighted_sum_on_an_explicit_mesh_outside_jit():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    rng = np.random.default_rng(0)
    W, X, c = (jnp.asarray(rng.normal(size=shape)) for shape in ((3, 4), (64, 4), (64,)))
    loss = lambda W, x: jnp.tanh(W @ x).sum()  # noqa: E731
    expected = c @ jax.vmap(jax.grad(loss), (None, 0))(W, X).reshape(64, -1)
    with jax.set_mesh(mesh):
        g = jg.per_example_grad(loss)(W, jax.device_put(X, spec))
        found = g.weighted_sum(jax.device_put(c, spec))
    np.testing.assert_allclose(np.ravel(found), expected, rtol=1e-10)


@pytest.mark.parametrize("kind", ["Outer", "Rows", "Mapped", "two factors"])
def test_the_norm_of_products_that_cancel_is_not_nan(kind):
    """Rounding can make ‖Σ_t left_t ⊗ right_t‖², as it is computed from inner products, negative."""
    rng, B = np.random.default_rng(0), 300
    nearly_one = 1 + 1e-9 * rng.normal(size=(B, 1))
    u, v = rng.normal(size=(B, 7)), rng.normal(size=(B, 5))
    u, v = (jnp.asarray(np.stack(pair, 1)) for pair in ((u, -u * nearly_one), (v, v)))
    outer = Outer.of("tf,tk->fk", u, v, u.dtype)
    halves = [Outer.of("tf,tk->fk", u[:, k : k + 1], v[:, k : k + 1], u.dtype) for k in range(2)]
    factors = {
        "Outer": (outer,),
        "Rows": (Rows.of_table(jnp.full((B, 2), 3), u, 6, u.dtype),),
        "Mapped": jg.per_example_grad(lambda W, u, v: ((jnp.cumsum(W, 0) @ v.T) * u.T).sum())(
            jnp.ones((7, 5)), u, v
        ).factors,
        "two factors": tuple(halves),
    }[kind]
    g = PerExampleGrads(factors)
    expected = np.linalg.norm(np.asarray(g.materialize()).reshape(B, -1), axis=1)
    assert 0 < expected.min() < expected.max() < 1e-6
    norms, squares = jax.jit(lambda g: (g.norms(), g.squared_norms()))(g)
    np.testing.assert_allclose(norms, expected, atol=1e-6)
    np.testing.assert_allclose(squares, expected**2, atol=1e-12)
    assert (squares >= 0).all()
    slopes = jax.jit(jax.grad(lambda c: g.scale(c).norms().sum()))(jnp.ones(B))
    assert np.isfinite(slopes).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gram_matrices_of_tiny_gradients_with_huge_weights(dtype):
    """The weight is a power of two for each side, so that neither side's inner products overflow or underflow."""
    rng = np.random.default_rng(0)
    u, v, c = rng.normal(size=(6, 1, 7)), rng.normal(size=(6, 1, 5)), 2.0 ** rng.integers(78, 84, 6)
    for a, b in ((1e-25, 1.0), (1.0, 1e-25)):
        left, right = jnp.asarray(a * u, dtype), jnp.asarray(b * v, dtype)
        g = PerExampleGrads((Outer.of("tf,tk->fk", left, right, jnp.float32),)).scale(jnp.asarray(c, jnp.float32))
        gradients = np.einsum("btf,btk,b->bfk", np.float64(left), np.float64(right), c).reshape(6, -1)
        np.testing.assert_allclose(g.gram(), gradients @ gradients.T, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(g.squared_norms(), (gradients**2).sum(1), rtol=1e-5)
        np.testing.assert_allclose(g.norms(), np.linalg.norm(gradients, axis=1), rtol=1e-5)
