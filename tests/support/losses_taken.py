"""A call of every public function that takes a loss of (W, x): (loss, W, X, mesh axis, fixed gradients) → result."""

import jax
import jax.numpy as jnp

import jaxgrad as jg


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
