import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import oracle

from jaxgrad.network import ACTIVATIONS, Params, autodiff, closed_form, derivation, init_params, loss, sine

FORMS = [
    derivation.matrix_form_transposed,
    derivation.matrix_form,
    derivation.component_form_summed,
    derivation.component_form,
    derivation.component_form_expanded,
    derivation.first_answer_corrected,
]


def example(seed, H, D, dtype=jnp.float64):
    kp, kx, ky = jax.random.split(jax.random.key(seed), 3)
    x = jax.random.normal(kx, (D,), dtype)
    return init_params(kp, D, H, dtype), x, jnp.where(jax.random.bernoulli(ky), 1, -1).astype(dtype)


def relative(a, b):
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


@given(st.integers(0, 99), st.integers(1, 5), st.integers(1, 6), st.sampled_from(sorted(ACTIVATIONS)))
def test_matrix_component_and_corrected_forms_agree_with_jax_grad(seed, H, D, name):
    params, x, y = example(seed, H, D)
    sigma = ACTIVATIONS[name]
    true = autodiff.grad(params, x, y, sigma).W
    for form in FORMS:
        np.testing.assert_allclose(form(params, x, y, sigma), true, rtol=1e-11, atol=1e-15)


@given(st.integers(0, 99), st.integers(1, 5), st.integers(1, 6))
def test_the_logistic_form_agrees_with_jax_grad(seed, H, D):
    params, x, y = example(seed, H, D)
    np.testing.assert_allclose(
        derivation.logistic_form(params, x, y), autodiff.grad(params, x, y).W, rtol=1e-11, atol=1e-15
    )


@pytest.mark.every(0)
@given(st.integers(0, 99), st.integers(2, 5), st.integers(1, 6))
def test_the_first_answer_read_literally_is_wrong_for_more_than_one_unit(seed, H, D):
    params, x, y = example(seed, H, D)
    literal, true = derivation.first_answer_literal(params, x, y), autodiff.grad(params, x, y).W
    assert relative(literal, true) > 0.1
    # ... because every row holds the sum over all hidden units.
    np.testing.assert_allclose(literal, jnp.broadcast_to(true.sum(0), true.shape), rtol=1e-11, atol=1e-15)


def test_the_first_answer_read_literally_is_right_for_one_unit():
    params, x, y = example(0, 1, 6)
    np.testing.assert_allclose(derivation.first_answer_literal(params, x, y), autodiff.grad(params, x, y).W, rtol=1e-12)


def test_every_line_of_the_first_chain_is_the_derivative_of_what_it_says():
    params, x, y = example(3, 3, 4)
    b = derivation.beta(params, x, y)
    np.testing.assert_allclose(derivation.first_answer_outer(params, x, y), jax.grad(jnp.log)(1 + jnp.exp(b)))
    np.testing.assert_allclose(derivation.first_answer_exponential(params, x, y), jax.grad(jnp.exp)(b))
    assert derivation.first_answer_exponential(params, x, y) == derivation.alpha(params, x, y)


@pytest.mark.every(2)
@pytest.mark.parametrize("sigma", [ACTIVATIONS["logistic"], ACTIVATIONS["gelu"], sine], ids=str)
def test_every_differential_is_the_tangent_of_its_variable(sigma):
    params, x, y = example(4, 3, 4)
    dW = jax.random.normal(jax.random.key(5), (3, 4), jnp.float64)

    def tangent(variable):
        return jax.jvp(lambda W: variable(params._replace(W=W)), (params.W,), (dW,))[1]

    pairs = [
        (derivation.dz(params, x, dW), lambda p: derivation.z(p, x)),
        (derivation.ds(params, x, dW, sigma), lambda p: derivation.s(p, x, sigma)),
        (derivation.dbeta(params, x, y, dW, sigma), lambda p: derivation.beta(p, x, y, sigma)),
        (derivation.dalpha(params, x, y, dW, sigma), lambda p: derivation.alpha(p, x, y, sigma)),
    ]
    for found, variable in pairs:
        np.testing.assert_allclose(found, tangent(variable), rtol=1e-12)
    for line in derivation.dlambda(params, x, y, dW, sigma):
        np.testing.assert_allclose(line, tangent(lambda p: derivation.lambda_(p, x, y, sigma)), rtol=1e-12)


def test_the_variables_are_what_the_page_says():
    params, x, y = example(6, 3, 4)
    assert derivation.gamma(y) == y
    np.testing.assert_allclose(derivation.lambda_(params, x, y), loss(params, x, y), rtol=1e-14)
    np.testing.assert_allclose(derivation.S_prime(params, x), jnp.diag(derivation.s_prime(params, x)))
    s = derivation.s(params, x)
    np.testing.assert_allclose(derivation.s_prime(params, x), s - s**2, rtol=1e-14)


def one_unit(z, m, dtype):
    """A unit at z whose output weight makes the margin m; x = 1."""
    w = jnp.array([m / float(jax.nn.sigmoid(z))], dtype)
    return Params(jnp.zeros((1, 1), dtype), jnp.array([z], dtype), w), jnp.ones(1, dtype)


def test_the_page_overflows_where_closed_form_does_not():
    params, x = one_unit(0.5, -90.0, jnp.float32)
    y = jnp.float32(1)
    assert jnp.isinf(derivation.alpha(params, x, y))
    assert jnp.isinf(derivation.lambda_(params, x, y))
    for form in FORMS:
        assert jnp.isnan(form(params, x, y)).all(), form
    assert jnp.isnan(derivation.logistic_form(params, x, y)).all()
    true = oracle.gradient(params, x, y)["W"][0][0]
    assert oracle.ulps(closed_form.grad(params, x, y).W[0, 0], true, np.float32) < 40

    params, x = one_unit(0.5, -85.0, jnp.float32)  # just below: the page still has a number
    assert jnp.isfinite(derivation.matrix_form(params, x, y)).all()


def test_the_page_loses_the_loss_where_alpha_is_small():
    params, x = one_unit(0.5, 20.0, jnp.float32)
    y = jnp.float32(1)
    assert derivation.lambda_(params, x, y) == 0
    np.testing.assert_allclose(loss(params, x, y), np.exp(-20.0), rtol=1e-5)


@pytest.mark.parametrize("z", [17.0, 20.0, 80.0])
def test_s_minus_s_squared_loses_every_digit_where_closed_form_keeps_them(z):
    params, x = one_unit(z, 1.0, jnp.float32)
    y = jnp.float32(1)
    assert derivation.logistic_form(params, x, y) == 0
    true = oracle.gradient(params, x, y)["W"][0][0]
    assert true != 0
    assert oracle.ulps(closed_form.grad(params, x, y).W[0, 0], true, np.float32) < 16
