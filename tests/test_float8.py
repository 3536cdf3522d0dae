"""Gradients that are float8 products, by dot_general, by a kernel, and in Flax's layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support.own_primitives import W, X, agrees, directly, how, kernel, normal

import jaxgrad as jg
from jaxgrad.per_example import check_rule

E4, E5 = jnp.float8_e4m3fn, jnp.float8_e5m2


def narrow(a, dtype):
    """(a in this dtype, its scale)."""
    scale = jnp.abs(a).max() / jnp.finfo(dtype).max.astype(a.dtype)
    return (a / scale).astype(dtype), scale


def narrow_layer(product):
    """A dense layer whose products are of float8, in both directions."""

    @jax.custom_vjp
    def dense(W, x):
        (a, s), (b, t) = narrow(x, E4), narrow(W, E4)
        return product(a, b, (1, 0)) * (s * t)

    def backward(kept, g):
        W, x = kept
        (a, s), (b, t), (c, u) = narrow(x, E4), narrow(W, E4), narrow(g, E5)
        return product(a, c, (0, 0)) * (s * u), product(c, b, (1, 1)) * (t * u)

    dense.defvjp(lambda W, x: (dense(W, x), (W, x)), backward)
    return dense


def dot(a, b, axes):
    return lax.dot_general(a, b, (((axes[0],), (axes[1],)), ((), ())), preferred_element_type=jnp.float32)


def narrow_kernel(a, b, axes):
    name = f"narrow_{axes[0]}{axes[1]}"
    wide = lambda a, b: dot(a.astype(jnp.float32), b.astype(jnp.float32), axes)  # noqa: E731
    return kernel(name, wide)(a, b)


@pytest.mark.parametrize("product", [dot, narrow_kernel])
def test_products_of_float8_stay_factored_and_are_accurate(product):
    dense = narrow_layer(product)

    def loss(W, x):
        return jnp.sin(dense(jnp.flip(W, 1) * 3, jnp.tanh(x))).sum()

    def equals(a, b, **params):
        return dot(a, b, (0, 0))

    with jg.register_rule("pallas_call", equals, name="narrow_00"):
        assert how(loss, W, X) == "factored"
        assert agrees(loss, W, X)
        g = jax.jit(jg.per_example_grad(loss))(W, X)
        expected = directly(loss, W, X)
        norms = np.sqrt((expected**2).sum((1, 2)))
        c = np.array([0.123, -1.7, 3.3e-3, 1e3])
        numbers = [
            (g.norms(), norms),
            (g.sum(), expected.sum(0)),
            (g.weighted_sum(jnp.asarray(c, jnp.float32)), np.einsum("b,bij->ij", c, expected)),
            (g.clip(0.7).sum(), (expected * np.minimum(1, 0.7 / norms)[:, None, None]).sum(0)),
            (g.gram(), np.einsum("bij,cij->bc", expected, expected)),
            (g.second_moment(), (expected**2).mean(0)),
            (g.dot(W), np.einsum("bij,ij->b", expected, W)),
            (g.scale(jnp.asarray(c, jnp.float32)).norms(), norms * np.abs(c)),
            (jg.per_example_norms(loss)(W, X)[1], norms),
        ]
    for found, wanted in numbers:
        np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5 * np.abs(wanted).max())
    with jg.register_rule("pallas_call", equals, name="narrow_00"):
        if product is narrow_kernel:
            assert check_rule(lambda a, b: product(a, b, (0, 0)), X[0].astype(E4), X[0, :, :20].astype(E5)).factored


@pytest.mark.parametrize("bias", [False, True])
def test_sums_and_products_of_float8_sides_are_not_rounded_to_float8(bias):
    """Operations after a float8 product, applied to its sides, are as accurate as the dtype of the product."""
    C = normal(5, 20, 7)

    @jax.custom_vjp
    def dense(W, x):
        return x @ W

    def backward(kept, g):
        W, x = kept
        return dot(x.astype(E4), g.astype(E5), (0, 0)), g @ W.T

    dense.defvjp(lambda W, x: (x @ W, (W, x)), backward)

    def loss(V, x):
        W = jnp.broadcast_to(V[:, None], (30, 20)) if bias else V @ C.T
        return jnp.sin(dense(W, x)).sum()

    V = normal(6, 30) if bias else normal(6, 30, 7)
    assert agrees(loss, V, X)
    np.testing.assert_allclose(
        jg.per_example_grad(loss)(V, X).materialize(), directly(loss, V, X), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", ["Fp8DirectDotGeneralOp", "Fp8Einsum"])
def test_float8_layers_of_flax_stay_factored(name):
    nn = pytest.importorskip("flax.linen")
    if name == "Fp8Einsum":
        layer = nn.fp8_ops.Fp8Einsum()
        arguments = lambda W, x: ("ti,io->to", x, W)  # noqa: E731
    else:
        layer = nn.fp8_ops.Fp8DirectDotGeneralOp()
        arguments = lambda W, x: (x, W, (((1,), (0,)), ((), ())))  # noqa: E731
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        state = layer.init(
            jax.random.key(0),
            *arguments(W, X[0]),
            **({"preferred_element_type": jnp.float32} if name == "Fp8Einsum" else {}),
        )

        def loss(W, x):
            options = {"preferred_element_type": jnp.float32} if name == "Fp8Einsum" else {}
            return jnp.sin(layer.apply(state, *arguments(W, x), **options)).sum()

        assert how(loss, W, X) == "factored"
        assert agrees(loss, W, X)
        norms = np.sqrt((directly(loss, W, X) ** 2).sum((1, 2)))
        np.testing.assert_allclose(jg.per_example_grad(loss)(W, X).norms(), norms, rtol=1e-5)
