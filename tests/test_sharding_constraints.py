"""`spmd_axis_name`, as in `jax.vmap`: every function that takes a loss passes it to the loss's sharding constraints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxgrad as jg


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def loss_on(mesh):
    def loss(W, x):
        return jnp.tanh(lax.with_sharding_constraint(W @ x, NamedSharding(mesh, PartitionSpec(None)))).sum()

    return loss


def first(part):
    return next(iter({**part.rows, **part.sums}.values()))


def with_target(loss):
    return lambda W, x: loss(W, x)[None]


CALLS = {
    "per_example_grad": lambda f, W, X, n, _: jg.per_example_grad(f, spmd_axis_name=n)(W, X).norms(),
    "per_example_value_and_grad": lambda f, W, X, n, _: jg.per_example_value_and_grad(f, spmd_axis_name=n)(W, X)[0],
    "per_example_norms": lambda f, W, X, n, _: jg.per_example_norms(f, spmd_axis_name=n)(W, X)[1],
    "per_example_jacobian": lambda f, W, X, n, _: jg.per_example_jacobian(f, spmd_axis_name=n)(W, X).dot(W),
    "clipped_grad": lambda f, W, X, n, _: jg.clipped_grad(f, 1.0, spmd_axis_name=n)(W, X)[0],
    "clipped_grad, two passes": lambda f, W, X, n, _: jg.clipped_grad(f, 1.0, passes=2, spmd_axis_name=n)(W, X)[0],
    "explain": lambda f, W, X, n, _: jnp.asarray(jg.explain(f, spmd_axis_name=n)(W, X).batch_size),
    "check_gradient": lambda f, W, X, n, _: jnp.asarray(
        jg.check_gradient(jax.grad(f), f, W, X, spmd_axis_name=n, batched=False).agrees
    ),
    "check_gradient, reference": lambda f, W, X, n, _: jnp.asarray(
        jg.check_gradient(jax.vmap(jax.grad(f), (None, 0)), f, W, X, spmd_axis_name=n, batched=True).agrees
    ),
    "ntk": lambda f, W, X, n, _: jg.attribution.ntk(f, spmd_axis_name=n)(W, X),
    "ntk, outputs": lambda f, W, X, n, _: jg.attribution.ntk(with_target(f), spmd_axis_name=n)(W, X),
    "grand": lambda f, W, X, n, _: jg.attribution.grand(f, spmd_axis_name=n)([W], X),
    "tracin": lambda f, W, X, n, _: jg.attribution.tracin(f, spmd_axis_name=n)([W], [0.1], (X,), (X,)),
    "trak": lambda f, W, X, n, _: jg.attribution.trak(f, 1.0, spmd_axis_name=n)([W], (X,), (X,)),
    "per_example_projection": lambda f, W, X, n, _: jg.attribution.per_example_projection(
        f, jg.attribution.random_sides(W, jax.random.key(0), 4), spmd_axis_name=n
    )(W, X)[1],
    "gauss_newton": lambda f, W, X, n, _: jg.curvature.gauss_newton(
        with_target(f), jg.curvature.squared, spmd_axis_name=n
    )(W, X, jnp.zeros((len(X), 1))).rows.norms(),
    "gauss_newton_vector_product": lambda f, W, X, n, _: jg.curvature.gauss_newton_vector_product(
        with_target(f), jg.curvature.squared, spmd_axis_name=n
    )(W, W, X, jnp.zeros((len(X), 1))),
    "hessian_vector_product": lambda f, W, X, n, _: jg.curvature.hessian_vector_product(f, spmd_axis_name=n)(W, W, X),
    "kfac": lambda f, W, X, n, _: jg.curvature.kfac(f, spmd_axis_name=n)(W, X).left,
    "streams.norms": lambda f, W, X, n, _: first(jg.streams.norms(f, spmd_axis_name=n)(W, X)),
    "streams.second_moments": lambda f, W, X, n, _: first(jg.streams.second_moments(f, spmd_axis_name=n)(W, X)),
    "streams.projections": lambda f, W, X, n, _: first(
        jg.streams.projections(f, jg.attribution.random_sides(W, jax.random.key(0), 4), spmd_axis_name=n)(W, X)
    ),
    "streams.inner_products": lambda f, W, X, n, fixed: first(
        jg.streams.inner_products(f, fixed, spmd_axis_name=n)(W, X)
    ),
    "streams.gram": lambda f, W, X, n, _: jg.streams.gram(f, spmd_axis_name=n)(W, [(X,)]),
    "streams.influence": lambda f, W, X, n, _: jg.streams.influence(f, 1.0, spmd_axis_name=n)(W, [(X,)], [(X,)]),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_name_of_the_mesh_axis_reaches_the_constraint(name):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    loss, call = loss_on(mesh), CALLS[name]
    W, X = normal(0, 24, 16), jax.device_put(normal(1, 16, 16), NamedSharding(mesh, PartitionSpec("data")))
    fixed = jg.per_example_grad(lambda W, x: jnp.tanh(W @ x).sum())(W, X)
    expected = call(lambda W, x: jnp.tanh(W @ x).sum(), W, X, None, fixed)
    np.testing.assert_allclose(call(loss, W, X, "data", fixed), expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(Exception, match="not_an_axis"):
        call(loss, W, X, "not_an_axis", fixed)
