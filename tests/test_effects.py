"""Effects inside a loss happen as often, and in the same order, as with vmap(jax.grad)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import io_callback

import jaxgrad as jg

W = np.random.default_rng(0).normal(size=(9, 7))
X = np.random.default_rng(1).normal(size=(3, 7))


def log(record):
    return lambda a: record.append(round(float(a), 6))


def in_the_loss(record, W, x):
    jax.debug.callback(log(record), x[0])
    return jnp.sum(jnp.tanh(W @ x))


def printed(record, W, x):
    jax.debug.print("{}", x[0])
    return jnp.sum(jnp.tanh(W @ x))


def ordered(record, W, x):
    io_callback(log(record), None, x[1])
    io_callback(log(record), None, x[0])
    return jnp.sum(jnp.tanh(W @ x))


def in_jit(record, W, x):
    @jax.jit
    def inner(W, x):
        jax.debug.callback(log(record), x[0])
        return W @ x

    return jnp.sum(jnp.tanh(inner(W, x)))


def in_remat(record, W, x):
    @jax.checkpoint
    def inner(W, x):
        jax.debug.callback(log(record), x[0])
        return jnp.tanh(W @ jnp.tanh(x))

    return jnp.sum(inner(W, x))


def in_cond(record, W, x):
    def branch(x):
        jax.debug.callback(log(record), x[0])
        return jnp.sum(jnp.tanh(W @ x))

    return lax.cond(x[0] > 0, branch, lambda x: jnp.sum(W @ x), x)


def in_scan(record, W, x):
    def step(h, t):
        jax.debug.callback(log(record), t)
        return jnp.tanh(W[:7] @ h + x), None

    return lax.scan(step, x, jnp.arange(3.0))[0].sum()


def in_the_backward_pass(record, W, x):
    @jax.custom_vjp
    def identity(h):
        return h

    def backward(_, g):
        jax.debug.callback(log(record), g[0])
        return (g,)

    identity.defvjp(lambda h: (h, None), backward)
    return jnp.sum(jnp.tanh(identity(W @ x)))


@pytest.mark.every(9)
@pytest.mark.parametrize(
    "loss", [in_the_loss, printed, ordered, in_jit, in_remat, in_cond, in_scan, in_the_backward_pass]
)
@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
def test_effects_are_those_of_vmap_of_grad(loss, jit, capfd):
    def run(transform):
        record = []
        gradient = transform(lambda W, x: loss(record, W, x))
        result = (jax.jit(gradient) if jit else gradient)(W, X)
        jax.block_until_ready(result)
        jax.effects_barrier()
        return result, record, capfd.readouterr().out

    expected, happened, out = run(lambda loss: jax.vmap(jax.grad(loss), in_axes=(None, 0)))
    found, record, out_ = run(lambda loss: lambda W, X: jg.per_example_grad(loss)(W, X).materialize())
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)
    assert out.splitlines() == out_.splitlines()
    assert happened == record
    assert happened or out
