"""Parameters sharded over the axis of the examples (FSDP) on explicit meshes: every function that takes a loss."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, reshard
from support.losses_taken import CALLS

import jaxgrad as jg

EXPLICIT, AUTO = AxisType.Explicit, AxisType.Auto
MESHES = {  # the sizes of its axes, their type, and how W [24, 16] is sharded
    "rows, explicit": ((8,), EXPLICIT, ("data", None)),
    "columns, explicit": ((8,), EXPLICIT, (None, "data")),
    "rows, automatic": ((8,), AUTO, ("data", None)),
    "both axes, explicit": ((2, 4), EXPLICIT, ("data", "model")),
    "both axes, automatic": ((2, 4), AUTO, ("data", "model")),
}


@pytest.fixture(autouse=True)
def jax_defaults():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def model(W, x):
    """A model that is allowed on each of these meshes: it gathers the weight, as FSDP does."""
    mesh = jax.sharding.get_abstract_mesh()
    return jnp.tanh((W if mesh.empty else reshard(W, PartitionSpec(None, None))) @ x)


def loss(W, x):
    return model(W, x).sum()


def drawn():
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(24, 16)) / 4), jnp.asarray(rng.normal(size=(16, 16)))


def placed(name):
    sizes, kind, spec = MESHES[name]
    mesh = jax.make_mesh(sizes, ("data", "model")[: len(sizes)], axis_types=(kind,) * len(sizes))
    W, X = drawn()
    return (
        mesh,
        jax.device_put(W, NamedSharding(mesh, PartitionSpec(*spec))),
        jax.device_put(X, NamedSharding(mesh, PartitionSpec("data"))),
    )


@pytest.mark.every(12)
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", CALLS)
def test_every_function_that_takes_a_loss_gives_the_result_of_one_device(name, mesh):
    call, (W, X) = CALLS[name], drawn()
    fixed = jg.per_example_grad(loss)(W, X)
    expected = call(loss, W, X, None, fixed)
    device_mesh, W, X = placed(mesh)
    with jax.set_mesh(device_mesh):
        assert jax.grad(loss)(W, jnp.ones(16)).shape == W.shape
        fixed = jg.per_example_grad(loss)(W, X)
        found = call(loss, W, X, None, fixed)
    chex.assert_trees_all_close(np.asarray(found), np.asarray(expected), rtol=1e-10, atol=1e-10)


def energies(X):
    return X[:, 0] - X[:, 1]


SUMS = {
    "sum": lambda W, X: jg.per_example_grad(loss)(W, X).sum(),
    "mean": lambda W, X: jg.per_example_value_and_grad(loss)(W, X)[1].mean(),
    "weighted_sum": lambda W, X: (-jg.per_example_grad(loss)(W, X).clip(1.0)).weighted_sum(energies(X)),
    "second_moment": lambda W, X: jg.per_example_grad(loss)(W, X).second_moment(),
    "variance": lambda W, X: (jg.per_example_grad(loss)(W, X) + jg.per_example_grad(loss)(W, X)).variance(),
    "Jacobian": lambda W, X: jg.per_example_jacobian(model)(W, X).weighted_sum(jnp.ones((16, 24)) * X[:, :1]),
    "one pass": lambda W, X: jg.clipped_grad(loss, 1.0)(W, X)[0],
    "microbatches": lambda W, X: jg.clipped_grad(loss, 1.0, microbatch_size=4)(W, X)[0],
    "two passes": lambda W, X: jg.clipped_grad(loss, 1.0, passes=2)(W, X)[0],
    "by layer": lambda W, X: jg.clipped_grad(loss, jnp.full(24, 0.3))(W, X)[0],
    "hessian_vector_product": lambda W, X: jg.curvature.hessian_vector_product(loss)(W, W, X),
    "gauss_newton_vector_product": lambda W, X: jg.curvature.gauss_newton_vector_product(model, jg.curvature.squared)(
        W, W, X, jnp.zeros((16, 24))
    ),
    "natural_gradient": lambda W, X: jg.curvature.natural_gradient(jg.per_example_grad(loss)(W, X), 0.1),
    "natural_gradient, more rows": lambda W, X: jg.curvature.natural_gradient(
        jg.curvature.gauss_newton(model, jg.curvature.squared)(W, jnp.concatenate([X, 2 * X]), jnp.zeros((32, 24))), 0.1
    ),
    "fisher_vector_product": lambda W, X: jg.curvature.fisher_vector_product(jg.per_example_grad(loss)(W, X), W),
    "fisher_solve": lambda W, X: jg.curvature.fisher_solve(jg.per_example_grad(loss)(W, X), W, 0.1),
    "fisher_solve, more rows": lambda W, X: jg.curvature.fisher_solve(
        jg.curvature.gauss_newton(model, jg.curvature.squared)(W, jnp.concatenate([X, 2 * X]), jnp.zeros((32, 24))),
        W,
        0.1,
    ),
    "minsr": lambda W, X: jg.curvature.minsr(jg.curvature.log_derivatives(loss)(W, X), energies(X), 0.1),
    "minsr, blocks": lambda W, X: jg.curvature.minsr(
        jg.curvature.log_derivatives(loss, block_size=8)(W, X), energies(X), 0.1
    ),
}


@pytest.mark.every(9)
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", SUMS)
def test_a_sum_is_sharded_as_the_parameter_so_that_a_step_can_be_taken(name, mesh):
    function, (W, X) = SUMS[name], drawn()
    expected = jax.jit(function)(W, X)
    device_mesh, W, X = placed(mesh)
    with jax.set_mesh(device_mesh):
        step = jax.jit(lambda W, X: W - function(W, X))(W, X)
    np.testing.assert_allclose(drawn()[0] - step, expected, rtol=1e-9, atol=1e-9)
    assert MESHES[mesh][1] is AUTO or jax.typeof(step).sharding.spec == PartitionSpec(*MESHES[mesh][2])


@pytest.mark.parametrize("passes", [1, 2])
def test_a_parameter_that_is_a_numpy_array_is_replicated(passes):
    """Beside a sharded one, as a new parameter may be before the first step."""
    mesh, W, X = placed("rows, explicit")
    both = lambda params, x: loss(params["W"], x) + jnp.tanh(params["v"] @ x)  # noqa: E731
    v = np.linspace(-1, 1, 16)
    gradient = jax.jit(lambda W, X: jg.clipped_grad(both, 1.0, passes=passes)({"W": W, "v": v}, X)[0])
    expected = gradient(*drawn())
    with jax.set_mesh(mesh):
        found = gradient(W, X)
    chex.assert_trees_all_close(jax.tree.map(np.asarray, found), expected, rtol=1e-9, atol=1e-9)
    assert [jax.typeof(found[key]).sharding.spec[0] for key in ("W", "v")] == ["data", None]
