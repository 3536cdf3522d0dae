import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrad.network import Activation, Params, init_params, loss, margin, tanh


def test_init_params_has_the_shapes_dtypes_and_scales_it_says():
    for dtype in (jnp.float64, jnp.float32, jnp.bfloat16, jnp.float16):
        params = init_params(jax.random.key(0), inputs=300, hidden=200, dtype=dtype)
        assert (params.W.shape, params.b.shape, params.w.shape) == ((200, 300), (200,), (200,))
        assert {leaf.dtype for leaf in params} == {jnp.dtype(dtype)}
        np.testing.assert_allclose(np.var(np.asarray(params.W, float)), 1 / 300, rtol=0.05)
        np.testing.assert_allclose(np.var(np.asarray(params.w, float)), 1 / 200, rtol=0.3)
        assert not params.b.any()
    assert init_params(jax.random.key(0), 0, 0).W.shape == (0, 0)


@pytest.mark.usefixtures("plain_types")
def test_init_params_refuses_what_cannot_be():
    with pytest.raises(ValueError, match="expected sizes ≥ 0, got inputs=-1"):
        init_params(jax.random.key(0), -1, 3)
    with pytest.raises(TypeError, match="expected a floating dtype, got int32"):
        init_params(jax.random.key(0), 3, 3, jnp.int32)


def test_params_is_a_pytree_whose_paths_are_its_names():
    params = init_params(jax.random.key(0), 4, 3)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    assert paths == [".W", ".b", ".w"]
    assert isinstance(jax.tree.map(lambda a: 2 * a, params), Params)


def test_loss_is_the_formula_of_the_exercise():
    params = init_params(jax.random.key(0), 4, 3, jnp.float64)
    x = jax.random.normal(jax.random.key(1), (4,), jnp.float64)
    for y in (1.0, -1.0):
        for sigma, f in ((None, lambda z: 1 / (1 + np.exp(-z))), (tanh, np.tanh)):
            kwargs = {} if sigma is None else {"activation": sigma}
            m = np.asarray(params.w) @ f(np.asarray(params.W) @ np.asarray(x) + np.asarray(params.b))
            np.testing.assert_allclose(margin(params, x, **kwargs), m, rtol=1e-14)
            np.testing.assert_allclose(loss(params, x, y, **kwargs), np.log(1 + np.exp(-y * m)), rtol=1e-14)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("size", [1e4, 1e2, 30.0, 0.0])
def test_loss_is_finite_and_right_for_every_margin(dtype, size):
    identity = Activation.from_function(lambda z: z)
    params = Params(jnp.ones((1, 1), dtype), jnp.zeros(1, dtype), jnp.ones(1, dtype))
    for m in (size, -size):
        found = loss(params, jnp.array([m], dtype), jnp.array(1.0, dtype), activation=identity)
        assert found.dtype == dtype
        np.testing.assert_allclose(float(found), np.logaddexp(0, -float(jnp.array(m, dtype))), rtol=1e-2, atol=1e-7)


def test_a_batch_axis_comes_from_vmap_alone():
    params = init_params(jax.random.key(0), 4, 3, jnp.float64)
    X, Y = jax.random.normal(jax.random.key(1), (5, 4), jnp.float64), jnp.array([1.0, -1, 1, 1, -1])
    values = jax.jit(jax.vmap(loss, in_axes=(None, 0, 0)))(params, X, Y)
    np.testing.assert_allclose(values, [loss(params, x, y) for x, y in zip(X, Y, strict=True)], rtol=1e-14)
