"""Ragged products (`jax.lax.ragged_dot`): rows in groups, each with a matrix of its own, as in a mixture of experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support.quick import quick_jit

import jaxgrad as jg
from jaxgrad import _jax
from jaxgrad.per_example import check_rule

SIZES = jnp.array([[2, 3, 2], [0, 4, 2], [7, 0, 0], [0, 0, 0], [1, 1, 1]])  # of 7 rows; the others are in no group


def normal(seed, *shape, dtype=jnp.float64):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


X = normal(0, 5, 7, 40)


def loss(params, x, sizes):
    h = jnp.tanh(lax.ragged_dot(x, params["in"], sizes))
    return jnp.sin(lax.ragged_dot(h, params["out"], sizes)).sum()


def params(K=40, F=50, N=30):
    return {"in": normal(1, 3, K, F) / 8, "out": normal(2, 3, F, N) / 8}


def one_by_one(loss, params, *batch):
    """JAX's own vmap of a ragged product raises if the matrices are shared by all examples."""
    gradient = quick_jit(jax.grad(loss))
    each = [gradient(params, *example) for example in zip(*batch, strict=True)]
    return jax.tree.map(lambda *a: np.stack(a), *each)


def materialized(loss, *args, **options):
    return quick_jit(lambda *args: jg.per_example_grad(loss, **options)(*args).materialize())(*args)


def assert_close(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11), found, expected)


def test_the_gradients_of_the_experts_stay_factored():
    p = params()
    rows = jg.explain(loss)(p, X, SIZES).rows
    assert [row.how for row in rows] == ["factored"] * 2
    assert all(3 * row.nbytes < row.materialized_nbytes for row in rows)
    expected = one_by_one(loss, p, X, SIZES)
    norms = np.sqrt(sum((a**2).sum((1, 2, 3)) for a in expected.values()))

    @quick_jit
    def run(p, X, SIZES):
        g = jg.per_example_grad(loss, strict=True)(p, X, SIZES)
        return g.materialize(), g.sum(), g.norms(), jg.per_example_norms(loss)(p, X, SIZES)[1]

    assert_close(run(p, X, SIZES), (expected, jax.tree.map(lambda a: a.sum(0), expected), norms, norms))


@pytest.mark.parametrize("shared", [False, True])
def test_a_gradient_that_is_smaller_than_its_rows_is_materialized(shared):
    p, x = params(6, 5, 4), normal(3, 5, 70, 6)
    sizes = 10 * SIZES
    assert {row.why for row in jg.explain(loss)(p, x, sizes).rows} == {"smaller"}
    if shared:
        found = materialized(loss, p, x, sizes[1], in_axes=(None, 0, None))
        sizes = jnp.stack([sizes[1]] * 5)
    else:
        found = materialized(loss, p, x, sizes)
    assert_close(found, one_by_one(loss, p, x, sizes))


def test_rows_that_are_in_no_group_change_nothing_whatever_they_hold():
    p, bad = params(), X.at[1, 6].set(jnp.nan)
    first = lambda p, x, sizes: jnp.sin(lax.ragged_dot(x, p["in"], sizes)[:6]).sum()  # noqa: E731
    assert_close(materialized(first, p, bad[1:2], SIZES[1:2]), one_by_one(first, p, bad[1:2], SIZES[1:2]))


def test_the_gradients_of_all_outputs():
    p = params()
    model = lambda p, x, sizes: lax.ragged_dot(jnp.tanh(lax.ragged_dot(x, p["in"], sizes)), p["out"], sizes)[:2, :3]  # noqa: E731
    J = quick_jit(lambda *args: jg.per_example_jacobian(model)(*args).materialize())(p, X, SIZES)
    for i, j in [(0, 0), (1, 2)]:
        expected = one_by_one(lambda p, x, s, i=i, j=j: model(p, x, s)[i, j], p, X, SIZES)
        assert_close(jax.tree.map(lambda a, k=3 * i + j: a[:, k], J), expected)


def test_matrices_that_depend_on_the_example():
    def own(W, x, sizes):
        matrices = jnp.tanh(x[0, :3])[:, None, None] * W[None]
        return jnp.sin(lax.ragged_dot(x, matrices, sizes)).sum()

    W = normal(4, 40, 6)
    assert_close(materialized(own, W, X, SIZES), one_by_one(own, W, X, SIZES))


@pytest.mark.parametrize(("K", "N"), [(9, 20), (20, 9)])
def test_the_rule_commutes_with_materialization(K, N):
    gradient = jax.grad(lambda w, x, sizes: jnp.sin(lax.ragged_dot(x, w, sizes)).sum())
    report = check_rule(gradient, normal(5, 3, K, N), normal(6, 7, K), SIZES[1])
    assert report.factored
    assert {row.operand for row in report.rows} == {"arrays", "operand 0 a product", "operand 1 a product"}


def test_the_params_that_are_read():
    gradient = jax.grad(lambda w, x, sizes: jnp.sin(lax.ragged_dot(x, w, sizes, precision="highest")).sum())
    program = _jax.program_of(jax.make_jaxpr(gradient)(jnp.ones((3, 4, 5)), jnp.ones((7, 4)), SIZES[0]))
    first, *_, last = [e for e in program.jaxpr.eqns if e.primitive.name == "ragged_dot_general"]
    highest = (lax.Precision.HIGHEST,) * 2
    assert _jax.ragged_parts(first.params) == (0, (1,), (1,), highest, None)
    assert _jax.ragged_parts(last.params) == (0, (0,), (0,), highest, None)
    assert [v.aval.shape for v in last.invars] == [(7, 4), (7, 5), (3,)]
    batched = jax.vmap(lambda x, w, s: lax.ragged_dot(x, w, s))
    program = _jax.program_of(jax.make_jaxpr(batched)(jnp.ones((2, 7, 4)), jnp.ones((2, 3, 4, 5)), SIZES[:2]))
    (eqn,) = [e for e in program.jaxpr.eqns if e.primitive.name == "ragged_dot_general"]
    assert _jax.ragged_parts(eqn.params) is None
