"""`spmd_axis_name`, as in `jax.vmap`: every function that takes a loss passes it to the loss's sharding constraints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from support.losses_taken import CALLS

import jaxgrad as jg


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def loss_on(mesh):
    def loss(W, x):
        return jnp.tanh(lax.with_sharding_constraint(W @ x, NamedSharding(mesh, PartitionSpec(None)))).sum()

    return loss


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
