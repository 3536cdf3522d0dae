"""Curvature: each quantity against its dense definition in float64, and the guarantees about rank and rounding."""

import functools
import itertools

import jax
import jax.numpy as jnp
import jax.scipy as jsp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from support.dense import (
    MODELS,
    assert_close,
    each_loss,
    each_model,
    exercise,
    flat,
    gradients,
    gradients_with_rows,
    jacobian,
    matrix,
    solved,
)
from support.quick import quick_jit

import jaxgrad as jg
from jaxgrad import attribution, curvature, network
from jaxgrad.curvature import damped_solve, fisher_solve, fisher_vector_product, gauss_newton, natural_gradient, primal
from jaxgrad.curvature.gauss_newton import from_function
from jaxgrad.per_example.algebra.factors import unfolded

OUTPUT_LOSSES = {
    "softmax": (curvature.softmax, np.array([0, 3, 1, 1, 2])),
    "squared": (curvature.squared, np.random.default_rng(3).normal(size=(5, 4))),
    "any": (lambda f, y: jax.nn.logsumexp(f) + jnp.sum((f - y) ** 4), np.random.default_rng(4).normal(size=(5, 4))),
}
each_output_loss = pytest.mark.parametrize("kind", OUTPUT_LOSSES)


def random_like(tree, seed=0):
    vector, unravel = ravel_pytree(tree)
    return unravel(jnp.asarray(np.random.default_rng(seed).normal(size=vector.shape), vector.dtype))


# --- Fisher ----------------------------------------------------------------------------------------------------------


@pytest.mark.every(7)
@each_loss
def test_products_solves_steps_and_diagonals_match_the_dense_ones(entry):
    g, G = gradients(entry.name)
    v = random_like(entry.params)
    mu = 0.1 * np.linalg.norm(G, 2) ** 2 / len(G)
    found = quick_jit(
        lambda g: (
            fisher_vector_product(g, v),
            natural_gradient(g, mu),
            fisher_solve(g, v, mu),
            g.second_moment(),
            natural_gradient(g, 0.0),
        )
    )
    product, step, solution, diagonal, undamped = map(flat, found(g))
    assert_close(product, G.T @ (G @ flat(v)) / len(G))
    assert_close(step, solved(G, G.mean(0), mu))
    assert_close(solution, solved(G, flat(v), mu))
    assert_close(diagonal, np.diag(G.T @ G) / len(G))
    assert_close(undamped, np.linalg.pinv(G) @ np.ones(len(G)), 1e-8)


@pytest.mark.slow
def test_the_solve_agrees_with_conjugate_gradients_on_the_product():
    g, _ = gradients("mlp")
    v, mu = random_like(jax.tree.map(lambda a: a[0], g.materialize())), 0.3
    damped = lambda x: jax.tree.map(lambda a, b: a + mu * b, fisher_vector_product(g, x), x)  # noqa: E731
    by_cg, _ = jsp.sparse.linalg.cg(damped, v, tol=1e-13)
    assert_close(flat(fisher_solve(g, v, mu)), flat(by_cg), 1e-8)


@pytest.mark.every(0)
@pytest.mark.parametrize("ratio", [1e-2, 1e-5, 1e-8])
def test_a_small_damping_loses_no_more_accuracy_than_documented(ratio):
    g, G = gradients("mlp")
    v, eps = random_like(jax.tree.map(lambda a: a[0], g.materialize())), np.finfo(float).eps
    mu = ratio * np.linalg.norm(G, 2) ** 2 / len(G)
    _, S, Vt = np.linalg.svd(G)
    scale = np.full(G.shape[1], 1 / mu)
    scale[: len(S)] = 1 / (S**2 / len(G) + mu)
    exact = Vt.T @ (scale * (Vt @ flat(v)))
    assert_close(flat(fisher_solve(g, v, mu)), exact, 20 * eps / ratio)
    assert_close(flat(natural_gradient(g, mu)), step_by_svd(G, mu), 20 * len(G) * eps / ratio)


# --- Rank, duplicates, zeros, rounding, size -------------------------------------------------------------------------


STEP = quick_jit(natural_gradient)


def step_by_svd(G, mu, rank=None):
    """(GᵀG/n + μI)⁻¹ ḡ from the singular values of G, of which only the first `rank` are used."""
    U, S, Vt = np.linalg.svd(G, full_matrices=False)
    U, S, Vt = U[:, :rank], S[:rank], Vt[:rank]
    return Vt.T @ (S / (S**2 + mu * len(G)) * U.sum(0))


def degenerate():
    """Duplicate, zero and dependent rows: rank 4 of 9."""
    rng = np.random.default_rng(0)
    G = rng.normal(size=(4, 12))
    return np.concatenate([G, G[:2], np.zeros((1, 12)), G[2:3] + G[3:4], -G[:1]])


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
@pytest.mark.parametrize("mu", [1.0, 1e-2, 1e-4, 1e-7, 1e-12, 0.0])
def test_duplicate_zero_and_dependent_examples_do_no_harm(mu, dtype):
    G = degenerate()
    n, ridge, largest = len(G), mu * len(G), np.linalg.norm(G, 2) ** 2
    unknown = n * float(jnp.finfo(dtype).eps) * largest
    least = np.linalg.svd(G, compute_uv=False)[3] ** 2
    step = STEP(gradients_with_rows(G, dtype), mu)
    assert step.dtype == dtype
    assert_close(step, step_by_svd(G, mu, 4), 3 * unknown / (ridge if ridge > 10 * unknown else least))


@pytest.mark.every(2)
@pytest.mark.parametrize("size", [1e-30, 1e-12, 1.0, 1e12, 1e30])
def test_the_scale_of_the_gradients_does_not_matter(size):
    G = np.random.default_rng(0).normal(size=(5, 8))
    rounding = 8 * np.linalg.cond(G @ G.T) * 2.0**-24
    step = natural_gradient(gradients_with_rows(G * np.float64(size), jnp.float32), 0.0)
    assert_close(np.asarray(step, np.float64) * size, np.linalg.pinv(G) @ np.ones(5), rounding)
    mu = 0.5 * min(max(size**2, 1e-36), 1e36)
    assert_close(natural_gradient(gradients_with_rows(G * size, jnp.float32), mu), step_by_svd(G * size, mu), rounding)


def test_zero_gradients_give_a_zero_step_and_no_examples_give_nan():
    for mu in (0.0, 1.0):
        assert np.all(np.asarray(natural_gradient(gradients_with_rows(np.zeros((3, 4))), mu)) == 0)
        assert np.all(np.isnan(natural_gradient(gradients_with_rows(np.zeros((0, 4))), mu)))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("mu", [0.0, 1e-3, 10.0])
def test_a_gradient_that_is_not_finite_is_not_hidden(bad, mu):
    G = np.random.default_rng(0).normal(size=(5, 8))
    G[2, 3] = bad
    assert np.all(np.isnan(natural_gradient(gradients_with_rows(G), mu)))
    assert np.all(np.isnan(fisher_solve(gradients_with_rows(G), jnp.ones(8), max(mu, 1e-6))))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_solved_in_float32(dtype):
    G = jnp.asarray(np.random.default_rng(0).normal(size=(5, 8)), dtype)
    step = natural_gradient(gradients_with_rows(G, dtype), 0.1)
    assert step.dtype == dtype
    wide = np.asarray(G, np.float64)
    assert_close(step, solved(wide, wide.mean(0), 0.1), 2 * float(jnp.finfo(dtype).eps))
    v = jnp.ones(8, dtype)
    assert_close(
        fisher_solve(gradients_with_rows(G, dtype), v, 0.1),
        solved(wide, np.ones(8), 0.1),
        2 * float(jnp.finfo(dtype).eps),
    )


def test_damped_solve_is_the_solve_for_one_or_several_right_sides_and_under_transformations():
    G = np.random.default_rng(0).normal(size=(4, 6))
    K, b = jnp.asarray(G @ G.T), jnp.asarray(np.random.default_rng(1).normal(size=(4, 3)))
    exact = np.linalg.solve(K + 0.1 * np.eye(4), b)
    assert_close(damped_solve(K, b, 0.1), exact)
    assert_close(damped_solve(K, b[:, 0], 0.1), exact[:, 0])
    assert_close(jax.jit(jax.vmap(damped_solve, (None, 1, None), 1))(K, b, 0.1), exact)
    ours = lambda K, b, mu: jnp.sum(jnp.sin(damped_solve(K @ K.T, b, mu)))  # noqa: E731
    plain = lambda K, b, mu: jnp.sum(jnp.sin(jnp.linalg.solve(K @ K.T + mu * jnp.eye(4), b)))  # noqa: E731
    for found, expected in zip(
        jax.grad(ours, (0, 1, 2))(K, b, 0.1), jax.grad(plain, (0, 1, 2))(K, b, 0.1), strict=True
    ):
        assert_close(found, expected)


def test_the_derivative_of_a_step_matches_the_dense_one():
    params, X, Y = exercise()

    def step(mu, W, dense):
        p = params._replace(W=W)
        if dense:
            G = matrix_of(jax.vmap(jax.grad(network.loss), (None, 0, 0))(p, X, Y))
            return jnp.linalg.solve(G.T @ G / len(X) + mu * jnp.eye(G.shape[1]), G.mean(0))
        return ravel_pytree(natural_gradient(jg.per_example_grad(network.loss)(p, X, Y), mu))[0]

    def matrix_of(tree):
        return jnp.concatenate([a.reshape(len(a), -1) for a in jax.tree.leaves(tree)], 1)

    for argnum in (0, 1):
        jacobian_ = quick_jit(jax.jacobian(step, argnum), static_argnums=2)
        found, expected = (jacobian_(0.2, params.W, dense) for dense in (False, True))
        assert_close(found, expected, 1e-8)


def test_the_derivative_at_zero_damping_is_that_at_a_tiny_one():
    g = gradients_with_rows(np.random.default_rng(0).normal(size=(4, 6)))
    at_zero, near = (jax.jacobian(lambda mu: natural_gradient(g, mu))(mu) for mu in (0.0, 1e-7))
    assert_close(at_zero, near, 1e-5)


# --- Relative dampings -----------------------------------------------------------------------------------------------


def test_a_relative_damping_is_that_multiple_of_the_mean_squared_norm_everywhere():
    g, G = gradients("mlp")
    v, test = random_like(g.sum()), g[:2]
    mean = (G**2).sum(1).mean()

    @quick_jit
    def everything(damping):
        several = natural_gradient(g, damping), fisher_solve(g, v, damping)
        return several, attribution.self_influence(g, damping), attribution.influence(g, test, damping)

    for ratio in (1e-3, 0.1, 20.0):
        found, expected = everything(curvature.relative(ratio)), everything(ratio * mean)
        jax.tree.map(lambda a, b: assert_close(a, b, 1e-8), found, expected)
    K, b = jnp.asarray(G @ G.T), jnp.asarray(np.random.default_rng(0).normal(size=len(G)))
    assert_close(
        damped_solve(K, b, curvature.relative(0.1)), np.linalg.solve(K + 0.1 * np.trace(K) * np.eye(len(K)), b)
    )
    optimizer = curvature.scale_by_natural_gradient(curvature.relative(0.1))
    update, _ = optimizer.update(g, optimizer.init(v))
    assert_close(flat(update), flat(natural_gradient(g, 0.1 * mean)))


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("ratio", [0.0, 1e-2, 1e3])
def test_with_a_relative_damping_the_scale_of_the_gradients_does_not_matter(size, ratio):
    G = np.random.default_rng(0).normal(size=(5, 8))
    step = natural_gradient(gradients_with_rows(G * np.float64(size), jnp.float32), curvature.relative(ratio))
    expected = step_by_svd(G, ratio * (G**2).sum(1).mean())
    assert_close(np.asarray(step, np.float64) * size, expected, 8 * np.linalg.cond(G @ G.T) * 2.0**-24)


def test_the_derivative_with_respect_to_a_ratio_is_that_of_the_formula():
    G = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)))

    def ours(G, ratio):
        return natural_gradient(gradients_with_rows(G), curvature.relative(ratio))

    def plain(G, ratio):
        mu = ratio * (G**2).sum(1).mean()
        return jnp.linalg.solve(G.T @ G / 4 + mu * jnp.eye(6), G.mean(0))

    for argnum in (0, 1):
        found, expected = (jax.jacobian(f, argnum)(G, 0.1) for f in (ours, plain))
        assert_close(found, expected, 1e-8)


# --- More rows than parameters ---------------------------------------------------------------------------------------


def tall(kind):
    """(gradients or Gauss-Newton rows, the rows [n, P], the gradients [B, P]) with far more rows than parameters."""
    rng = np.random.default_rng(0)
    params = {"W": rng.normal(size=(3, 2)), "b": rng.normal(size=3)}
    model = lambda p, x: jnp.tanh(p["W"] @ x + p["b"])  # noqa: E731
    x, y = rng.normal(size=(40, 2)), rng.integers(0, 3, 40)
    loss = lambda p, x, y: curvature.softmax.value(model(p, x), y)  # noqa: E731
    if kind == "gradients":
        g = quick_jit(jg.per_example_grad(loss))(params, x, y)
        return g, matrix(g.materialize()), matrix(g.materialize())
    found = quick_jit(gauss_newton(model, curvature.softmax))(params, x, y)
    G = matrix(found.rows.materialize())
    return found, G, np.einsum("brp,br->bp", G.reshape(40, 3, -1), found.residuals) / 3


@pytest.mark.parametrize("kind", ["gradients", "gauss_newton"])
@pytest.mark.parametrize("chunk_bytes", [None, 2000])
def test_solves_with_more_rows_than_parameters_match_the_dense_ones(kind, chunk_bytes, monkeypatch):
    g, G, each = tall(kind)
    P, v = G.shape[1], {"W": jnp.arange(6.0).reshape(3, 2), "b": jnp.ones(3)}
    if chunk_bytes:
        monkeypatch.setattr("jaxgrad.curvature.primal.chunk_size", lambda one, count: max(1, chunk_bytes // one))
        primal.second_moments.clear_cache()
    assert primal.is_tall(g if kind == "gradients" else g.rows)
    test = jg.per_example_grad(lambda p, x: (p["W"] @ x + p["b"]).sum())(v, jnp.ones((4, 2)) * jnp.arange(4.0)[:, None])
    T = matrix(test.materialize())
    inverse = np.linalg.inv(G.T @ G / len(G) + 0.01 * (G**2).sum(1).mean() * np.eye(P))

    @quick_jit
    def everything(g, damping):
        several = natural_gradient(g, damping), fisher_solve(g, v, damping)
        return *several, attribution.self_influence(g, damping), attribution.influence(g, test, damping)

    step, solution, own, influence = everything(g, curvature.relative(0.01))
    assert_close(flat(step), inverse @ each.mean(0))
    assert_close(flat(solution), inverse @ flat(v))
    assert_close(own, np.einsum("bp,pq,bq->b", each, inverse, each))
    assert_close(influence, T @ inverse @ each.T / len(each))
    primal.second_moments.clear_cache()


def test_many_examples_of_few_parameters_have_a_step_of_the_right_rank():
    G = np.random.default_rng(0).normal(size=(50, 3)) @ np.random.default_rng(1).normal(size=(3, 6))
    assert_close(STEP(gradients_with_rows(G), 0.0), step_by_svd(G, 0.0, 3), 1e-8)
    assert_close(STEP(gradients_with_rows(G * 1e30, jnp.float32), 0.0) * 1e30, step_by_svd(G, 0.0, 3), 1e-3)


@pytest.mark.every(0)
def test_a_tall_matrix_on_an_explicit_mesh_gives_the_same():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    G = np.random.default_rng(0).normal(size=(40, 6))
    g = gradients_with_rows(G)
    with jax.sharding.set_mesh(mesh):
        x = jax.device_put(jnp.asarray(G), jax.NamedSharding(mesh, jax.P("data")))
        sharded = jax.jit(jg.per_example_grad(lambda w, x: w @ x))(jnp.zeros(6), x)
        found = natural_gradient(sharded, 0.1), attribution.self_influence(sharded, 0.1)
        found += (attribution.influence(sharded, sharded, 0.1),)
    expected = natural_gradient(g, 0.1), attribution.self_influence(g, 0.1), attribution.influence(g, g, 0.1)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b)


# --- Gauss-Newton ----------------------------------------------------------------------------------------------------


def dense_gauss_newton(model, loss, y):
    J = jacobian(model)
    outputs = jax.vmap(model.model, (None, 0))(model.params, model.x)
    value = loss.value if isinstance(loss, curvature.OutputLoss) else loss
    H = np.asarray(quick_jit(jax.vmap(jax.hessian(value)))(outputs, jnp.asarray(y)))
    gradient = np.asarray(quick_jit(jax.vmap(jax.grad(value)))(outputs, jnp.asarray(y)))
    return np.einsum("bop,boq,bqr->pr", J, H, J) / len(J), np.einsum("bop,bo->bp", J, gradient)


@pytest.mark.every(13)
@each_output_loss
@each_model
def test_gauss_newton_rows_products_diagonal_and_step_match_the_dense_ones(name, kind):
    model, (loss, y) = MODELS[name], OUTPUT_LOSSES[kind]
    matrix_, each = dense_gauss_newton(model, loss, y)
    v, mu = random_like(model.params), 0.1

    @quick_jit
    def run(params, v, x, y):
        found = gauss_newton(model.model, loss)(params, x, y)
        rows, product = found.rows, curvature.gauss_newton_vector_product(model.model, loss)
        several = product(params, v, x, y), fisher_vector_product(found, v), rows.second_moment()
        return rows.materialize(), found.residuals, *several, natural_gradient(found, mu), fisher_solve(found, v, mu)

    rows, residuals, product, through_rows, diagonal, step, fisher_solve_ = run(model.params, v, model.x, y)
    G = matrix(rows)
    assert_close(G.T @ G / len(G), matrix_)
    assert_close(G.T @ np.ravel(residuals) / len(G), each.mean(0))
    assert_close(flat(product), matrix_ @ flat(v))
    assert_close(flat(through_rows), matrix_ @ flat(v))
    assert_close(flat(fisher_solve_), np.linalg.solve(matrix_ + mu * np.eye(len(matrix_)), flat(v)))
    assert_close(flat(diagonal), np.diag(matrix_))
    assert_close(flat(step), np.linalg.solve(matrix_ + mu * np.eye(len(matrix_)), each.mean(0)))


@pytest.mark.every(0)
def test_the_exercise_s_logistic_loss_has_one_row_an_example_and_the_dense_matrix():
    params, X, Y = exercise()
    found = gauss_newton(network.margin, curvature.logistic)(params, X, Y)
    assert found.rows.batch_size == len(X)
    J = matrix(jax.vmap(jax.grad(network.margin), (None, 0))(params, X))
    margins = np.asarray(jax.vmap(network.margin, (None, 0))(params, X))
    slope = 1 / (2 * np.cosh(margins / 2)) ** 2
    dense = J.T @ (slope[:, None] * J) / len(X)
    G = matrix(found.rows.materialize())
    assert_close(G.T @ G / len(X), dense)
    mean = matrix(network.autodiff.batched_grad(params, X, Y)).mean(0)
    assert_close(G.T @ np.ravel(found.residuals) / len(X), mean)
    v = random_like(params)
    product = curvature.gauss_newton_vector_product(network.margin, curvature.logistic)(params, v, X, Y)
    assert_close(flat(product), dense @ flat(v))
    assert_close(flat(natural_gradient(found, 0.01)), np.linalg.solve(dense + 0.01 * np.eye(len(dense)), mean))


def test_the_rows_of_an_example_hold_its_activations_once():
    O, sizes = 10, (64, 128, 10)  # noqa: E741
    params = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in itertools.pairwise(sizes)]

    def model(params, x):
        return jnp.tanh(x @ params[0]) @ params[1]

    x, y = jax.ShapeDtypeStruct((32, 64), jnp.float32), jax.ShapeDtypeStruct((32,), jnp.int32)
    found = jax.eval_shape(gauss_newton(model, curvature.softmax), params, x, y)
    activations, cotangents, weights = 4 * 32 * (64 + 128), 4 * 32 * O * (128 + O), 4 * 32 * 2
    assert found.jacobian.nbytes == activations + cotangents + weights
    assert jax.eval_shape(lambda found: found.rows, found).nbytes == O * activations + cotangents


@pytest.mark.every(0)
@pytest.mark.parametrize("argnums", [0, (0, 2)])
def test_gauss_newton_takes_argnums_and_axes_as_vmap_does(argnums):
    model = lambda W, x, b, scale: scale * jnp.tanh(W @ x + b)  # noqa: E731
    rng = np.random.default_rng(0)
    W, X, b, Y = (jnp.asarray(rng.normal(size=shape)) for shape in ((3, 4), (4, 5), (3,), (5, 3)))
    scale, axes = jnp.asarray(2.0), (None, 1, None, None, 0)
    args = W, X, b, scale, Y
    found = quick_jit(gauss_newton(model, curvature.squared, argnums=argnums, in_axes=axes))(*args)
    J = jax.vmap(jax.jacrev(model, argnums), (None, 1, None, None))(*args[:-1])
    J = np.concatenate([np.reshape(a, (5, 3, -1)) for a in jax.tree.leaves(J)], 2)
    dense = np.einsum("bop,boq->pq", J, J) / 5
    G = matrix(found.rows.materialize())
    assert_close(G.T @ G / len(G), dense)
    chosen = args[argnums] if isinstance(argnums, int) else tuple(args[k] for k in argnums)
    v = random_like(chosen)
    product = curvature.gauss_newton_vector_product(model, curvature.squared, argnums=argnums, in_axes=axes)
    assert_close(flat(quick_jit(product)(W, v, *args[1:])), dense @ flat(v))


@pytest.mark.every(5)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("margin", [-60.0, -20.0, 0.0, 20.0, 60.0])
def test_roots_are_accurate_where_units_saturate(margin, dtype):
    import mpmath as mp

    eps = float(jnp.finfo(dtype).eps)
    S, r = curvature.logistic.root(jnp.asarray(margin, dtype), jnp.asarray(1.0, dtype))
    exact = mp.sqrt(1 / (1 + mp.exp(-margin)) * (1 / (1 + mp.exp(margin))))
    assert abs(float(S[0, 0]) / exact - 1) < 40 * eps
    assert abs(float(S[0, 0]) * float(r[0]) / (-1 / (1 + mp.exp(margin))) - 1) < 80 * eps
    logits = jnp.asarray([margin, 0.0, 1.0], dtype)
    S, r = curvature.softmax.root(logits, jnp.asarray(0))
    e = [mp.exp(mp.mpf(float(z))) for z in logits]
    p = [x / sum(e) for x in e]
    for j in range(3):
        others = sum(p[k] for k in range(3) if k != j)
        assert abs(float(S[j, j]) / (mp.sqrt(p[j]) * others) - 1) < 80 * eps
        total = mp.fdot([mp.mpf(float(a)) for a in S[j]], [mp.mpf(float(a)) for a in r])
        assert abs(total / (-others if j == 0 else p[j]) - 1) < 80 * eps


def test_a_masked_or_improbable_class_does_not_change_the_roots():
    for logit in (-np.inf, -1e4):
        S, r = curvature.softmax.root(jnp.array([0.5, logit, 1.0]), jnp.asarray(0))
        without, r_without = curvature.softmax.root(jnp.array([0.5, 1.0]), jnp.asarray(0))
        assert_close(S[np.ix_([0, 2], [0, 2])], without)
        assert_close(S[1], np.zeros(3))
        assert_close(r[np.array([0, 2])], r_without)
        assert r[1] == 0


def test_invalid_targets_give_nan_or_are_refused():
    for label in (-100, -1, 3):
        assert np.isnan(curvature.softmax.value(jnp.zeros(3), label))
        assert np.isnan(curvature.softmax.root(jnp.zeros(3), label)[1]).all()
    margin = jnp.array(0.3)
    for y in (0, 2, 0.5, np.nan):
        assert np.isnan(curvature.logistic.value(margin, jnp.asarray(y)))
        assert np.isnan(curvature.logistic.root(margin, jnp.asarray(y))[1]).all()
    for y, sign in ((True, 1.0), (False, -1.0), (1, 1.0), (-1, -1.0)):
        found, expected = (curvature.logistic.root(margin, jnp.asarray(v)) for v in (y, sign))
        assert_close(found[1], expected[1])
    for target in (jnp.zeros(4), jnp.zeros((3, 1))):
        with pytest.raises(ValueError, match="squared: expected a target of the outputs' shape"):
            curvature.squared.product(jnp.zeros(3), target, jnp.zeros(3))
    for logits, label in ((jnp.zeros((3, 1)), 0), (jnp.zeros(3), jnp.zeros(3)), (jnp.zeros(3), 0.0)):
        with pytest.raises(ValueError, match=r"softmax: expected logits \[O\] and one integer"):
            curvature.softmax.product(logits, label, jnp.zeros(3))


def test_products_of_a_large_batch_in_half_precision_do_not_overflow():
    x = jnp.full((70_000, 1), 2, jnp.float16)
    product = curvature.gauss_newton_vector_product(lambda w, x: w @ x, curvature.squared)
    found = product(jnp.zeros(1, jnp.float16), jnp.ones(1, jnp.float16), x, jnp.zeros(70_000, jnp.float16))
    assert float(found[0]) == pytest.approx(4, rel=0.05)


@pytest.mark.every(0)
def test_a_loss_that_is_not_convex_has_no_root():
    model = MODELS["mlp"]
    found = gauss_newton(model.model, lambda f, y: -jnp.sum((f - y) ** 2))(model.params, model.x, np.ones((5, 4)))
    assert np.isnan(flat(natural_gradient(found, 1.0))).all()


@pytest.mark.every(0)
@pytest.mark.parametrize("scale", [1.0, 1e-10])
def test_slightly_negative_curvature_is_not_taken_for_rounding(scale):
    loss = lambda f, y: scale * jnp.asarray([1.0, 1.0, -1e-3], f.dtype) @ (f - y) ** 2  # noqa: E731
    W, x = jnp.ones((3, 2), jnp.float32), jnp.ones((4, 2), jnp.float32)
    found = gauss_newton(lambda W, x: W @ x, loss)(W, x, jnp.zeros((4, 3), jnp.float32))
    assert np.isnan(found.rows.norms().reshape(4, 3)).any(1).all()


@pytest.mark.every(3)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("O", [2, 10, 100])
def test_the_curvature_of_a_saturated_loss_is_accurate_to_rounding(O, dtype):  # noqa: E741
    rng = np.random.default_rng(0)
    logits, labels = jnp.asarray(30 * rng.normal(size=(100, O)), dtype), np.arange(100) % O
    loss = lambda f, y: jax.nn.logsumexp(f) - jnp.where(jnp.arange(O) == y, f, jnp.zeros_like(f)).sum()  # noqa: E731
    S, _ = jax.jit(jax.vmap(from_function(loss).root))(logits, labels)
    p = np.asarray(jax.nn.softmax(jnp.asarray(logits, jnp.float64)))
    H = np.eye(O) * p[:, :, None] - p[:, :, None] * p[:, None, :]
    S = np.asarray(S, np.float64)
    np.testing.assert_allclose(S @ S.swapaxes(1, 2), H, rtol=0, atol=O * float(jnp.finfo(dtype).eps))


@pytest.mark.every(0)
def test_a_model_in_bfloat16_has_its_roots_in_float32():
    params = {"W": jnp.ones((3, 12), jnp.bfloat16) / 4}
    x, y = jnp.ones((2, 12), jnp.bfloat16), jnp.array([0, 2])
    found = gauss_newton(lambda p, x: p["W"] @ x, curvature.softmax)(params, x, y)
    assert found.residuals.dtype == jnp.float32
    assert natural_gradient(found, 0.1)["W"].dtype == jnp.bfloat16


# --- Kronecker factors -----------------------------------------------------------------------------------------------


def test_kfac_factors_are_the_moments_of_activations_and_cotangents():
    rng = np.random.default_rng(0)
    W = [rng.normal(size=s) / 3 for s in [(14, 9), (13, 14), (11, 13)]]
    X = rng.normal(size=(6, 9))

    def forward(W, taps, x):
        inputs = []
        for w, tap in zip(W, taps, strict=True):
            inputs.append(x)
            x = jnp.tanh(w @ x + tap)
        return jnp.sum(jnp.sin(x)), inputs

    zeros = [np.zeros(len(w)) for w in W]
    taps, inputs = jax.vmap(lambda x: jax.grad(forward, 1, has_aux=True)(W, zeros, x))(X)
    found = curvature.kfac_factors(jg.per_example_grad(lambda W, x: forward(W, zeros, x)[0])(W, X))
    for factors, delta, a in zip(found, taps, inputs, strict=True):
        both = {"left": factors.left, "right": factors.right}
        sides = (
            {"left": delta, "right": a}
            if factors.layout.order[1] < factors.layout.order[2]
            else {"left": a, "right": delta}
        )
        for side, rows in sides.items():
            assert_close(both[side][0], np.asarray(rows).T @ np.asarray(rows) / len(X))


@pytest.mark.every(0)
def test_kfac_factors_of_sequences_and_convolutions_match_the_materialized_sides():
    rng = np.random.default_rng(0)
    params = {"W": rng.normal(size=(40, 12)), "K": rng.normal(size=(3, 3, 8, 40)) / 5, "b": np.zeros(40)}

    def loss(p, x, image):
        h = jax.lax.conv_general_dilated(
            image[None], p["K"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.sum(jnp.sin(x @ p["W"].T + p["b"][None])) + jnp.sum(jnp.tanh(h))

    g = jg.per_example_grad(loss)(params, rng.normal(size=(3, 5, 12)), rng.normal(size=(3, 4, 5, 8)))
    found = curvature.kfac_factors(g)
    assert found["b"] is None
    for key, factors in (("W", found["W"]), ("K", found["K"])):
        (f,) = g.factors[key]
        left, right = map(np.asarray, (unfolded(f) if f.windows else f).sides())
        T = left.shape[2]
        assert T > 1
        assert_close(factors.left, np.einsum("bgtf,bgte->gfe", left, left) / 3)
        assert_close(factors.right, np.einsum("bgtk,bgtl->gkl", right, right) / (3 * T))


def test_kfac_factors_multiply_to_the_fisher_block_where_sides_are_independent():
    rng = np.random.default_rng(0)
    sides = [rng.normal(size=(3, 9)), rng.normal(size=(2, 10))]
    a, d = (np.repeat(sides[0], 2, 0), np.tile(sides[1], (3, 1)))  # every pair once
    g = jg.per_example_grad(lambda W, d, a: d @ W @ a)(np.zeros((10, 9)), d, a)
    factors = curvature.kfac_factors(g)
    kron = np.kron(factors.left[0], factors.right[0])
    G = factors.layout.to_matrix(jnp.asarray(g.materialize())).reshape(6, -1)
    assert_close(kron, np.asarray(G).T @ np.asarray(G) / 6)


@pytest.mark.every(0)
def test_kfac_factors_of_wide_sides_are_symmetric_and_right():
    rng = np.random.default_rng(0)
    d, a = rng.normal(size=(4, 300)), rng.normal(size=(4, 517))
    g = jg.per_example_grad(lambda W, d, a: d @ W @ a)(np.zeros((300, 517)), d, a)
    factors = curvature.kfac_factors(g)
    assert_close(factors.left[0], d.T @ d / 4)
    assert_close(factors.right[0], a.T @ a / 4)
    assert np.array_equal(factors.left, factors.left.mT)


# --- optax, transformations, errors ----------------------------------------------------------------------------------


@pytest.mark.every(0)
def test_the_optax_transformation_is_the_step_with_a_schedule_and_under_jit():
    params, X, Y = exercise()
    optimizer = optax.chain(
        curvature.scale_by_natural_gradient(lambda count: 0.5 / (1.0 + count.astype(jnp.float64))), optax.scale(-0.1)
    )

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jg.per_example_grad(network.loss)(params, X, Y), state, params)
        return optax.apply_updates(params, updates), state

    state, expected = optimizer.init(params), params
    for k in range(3):
        direction = natural_gradient(jg.per_example_grad(network.loss)(expected, X, Y), 0.5 / (1 + k))
        expected = jax.tree.map(lambda p, d: p - 0.1 * d, expected, direction)
        params, state = step(params, state)
        assert_close(flat(params), flat(expected))


def test_steps_go_through_jit_and_vmap():
    params, X, Y = exercise()
    step = lambda mu: natural_gradient(jg.per_example_grad(network.loss)(params, X, Y), mu)  # noqa: E731
    dampings = jnp.array([0.0, 1e-9, 0.1, 10.0])
    together = jax.jit(jax.vmap(step))(dampings)
    for k, mu in enumerate(dampings):
        assert_close(flat(jax.tree.map(lambda a, k=k: a[k], together)), flat(step(mu)), 1e-6 if mu < 1e-3 else 1e-9)


@pytest.mark.every(2)
@pytest.mark.parametrize(
    "function",
    [
        lambda g, K: natural_gradient(g, 0.1),
        lambda g, K: fisher_solve(g, jnp.ones(7), 0.1),
        lambda g, K: damped_solve(K, K[0], 0.1),
        lambda g, K: attribution.self_influence(g, 0.1),
        lambda g, K: attribution.influence(g, g, 0.1),
        lambda g, K: attribution.random_projection(g, jax.random.key(0), 3),
    ],
    ids=["natural_gradient", "fisher_solve", "damped_solve", "self_influence", "influence", "random_projection"],
)
def test_a_call_that_is_not_jitted_is_compiled_once(function, caplog):
    rng = np.random.default_rng(0)

    def compiled(function, *args):
        caplog.clear()
        with jax.log_compiles():
            function(*args)
        return [r.getMessage() for r in caplog.records if "XLA compilation" in r.getMessage()]

    batches = [jnp.asarray(rng.normal(size=(5, 7))) for _ in range(4)]
    each = [compiled(function, gradients_with_rows(G), G @ G.T) for G in batches]
    assert not any(each[1:])
    assert compiled(jax.jit(lambda x: x + 1), 1.0)  # a compilation is detected


@pytest.mark.parametrize("mu", [-1.0, np.nan, np.ones(2), None, "much", curvature.relative(-1.0), (1.0,)])
def test_an_invalid_damping_is_refused(mu):
    g = gradients_with_rows(np.eye(3))
    with pytest.raises(ValueError, match="natural_gradient: expected a damping ≥ 0, got"):
        natural_gradient(g, mu)


@pytest.mark.usefixtures("plain_types")
def test_other_errors_name_the_call():
    g = gradients_with_rows(np.eye(3))
    with pytest.raises(ValueError, match="fisher_solve: expected a damping > 0, got 0"):
        fisher_solve(g, jnp.ones(3), 0.0)
    with pytest.raises(ValueError, match="expected shape"):
        fisher_vector_product(g, jnp.ones(4))
    optimizer = curvature.scale_by_natural_gradient(1.0)
    with pytest.raises(TypeError, match="expected PerExampleGrads or GaussNewton as updates, got"):
        optimizer.update(jnp.ones(3), optimizer.init(jnp.ones(3)))
    with pytest.raises(ValueError, match=r"damped_solve: expected K \[n, n\]"):
        damped_solve(jnp.ones((2, 3)), jnp.ones(2), 1.0)
    rows = functools.partial(gauss_newton(lambda p, x: p @ x, curvature.squared), jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="gauss_newton: expected one batch size in all batched arguments"):
        rows(jnp.ones((4, 3)), jnp.ones((5, 2)))
