"""Rules commute with materialization: applied to a sum of products, maps and shared arrays, and then materialized, a
rule gives what the primitive gives on the materialized sum."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxgrad import _jax
from jaxgrad.per_example.interpreter import products, walk
from jaxgrad.per_example.interpreter.through import node_of, through
from jaxgrad.per_example.interpreter.values import Shared, Unevaluated, added, array_of, times_shared

SHAPE = (24, 20)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def product(seed):
    term = products.product(normal(seed, 24), normal(seed + 1, 20), [], [])
    return Unevaluated((term,), SHAPE, jnp.dtype(jnp.float64))


def mapped(seed):
    """A product times an array that all examples share, elementwise."""
    program = _jax.program_of(jax.make_jaxpr(lambda u, s: u * s)(jnp.zeros(SHAPE), jnp.zeros(SHAPE)))
    (result,) = through(program.jaxpr.eqns[0], [product(seed), Shared(normal(seed + 2, *SHAPE))])
    assert result.maps
    return result


SUMS = {
    "a product": lambda seed: product(seed),
    "a map": lambda seed: mapped(seed),
    "a product and a map": lambda seed: added(product(seed), mapped(seed + 3)),
    "a number times an array": lambda seed: times_shared(normal(seed, 1)[0], normal(seed + 1, *SHAPE)),
    "all of these": lambda seed: added(
        added(product(seed), mapped(seed + 3)), times_shared(normal(seed + 6, 1)[0], normal(seed + 7, *SHAPE))
    ),
}
ONE = {
    "neg": lambda u: -u,
    "transpose": lambda u: u.T,
    "reshape": lambda u: u.reshape(4, 6, 20),
    "reshape across": lambda u: u.reshape(32, 15),
    "expand": lambda u: u[:, None],
    "sum over rows": lambda u: u.sum(0),
    "sum over columns": lambda u: u.sum(1),
    "sum over all": lambda u: u.sum(),
    "reverse": lambda u: jnp.flip(u, 1),
    "slice": lambda u: u[3:17, 2:],
    "strided slice": lambda u: u[::2, 1::3],
    "split": lambda u: jnp.split(u, [5, 11])[1],
    "unstack": lambda u: jnp.unstack(u.reshape(2, 12, 20))[1],
    "pad": lambda u: jnp.pad(u, ((1, 2), (0, 3))),
    "cumsum": lambda u: jnp.cumsum(u, 1),
    "gather": lambda u: u[np.array([3, 3, 0, 23, 7])],
    "take": lambda u: jnp.take(u, np.arange(-2, 30), 0, mode="clip"),
    "masked": lambda u: jnp.where(np.arange(24)[:, None] > np.arange(20)[None], u, 0.0),
    "scaled": lambda u: u * np.linspace(-1, 1, 24)[:, None],
    "divided": lambda u: u / (1 + np.arange(480.0).reshape(SHAPE)),
    "matrix": lambda u: np.cos(np.arange(240.0).reshape(10, 24)) @ u,
    "scattered": lambda u: jnp.zeros((30, 20)).at[np.arange(24) % 7].add(u),
    "identities": lambda u: lax.optimization_barrier(jax.device_put(u, jax.devices()[0])),
    "fft": lambda u: jnp.fft.rfft(u, axis=0).imag,
    "twice": lambda u: jnp.cumsum(u, 0) * 2 - u,
}
# The second operand is an array that all examples share, or another sum.
TWO = {
    "concatenate": lambda u, v: jnp.concatenate([u, v, u], 1),
    "stack": lambda u, v: jnp.stack([v, u], 1),
    "add": lambda u, v: u + v,
    "sub": lambda u, v: u - v,
    "sub from": lambda u, v: v - u,
    "select": lambda u, v: jnp.where(np.arange(24)[:, None] > np.arange(20)[None], u, v),
    "select rows": lambda u, v: jnp.where(np.arange(24)[:, None] > 7, v, u),
    "update": lambda u, v: lax.dynamic_update_slice(v, u[:5, :7], (1, 2)),
    "scatter": lambda u, v: v.at[np.arange(24) % 5].add(u),
    "pad with": lambda u, v: lax.pad(u, v[0, 0], [(1, 0, 0), (0, 2, 1)]),
}


def commutes(function, values):
    arrays = [array_of(v) for v in values]
    program = _jax.program_of(jax.make_jaxpr(function)(*arrays))
    (result,) = walk.evaluate(program, values, [True], [True])
    if isinstance(result, Unevaluated):
        result = dataclasses.replace(result, as_written=None)
    np.testing.assert_allclose(array_of(result), function(*arrays), rtol=1e-12, atol=1e-12)


@pytest.fixture(autouse=True)
def jax_defaults():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.every(3)
@pytest.mark.parametrize("kind", SUMS)
@pytest.mark.parametrize("name", ONE)
def test_one_operand(name, kind):
    commutes(ONE[name], [SUMS[kind](1)])


@pytest.mark.every(2)
@pytest.mark.parametrize("other", ["shared", *SUMS])
@pytest.mark.parametrize("kind", SUMS)
@pytest.mark.parametrize("name", TWO)
def test_two_operands(name, kind, other):
    commutes(TWO[name], [SUMS[kind](1), Shared(normal(50, *SHAPE)) if other == "shared" else SUMS[other](30)])


def test_a_gather_that_fills_with_a_number_is_not_a_map():
    commutes(lambda u: jnp.take(u, np.array([1, 99]), 0, mode="fill", fill_value=0.5), [mapped(1)])


def test_a_node_stands_for_the_whole_sum():
    value = SUMS["all of these"](1)
    whole = Unevaluated((), value.shape, value.dtype, (node_of(value),))
    np.testing.assert_allclose(array_of(whole), array_of(value), rtol=1e-12)
