"""Gaussian processes of gpjax."""

from typing import Any

import equinox as eqx
import gpjax
import jax
import jax.numpy as jnp

from benchmarks.models import Draw
from benchmarks.third_party.built import Built


def sparse_process(dtype: Any, B: int = 16, D: int = 4, inducing: int = 64) -> Built:
    """The evidence lower bound of gpjax's sparse variational process."""
    draw = Draw()
    prior = gpjax.gps.Prior(
        mean_function=gpjax.mean_functions.Constant(), kernel=gpjax.kernels.RBF(lengthscale=jnp.ones(D))
    )
    module = gpjax.variational_families.VariationalGaussian(
        model=prior * gpjax.likelihoods.Bernoulli(), inducing_inputs=draw.data(inducing, D)
    )
    params, static = eqx.partition(module, eqx.is_inexact_array)

    def loss(params: Any, x: Any, y: Any) -> jax.Array:
        data = gpjax.Dataset(X=x[None], y=y[None, None])
        return -gpjax.objectives.elbo(eqx.combine(params, static), data)

    return Built(loss, params, (draw.data(B, D), draw.ids(2, B).astype(jnp.float32)))


def deep_kernel(dtype: Any, B: int = 8, n: int = 24, D: int = 16) -> Built:
    """The marginal likelihood of one data set per example, under a process whose kernel acts on a network's outputs."""
    draw = Draw()
    network = eqx.nn.MLP(D, 4, 128, 2, jax.nn.relu, key=jax.random.key(0))
    params, static = eqx.partition((network, gpjax.kernels.RBF()), eqx.is_inexact_array)

    def loss(params: Any, x: Any, y: Any) -> jax.Array:
        network, kernel = eqx.combine(params, static)
        prior = gpjax.gps.Prior(mean_function=gpjax.mean_functions.Zero(), kernel=kernel)
        posterior = prior * gpjax.likelihoods.Gaussian()
        return -gpjax.objectives.conjugate_mll(posterior, gpjax.Dataset(X=jax.vmap(network)(x), y=y[:, None]))

    return Built(loss, params, (draw.data(B, n, D), draw.data(B, n)))
