"""Attribution: each quantity against its dense definition in float64; and blocks, which change only the memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.dense import (
    LOSSES,
    MODELS,
    Model,
    assert_close,
    each_loss,
    each_model,
    exercise,
    gradients,
    gradients_with_rows,
    jacobian,
    matrix,
    reordered,
    solved,
)
from support.quick import quick_jit
from support.two_layers import assert_held, root_of_squares
from support.two_layers import solved as solved_from

import jaxgrad as jg
from jaxgrad import attribution, curvature, network, streams
from jaxgrad.streams import Batches

# --- Scores and similarities -----------------------------------------------------------------------------------------


@pytest.mark.every(7)
@each_loss
def test_self_influence_is_the_squared_norm_or_the_leverage(entry):
    g, G = gradients(entry.name)
    mu = 0.1 * np.linalg.norm(G, 2) ** 2 / len(G)
    found = quick_jit(attribution.self_influence)
    assert_close(found(g), (G**2).sum(1))
    assert_close(found(g, mu), np.einsum("bp,pb->b", G, solved(G, G.T, mu)))
    assert_close(found(g, 0.0), len(G) * np.diag(G @ np.linalg.pinv(G)), 1e-8)


@pytest.mark.every(7)
@each_loss
def test_influence_matches_its_dense_definition(entry):
    (g, G), (test, T) = gradients(entry.name), gradients(entry.name, True)
    mu = 0.1 * np.linalg.norm(G, 2) ** 2 / len(G)
    found = quick_jit(attribution.influence)
    assert_close(found(g, test, mu), T @ solved(G, G.T, mu) / len(G))
    assert_close(found(g, test, 0.0), T @ np.linalg.pinv(G), 1e-8)


def test_influence_predicts_what_leaving_an_example_out_does_to_a_quadratic_loss():
    """Ridge regression: the Gauss-Newton matrix is the Hessian, and one Newton step is exact up to the leverage."""
    rng = np.random.default_rng(0)
    X, y, mu = rng.normal(size=(200, 3)), rng.normal(size=200), 0.05

    def fit(keep):
        return np.linalg.solve(X[keep].T @ X[keep] / 200 + mu * np.eye(3), X[keep].T @ y[keep] / 200)

    model, everything = lambda w, x: w @ x, np.arange(200)
    w = fit(everything)
    T, t = rng.normal(size=(4, 3)), rng.normal(size=4)
    test = jg.per_example_grad(lambda w, x, y: (w @ x - y) ** 2 / 2)(w, T, t)
    train = curvature.gauss_newton(model, curvature.squared)(w, X, y)
    found = np.asarray(attribution.influence(train, test, mu))
    for b in (0, 17):
        without = fit(np.delete(everything, b))
        true = (T @ without - t) ** 2 / 2 - (T @ w - t) ** 2 / 2
        np.testing.assert_allclose(found[:, b], true, rtol=0.2, atol=1e-5)


@pytest.mark.every(5)
@each_model
def test_influence_through_gauss_newton_matches_its_dense_definition(name):
    model, y = MODELS[name], np.array([0, 3, 1, 1, 2])
    train = quick_jit(curvature.gauss_newton(model.model, curvature.softmax))(model.params, model.x, y)
    loss = lambda p, x, y: curvature.softmax.value(model.model(p, x), y)  # noqa: E731
    G = matrix(quick_jit(jax.vmap(jax.grad(loss), (None, 0, 0)))(model.params, model.x, y))
    outputs = quick_jit(jax.vmap(model.model, (None, 0)))(model.params, model.x)
    p = np.asarray(jax.nn.softmax(outputs))
    H = np.eye(4) * p[:, :, None] - p[:, :, None] * p[:, None, :]
    J, mu = jacobian(model), 0.1
    inverse = np.linalg.inv(np.einsum("bop,boq,bqr->pr", J, H, J) / 5 + mu * np.eye(G.shape[1]))
    test = quick_jit(jg.per_example_grad(loss))(model.params, model.x[:3], y[1:4])
    T = matrix(quick_jit(lambda g: g.materialize())(test))
    own = quick_jit(attribution.self_influence)
    assert_close(quick_jit(attribution.influence)(train, test, mu), T @ inverse @ G.T / 5)
    assert_close(own(train, mu), np.einsum("bp,pq,bq->b", G, inverse, G))
    with pytest.raises(ValueError, match="self_influence: expected a damping ≥ 0, got None"):
        attribution.self_influence(train)


def test_influence_by_conjugate_gradients_is_that_of_the_dense_hessian_and_gauss_newton_matrix():
    model, y = MODELS["mlp"], np.array([0, 3, 1, 1, 2])
    loss = lambda p, x, y: curvature.softmax.value(model.model(p, x), y)  # noqa: E731
    g = quick_jit(jg.per_example_grad(loss))(model.params, model.x, y)
    G = matrix(g.materialize())
    vector, unravel = jax.flatten_util.ravel_pytree(model.params)
    mean = lambda v: jax.vmap(loss, (None, 0, 0))(unravel(v), model.x, y).mean()  # noqa: E731
    hessian = np.asarray(quick_jit(jax.hessian(mean))(vector))
    rows = matrix(curvature.gauss_newton(model.model, curvature.softmax)(model.params, model.x, y).rows.materialize())
    products = {
        "hessian": (curvature.hessian_vector_product(loss), hessian),
        "gauss_newton": (
            curvature.gauss_newton_vector_product(model.model, curvature.softmax),
            rows.T @ rows / len(rows),
        ),
    }
    mu = 0.1 + max(0.0, -np.linalg.eigvalsh(hessian)[0])
    for product, H in products.values():

        @quick_jit
        def run(g, damping, product=product):
            through = lambda v: product(model.params, v, model.x, y)  # noqa: E731
            return attribution.influence_by_cg(through, g, g[1:4], damping, tolerance=1e-12, max_steps=300)

        for damping in (mu, curvature.relative(mu / (G**2).sum(1).mean())):
            found = run(g, damping)
            assert_close(found.scores, G[1:4] @ np.linalg.inv(H + mu * np.eye(len(H))) @ G.T / 5, 1e-8)
            assert np.all(np.asarray(found.residuals) < 1e-11)


@pytest.mark.every(0)
def test_a_solve_by_conjugate_gradients_that_fails_says_so():
    g = gradients_with_rows(np.random.default_rng(0).normal(size=(4, 6)))
    few = attribution.influence_by_cg(lambda v: v * jnp.arange(1.0, 7.0), g, g, 0.0, max_steps=2)
    assert np.all(np.asarray(few.residuals) > 1e-4)
    zero = attribution.influence_by_cg(lambda v: v, g, gradients_with_rows(np.zeros((1, 6))), 0.0)
    assert_close(zero.scores, np.zeros((1, 4)))
    assert_close(zero.residuals, [0.0])
    for size in (1e-25, 1e25):
        huge = gradients_with_rows(np.full((1, 6), size), jnp.float32)
        found = attribution.influence_by_cg(lambda v: 2 * v, huge * (1 / size), huge, 0.0)
        assert_close(found.scores, [[3 * size]], 1e-5)


def test_influence_is_accurate_for_gradients_of_very_different_norms():
    """Small eigenvalues that belong to well-fitted examples, with small gradients, are still accurate.

    Inner products are off by u ‖g_b‖ ‖g_c‖. The effect on the solution depends on the condition number of the matrix
    scaled to a unit diagonal, about 10 here, and not on that of the matrix itself, 10⁹; see `solved`.
    """
    G = np.random.default_rng(0).normal(size=(12, 30)) * np.logspace(-4, 0, 12)[:, None]
    squares, u = (G**2).sum(1), 2.0**-24
    for ratio in (1e-3, 1e-5, 1e-7, 1e-9):
        mu = ratio * np.linalg.norm(G, 2) ** 2 / 12
        g, ridge, K = gradients_with_rows(G, jnp.float32), float(np.float32(mu)) * 12, G @ G.T
        W, sizes = solved_from(K, squares, ridge, K, np.sqrt(np.outer(squares, squares)))
        w, sizes_ = solved_from(K, squares, ridge, np.ones(12), 0.0)
        rounding, root = 3 * 30**0.5 * u, np.sqrt(squares + ridge)
        assert_held(attribution.influence(g, g, mu), W.T, sizes.T, rounding)
        assert_held(attribution.self_influence(g, mu), 12 * np.diag(W), 12 * np.diag(sizes), rounding)
        magnitude = root_of_squares(w, G) + root_of_squares(sizes_, G)
        assert_held(jg.curvature.natural_gradient(g, mu), G.T @ w, magnitude, rounding)
        assert np.all(50 * root[:, None] / root[None, :] > sizes.T)
        assert np.all(magnitude < 50 * np.abs(G.T @ w).max())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("gap", [30.0, 100.0, 400.0, 3000.0])
def test_the_worst_labeled_example_is_not_lost(gap, dtype):
    logits, labels = np.eye(3, dtype=dtype) * dtype(gap), np.array([1, 1, 2])  # the first is wrong by the gap
    x = np.eye(3, dtype=dtype)
    train = curvature.gauss_newton(lambda W, x: W @ x, curvature.softmax)(jnp.asarray(logits), x, labels)
    found = np.asarray(attribution.self_influence(train, 0.1))
    assert found[0] == pytest.approx(20, 1e-3)  # ‖e₀ - e₁‖²/μ, because the curvature is 0 there
    margins = curvature.gauss_newton(lambda w, x: w @ x, curvature.logistic)
    train = margins(jnp.asarray([gap, gap], dtype), np.eye(2, dtype=dtype), np.array([-1.0, 1.0], dtype))
    found = np.asarray(attribution.self_influence(train, 0.1))
    np.testing.assert_allclose(found, [10, 0], 1e-3, atol=1e-6)


@pytest.mark.every(7)
@each_loss
def test_cosines_and_noise_match_their_dense_definitions(entry):
    (g, G), (other, T) = gradients(entry.name), gradients(entry.name, True)
    unit, unit_ = (A / np.linalg.norm(A, axis=1, keepdims=True) for A in (G, T))
    own, cross, (noise, signal, scale) = quick_jit(
        lambda g, other: (
            attribution.cosine_similarity(g),
            attribution.cosine_similarity(g, other),
            attribution.noise_scale(g),
        )
    )(g, other)
    assert_close(own, unit @ unit.T)
    assert_close(cross, unit @ unit_.T)
    trace = G.var(0, ddof=1).sum()
    squared = (G.mean(0) ** 2).sum() - trace / len(G)
    largest = (G**2).sum(1).max()
    assert abs(noise - trace) < 1e-12 * largest
    assert abs(signal - squared) < 1e-12 * largest
    assert scale == (np.inf if squared <= 0 else pytest.approx(trace / squared, 1e-9))


def test_cosines_of_zero_huge_and_tiny_gradients_are_right():
    half = np.sqrt(0.5)
    for huge in (1e30, 1e38, 2e38):
        rows = np.array([[1, 0], [0, 0], [huge, huge], [1e-30, 0]])
        found = attribution.cosine_similarity(gradients_with_rows(rows, jnp.float32))
        assert_close(found, [[1, 0, half, 1], [0, 0, 0, 0], [half, 0, 1, half], [1, 0, half, 1]], 1e-6)


@pytest.mark.every(0)
def test_the_noise_of_equal_gradients_is_zero_and_of_a_single_one_unknown():
    noise, signal, scale = attribution.noise_scale(gradients_with_rows(np.full((7, 3), 0.1), jnp.float32))
    assert 0 <= noise <= 7 * 2.0**-23 * signal
    assert signal == pytest.approx(0.03, 1e-5)
    assert scale < 1e-6
    assert np.isnan(attribution.noise_scale(gradients_with_rows(np.ones((1, 3))))).all()
    assert np.isnan(attribution.noise_scale(gradients_with_rows([[1.0, np.nan], [1.0, 2.0]]))).all()


@pytest.mark.parametrize("B", [46_341, 100_000])
def test_the_noise_scale_of_a_batch_whose_squared_size_exceeds_int32(B):
    G = np.random.default_rng(0).normal(size=(B, 2)).astype(np.float32) + np.float32(0.5)
    with jax.enable_x64(False):
        found = jax.jit(lambda G: attribution.noise_scale(gradients_with_rows(G, jnp.float32)))(G)
    noise = G.var(0, ddof=1, dtype=np.float64).sum()
    signal = (G.mean(0, dtype=np.float64) ** 2).sum() - noise / B
    np.testing.assert_allclose(found, (noise, signal, noise / signal), rtol=B**0.5 * 2.0**-22)


def test_the_noise_scale_has_no_bias():
    rng = np.random.default_rng(0)
    mean = np.array([1.0, -2.0, 0.5])
    batches = jnp.asarray(mean + 2 * rng.normal(size=(4000, 4, 3)))
    noise, signal = (
        a.mean() for a in quick_jit(jax.vmap(lambda G: attribution.noise_scale(gradients_with_rows(G))[:2]))(batches)
    )
    assert noise == pytest.approx(12, rel=0.05)
    assert signal == pytest.approx(5.25, rel=0.1)


@pytest.mark.every(3)
@pytest.mark.parametrize("name", ["exercise", "tied_to_the_output_layer", "conv_1d"])
def test_random_projections_are_linear_and_keep_inner_products(name):
    g, G = gradients(name)
    project = quick_jit(attribution.random_projection, static_argnums=2)
    key = jax.random.key(0)
    projected = project(g, key, 1000)
    lengths = np.linalg.norm(G, axis=1)
    error = np.abs(projected @ projected.T - G @ G.T) / np.outer(lengths, lengths)
    assert error.max() < 5 * np.sqrt(2 / 1000)
    c = jnp.linspace(-1, 1, len(G))
    total = project(batch_of_one(g.weighted_sum(c)), key, 1000)
    assert_close(total[0], c @ np.asarray(projected))
    assert_close(project(g, key, 7) * 7**0.5, projected[:, :7] * 1000**0.5)


def batch_of_one(tree):
    """One gradient as a batch of size 1, materialized."""
    return jg.PerExampleGrads(jax.tree.map(lambda a: (jg.per_example.Dense.of(a[None], a.dtype),), tree))


# --- Checkpoints -----------------------------------------------------------------------------------------------------


def test_grand_and_tracin_are_sums_over_checkpoints():
    params, X, Y = exercise()
    checkpoints = [jax.tree.map(lambda a, k=k: a * (1 + k), params) for k in range(3)]
    rates = [0.1, 0.2, 0.3]
    G = [matrix(network.autodiff.batched_grad(p, X, Y)) for p in checkpoints]
    assert_close(attribution.grand(network.loss)(checkpoints, X, Y), np.mean([np.linalg.norm(A, axis=1) for A in G], 0))
    found = attribution.tracin(network.loss)(iter(checkpoints), rates, (X, Y), (X[:2], Y[:2]))
    assert_close(found, sum(rate * A[:2] @ A.T for rate, A in zip(rates, G, strict=True)))
    with pytest.raises(ValueError, match="grand: expected at least one checkpoint"):
        attribution.grand(network.loss)([], X, Y)
    with pytest.raises(ValueError, match="tracin: expected as many rates as checkpoints"):
        attribution.tracin(network.loss)(checkpoints, rates[:2], (X, Y), (X, Y))


@pytest.mark.parametrize("damping", [0.3, curvature.relative(0.05)])
def test_trak_is_the_kernel_regression_of_the_outputs_averaged_over_checkpoints(damping):
    params, X, Y = exercise()
    output = lambda p, x, y: y * network.margin(p, x)  # noqa: E731
    checkpoints = [jax.tree.map(lambda a, k=k: a * (1 + k / 4), params) for k in range(3)]
    solved_, learned = [], []
    for p in checkpoints:
        f, G = jax.vmap(output, (None, 0, 0))(p, X, Y), matrix(jax.vmap(jax.grad(output), (None, 0, 0))(p, X, Y))
        mu = damping if isinstance(damping, float) else damping.ratio * (G**2).sum(1).mean()
        solved_.append(G[:2] @ G.T @ np.linalg.inv(G @ G.T + mu * len(G) * np.eye(len(G))))
        learned.append(1 / (1 + np.exp(np.asarray(f))))
    found = attribution.trak(output, damping)(iter(checkpoints), (X, Y), (X[:2], Y[:2]))
    assert_close(found, np.mean(solved_, 0) * np.mean(learned, 0))
    squared = attribution.trak(output, damping, loss=lambda f: (f - 2) ** 2 / 2)(
        checkpoints[:1], (X, Y), (X[:2], Y[:2])
    )
    f = jax.vmap(output, (None, 0, 0))(params, X, Y)
    assert_close(squared, solved_[0] * (2 - np.asarray(f)))
    with pytest.raises(ValueError, match="trak: expected at least one checkpoint"):
        attribution.trak(output, damping)([], (X, Y), (X, Y))
    with pytest.raises(ValueError, match="trak: expected a damping ≥ 0, got -1"):
        attribution.trak(output, -1.0)
    assert attribution.trak(output, damping)([params], (X[:0], Y[:0]), (X, Y)).shape == (6, 0)


def test_trak_of_more_examples_than_parameters_is_the_same_regression():
    rng = np.random.default_rng(0)
    X, T, w = rng.normal(size=(30, 4)), rng.normal(size=(3, 4)), jnp.zeros(4)
    found = attribution.trak(lambda w, x: w @ x, 0.1)([w], (X,), (T,))
    assert_close(found, T @ np.linalg.inv(X.T @ X + 3 * np.eye(4)) @ X.T / 2)


def test_log_odds_are_those_of_the_softmax_without_cancellation():
    logits = jnp.array([3.0, -1.0, 60.0, 0.5])
    p = np.asarray(jax.nn.softmax(logits))
    for label in range(4):
        found = attribution.log_odds(logits, label)
        others = np.delete(p, label).sum()
        assert found == pytest.approx(np.log(p[label] / others), rel=1e-12)
    assert np.isnan(attribution.log_odds(logits, 4))
    assert np.isnan(attribution.log_odds(logits, -1))
    slope = jax.grad(attribution.log_odds)(logits, 0)
    assert_close(slope, jnp.where(jnp.arange(4) == 0, 1.0, -p / np.delete(p, 0).sum()))


# --- The neural tangent kernel ---------------------------------------------------------------------------------------


@pytest.mark.every(9)
@each_model
@pytest.mark.parametrize("block_size", [None, 2])
def test_ntk_matches_its_dense_definition_for_any_block_size(name, block_size):
    model = MODELS[name]
    J = jacobian(model)
    dense = np.einsum("bop,cqp->bcoq", J, J)
    kernel = quick_jit(jg.attribution.ntk(model.model, block_size=block_size))
    assert_close(kernel(model.params, model.x), dense)
    assert_close(kernel(model.params, model.x[:3], model.x[1:]), dense[:3, 1:])
    for outputs, form in (("diagonal", "bcoo->bco"), ("trace", "bcoo->bc")):
        part = quick_jit(jg.attribution.ntk(model.model, outputs=outputs, block_size=block_size))
        assert_close(part(model.params, model.x), np.einsum(form, dense))
        assert_close(part(model.params, model.x[:3], model.x[1:]), np.einsum(form, dense)[:3, 1:])
    scalar = quick_jit(jg.attribution.ntk(lambda p, x: model.model(p, x)[1], block_size=block_size))
    assert_close(scalar(model.params, model.x), dense[:, :, 1, 1])
    assert_close(scalar(model.params, model.x[:3], model.x[1:]), dense[:3, 1:, 1, 1])


@pytest.mark.every(2)
@pytest.mark.parametrize("block_size", [None, 2])
def test_ntk_of_more_outputs_on_one_side_than_on_the_other(block_size):
    rng = np.random.default_rng(0)
    params, x, x2 = (
        {"W": rng.normal(size=(3, 2)), "b": rng.normal(size=2)},
        rng.normal(size=(5, 4, 3)),
        rng.normal(size=(3, 8, 3)),
    )
    fun = lambda p, x: jnp.tanh(x @ p["W"] + p["b"][None]).sum(1)  # noqa: E731
    J, J2 = (jacobian(Model(fun, params, x)) for x in (x, x2))
    kernel = quick_jit(jg.attribution.ntk(fun, block_size=block_size))
    assert_close(kernel(params, x, x2), np.einsum("bop,cqp->bcoq", J, J2))
    assert_close(kernel(params, x2, x[:, :1]), np.einsum("bop,cqp->bcoq", J2, J[:, :1]))
    with pytest.raises(
        ValueError, match=r"ntk: expected numbers on both sides or arrays on both, got outputs \(\) on x"
    ):
        jg.attribution.ntk(lambda p, x: x[0] @ p["b"] if x.ndim == 2 else p["b"] * x[0])(
            params, x[:, :, :2], x2[:, 0, :2]
        )


@pytest.mark.usefixtures("plain_types")
def test_ntk_of_a_tree_of_outputs_and_of_other_words():
    params, X = {"W": jnp.ones((3, 4)) / 5}, jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)))
    fun = lambda p, x: {"a": jnp.tanh(p["W"] @ x), "b": (p["W"] @ x).sum()}  # noqa: E731
    flat = lambda p, x: jnp.append(jnp.tanh(p["W"] @ x), (p["W"] @ x).sum())  # noqa: E731
    for outputs in ("full", "diagonal", "trace"):
        kernels = [quick_jit(jg.attribution.ntk(f, outputs=outputs, block_size=2))(params, X) for f in (fun, flat)]
        assert_close(*kernels)
    with pytest.raises(ValueError, match='ntk: expected outputs="full", "diagonal" or "trace", got \'sum\''):
        jg.attribution.ntk(fun, outputs="sum")
    with pytest.raises(ValueError, match="expected as many outputs on both sides, got 4 and 8"):
        jg.attribution.ntk(lambda p, x: jnp.tanh(x), outputs="trace")(params, X, jnp.ones((5, 8)))


def test_ntk_holds_no_more_than_a_block_s_gradients():
    widths = (64, 256)
    params = {"W": jnp.ones(widths, jnp.float32), "v": jnp.ones(widths[0], jnp.float32)}
    fun = lambda p, x: p["v"] @ jnp.tanh(p["W"] @ x)  # noqa: E731
    X = jnp.ones((512, 256), jnp.float32)
    used = {
        size: jax.jit(jg.attribution.ntk(fun, block_size=size))
        .lower(params, X)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        for size in (None, 32)
    }
    assert used[32] < 0.75 * used[None]


# --- From batches ----------------------------------------------------------------------------------------------------


@pytest.mark.every(0)
@pytest.mark.parametrize("entry", LOSSES[:3], ids=lambda entry: entry.name)
def test_gram_and_influence_in_blocks_match_those_of_the_whole_batch(entry):
    (g, G), (test, T) = gradients(entry.name), gradients(entry.name, True)
    train, others = Batches(*entry.batch, size=2), Batches(*reordered(entry), size=2)
    mu = 0.1 * np.linalg.norm(G, 2) ** 2 / len(G)
    ratio = 0.1 * np.linalg.norm(G, 2) ** 2 / (G**2).sum()
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert_close(streams.gram(entry.loss)(entry.params, train), G @ G.T)
        assert_close(streams.gram(entry.loss)(entry.params, train, others), G @ T.T)
        found = streams.influence(entry.loss, mu)(entry.params, train, others)
        relative = streams.influence(entry.loss, curvature.relative(ratio))(entry.params, train, others)
    assert_close(found, attribution.influence(g, test, mu))
    assert_close(relative, found)


@pytest.mark.every(3)
@pytest.mark.parametrize("size", [1e-25, 1.0, 1e20])
def test_influence_in_blocks_works_at_any_scale(size):
    G = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32) * np.float32(size)
    batches = Batches(G, size=3)
    loss = lambda w, x: w @ x  # noqa: E731
    found = streams.influence(loss, 0.0)(jnp.zeros(3, jnp.float32), batches, batches)
    G = G.astype(float)
    assert_close(found, G @ np.linalg.pinv(G), 8 * np.linalg.cond(G) ** 2 * 2.0**-24)


@pytest.mark.every(5)
@pytest.mark.parametrize("k", [1, 4, 6, 9])
def test_top_k_is_that_of_the_whole_matrix(k, capsys):
    params, X, Y = exercise()
    test = jg.per_example_grad(network.loss)(params, X[:2], Y[:2])
    scores = jax.tree_util.Partial(lambda test, *args: test.gram(jg.per_example_grad(network.loss)(*args)), test)
    whole = np.asarray(jax.jit(scores)(params, X, Y))
    order = np.argsort(-whole, 1)[:, :k]
    for size in (1, 4, 6):
        found = streams.top_k(scores, k, progress=size == 4)(params, Batches(X, Y, size=size))
        assert np.array_equal(found.indices, order)
        assert_close(found.values, np.take_along_axis(whole, order, 1))
    assert "batches" in capsys.readouterr().out


def test_equal_scores_are_in_the_order_of_the_examples():
    found = streams.top_k(lambda _, x: jnp.zeros((1, len(x))), 4)(None, Batches(np.zeros(5), size=2))
    assert found.indices.tolist() == [[0, 1, 2, 3]]


@pytest.mark.usefixtures("plain_types")
def test_errors_name_the_call():
    g = gradients_with_rows(np.eye(3))
    for call, function in (
        ("self_influence", lambda: attribution.self_influence(g, -1.0)),
        ("influence", lambda: attribution.influence(g, g, np.nan)),
        ("streams.influence", lambda: streams.influence(network.loss, -1.0)),
    ):
        with pytest.raises(ValueError, match=f"^{call}: expected a damping ≥ 0, got"):
            function()
    for call, function in (
        ("self_influence", lambda: attribution.self_influence({"W": np.eye(3)}, 1.0)),
        ("influence", lambda: attribution.influence([np.eye(3)], g, 1.0)),
        ("influence", lambda: attribution.influence(g, [np.eye(3)], 1.0)),
        ("cosine_similarity", lambda: attribution.cosine_similarity([np.eye(3)])),
        ("noise_scale", lambda: attribution.noise_scale(None)),
        ("random_projection", lambda: attribution.random_projection([], jax.random.key(0), 3)),
        ("natural_gradient", lambda: curvature.natural_gradient([np.eye(3)], 1.0)),
        ("fisher_solve", lambda: curvature.fisher_solve({}, np.ones(3), 1.0)),
        ("fisher_vector_product", lambda: curvature.fisher_vector_product({}, np.ones(3))),
    ):
        with pytest.raises(TypeError, match=f"^{call}: expected PerExampleGrads, as jg.per_example_grad"):
            function()
    with pytest.raises(ValueError, match="expected the same tree of parameters"):
        attribution.influence(g, jg.per_example_grad(lambda p, x: p[0] @ x)((jnp.zeros(3),), jnp.eye(3)), 1.0)
    with pytest.raises(ValueError, match="random_projection: expected a size of at least 1, got 0"):
        attribution.random_projection(g, jax.random.key(0), 0)
    with pytest.raises(ValueError, match="ntk: expected a block size of at least 1 or None, got 0"):
        jg.attribution.ntk(lambda w, x: w @ x, block_size=0)
    with pytest.raises(ValueError, match=r"streams\.gram: expected at least one batch"):
        streams.gram(network.loss)(None, [])
    with pytest.raises(ValueError, match=r"streams\.top_k: expected at least one batch"):
        streams.top_k(lambda _, x: x, 1)(None, [])
    with pytest.raises(ValueError, match=r"streams\.top_k: expected k of at least 1"):
        streams.top_k(lambda _, x: x, 0)


@pytest.mark.usefixtures("plain_types")
def test_arguments_that_would_be_iterated_by_mistake_are_refused(tmp_path):
    params, X, Y = exercise()
    loss, batches = (lambda w, x: jnp.sin(w @ x)), Batches(X, size=2)
    for name, train, test in (("train", X, (X,)), ("test", (X,), X), ("train", {"x": X}, (X,))):
        with pytest.raises(TypeError, match=f"^tracin: expected a tuple .* as {name}, got .* a tuple of one:"):
            attribution.tracin(loss)([jnp.ones(5)], [0.1], train, test)
    for one in (params, params._asdict(), params.W[0], None):
        with pytest.raises(TypeError, match=r"^grand: expected several parameters, .* pass \[params\]"):
            attribution.grand(network.loss)(one, X, Y)
        with pytest.raises(TypeError, match=r"^tracin: expected several parameters"):
            attribution.tracin(network.loss)(one, [0.1], (X, Y), (X, Y))
    for name, sides in (("batches", (iter(batches),)), ("others", (batches, (b for b in batches)))):
        with pytest.raises(TypeError, match=rf"^streams\.gram: expected a sequence .* as {name}, .* Pass a list"):
            streams.gram(loss)(jnp.ones(5), *sides)
    for name, sides in (("train", (iter(batches), batches)), ("test", (batches, iter(batches)))):
        with pytest.raises(TypeError, match=rf"^streams\.influence: expected a sequence of batches as {name}"):
            streams.influence(loss, 0.1)(jnp.ones(5), *sides)
    bare = list(np.asarray(X).reshape(3, 2, 5))
    for call, function in (
        ("streams.gram", lambda: streams.gram(loss)(jnp.ones(5), bare)),
        ("streams.gram", lambda: streams.gram(loss)(jnp.ones(5), batches, bare)),
        ("streams.influence", lambda: streams.influence(loss, 0.1)(jnp.ones(5), bare, batches)),
        ("streams.influence", lambda: streams.influence(loss, 0.1)(jnp.ones(5), batches, bare)),
        ("streams.top_k", lambda: streams.top_k(lambda _, x: x.T, 1)(None, bare)),
        ("streams.run", lambda: streams.run(streams.norms(loss))(jnp.ones(5), bare, tmp_path)),
    ):
        with pytest.raises(TypeError, match=rf"^{call}: expected a tuple .* as a batch, got ndarray"):
            function()


@pytest.mark.every(0)
def test_empty_batches_have_empty_results():
    g = gradients_with_rows(np.zeros((0, 3)))
    full = gradients_with_rows(np.eye(3))
    assert attribution.self_influence(g, 1.0).shape == (0,)
    assert attribution.influence(full, g, 1.0).shape == (0, 3)
    assert attribution.influence(g, full, 1.0).shape == (3, 0)
    assert attribution.cosine_similarity(g, full).shape == (0, 3)
    assert attribution.random_projection(g, jax.random.key(0), 5).shape == (0, 5)
    model = MODELS["mlp"]
    assert jg.attribution.ntk(model.model)(model.params, model.x, model.x[:0]).shape == (5, 0, 4, 4)
    nothing = curvature.gauss_newton(model.model, curvature.softmax)(model.params, model.x[:0], np.zeros(0, int))
    assert attribution.self_influence(nothing, 1.0).shape == (0,)
