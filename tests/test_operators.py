"""Arithmetic on PerExampleGrads, and what `jax.tree.map` does to them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxgrad as jg


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


PARAMS = {"E": normal(0, 9, 3), "W": normal(1, 5, 3), "b": normal(2, 5)}
IDS = jnp.arange(12).reshape(4, 3) % 9


def first(params, ids):
    return jnp.sum(jnp.tanh(params["E"][ids] @ params["W"].T + params["b"][None]))


def second(params, ids):
    return jnp.sum(jnp.sin(params["E"][ids[0]])) + jnp.sum(params["W"] ** 2) * ids[0].astype(float)


def materialized(loss):
    return jax.vmap(jax.grad(loss), (None, 0))(PARAMS, IDS)


def grads(loss):
    return jg.per_example_grad(loss)(PARAMS, IDS)


@pytest.mark.every(0)
@pytest.mark.parametrize("jit", [True, False])
def test_sums_and_multiples_are_those_of_the_matrix(jit):
    c = normal(3, 4)

    def combined(g, h):
        return [
            2 * g, g * 0.5, np.float64(3) * g, g * c, c * g, g / 4, -g, g + h, g - h, (g + h) / 2,
            2 * g.scale(c) - h * c, jnp.float64(2) * g,
        ]  # fmt: skip

    def expected(a, b):
        each = lambda v: c.reshape(4, *[1] * (v.ndim - 1)) * v  # noqa: E731
        tree = jax.tree.map
        plus = lambda x, y, s=1.0: tree(lambda x, y: x + s * y, x, y)  # noqa: E731
        times = lambda s, x: tree(lambda v: s * v, x)  # noqa: E731
        return [
            times(2, a), times(0.5, a), times(3, a), tree(each, a), tree(each, a), times(0.25, a), times(-1, a),
            plus(a, b), plus(a, b, -1), times(0.5, plus(a, b)), plus(times(2, tree(each, a)), tree(each, b), -1),
            times(2, a),
        ]  # fmt: skip

    results = (jax.jit(combined) if jit else combined)(grads(first), grads(second))
    for got, want in zip(results, expected(materialized(first), materialized(second)), strict=True):
        chex.assert_trees_all_close(got.materialize(), want, rtol=1e-12)
        squares = sum((v.reshape(4, -1) ** 2).sum(1) for v in jax.tree.leaves(want))
        np.testing.assert_allclose(got.norms(), np.sqrt(squares), rtol=1e-10)


def test_a_sum_is_the_gradient_of_the_sum_of_the_losses_and_keeps_its_factors():
    total = grads(first) + grads(second)
    chex.assert_trees_all_close(
        total.materialize(), materialized(lambda p, ids: first(p, ids) + second(p, ids)), rtol=1e-12
    )
    assert [f.kind for f in total.factors["E"]] == ["Rows", "Rows"]


def test_an_integer_number_and_half_precision_keep_float32():
    g = jg.per_example_grad(lambda w, x: jnp.tanh(w @ x).sum())(
        jnp.ones((3, 2), jnp.bfloat16), jnp.ones((4, 2), jnp.bfloat16)
    )
    assert (3 * g).norms().dtype == jnp.float32
    np.testing.assert_allclose((3 * g).norms(), 3 * g.norms(), rtol=1e-6)


def test_what_does_not_fit_is_refused():
    g = grads(first)
    with pytest.raises(ValueError, match="as many examples in both, got 4 and 2"):
        g + g[:2]
    with pytest.raises(ValueError, match="the same tree of parameters"):
        g + jg.per_example_grad(lambda w, x: (w * x).sum())(jnp.ones(3), jnp.ones((4, 3)))
    with pytest.raises(ValueError, match=r"one floating number per example, shape \(4,\)"):
        g * jnp.ones(3)
    for other in (1.0, materialized(first)):
        with pytest.raises(TypeError):
            g + other


def test_a_tree_map_that_drops_the_example_axis_is_an_error():
    for function in (lambda a: a.mean(0), jnp.linalg.norm):
        mapped = jax.tree.map(lambda a, f=function: f(a) if jnp.issubdtype(a.dtype, jnp.floating) else a, grads(first))
        with pytest.raises(ValueError, match=r"jax\.tree\.map"):
            mapped.norms()
