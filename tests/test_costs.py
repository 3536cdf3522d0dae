"""clipped_grad(...).costs: operations against counts by hand, memory against the compiled programs."""

import jax
import jax.numpy as jnp
import pytest

import jaxgrad as jg

L, D, T, B = 5, 8, 16, 3
PRODUCT = 2 * B * T * D * D


def deep(layers, x):
    step = jax.checkpoint(lambda h, W: (h + jnp.tanh(h @ W), None))
    return (jax.lax.scan(step, x, layers)[0] ** 2).mean()


def shapes(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def test_operations_are_those_of_the_products_that_are_used():
    gradient = jg.clipped_grad(deep, 1.0)
    costs = gradient.costs(shapes(L, D, D), shapes(B, T, D))
    assert costs["plain gradient"].operations == 4 * L * PRODUCT  # forward, again for the checkpoint, and two backward
    assert costs["two passes"].operations >= 8 * L * PRODUCT - PRODUCT
    assert costs["plain gradient"].operations <= costs["one pass"].operations < costs["two passes"].operations
    lines = str(costs).splitlines()
    assert [line.split("  ")[0] for line in lines] == ["", "plain gradient", "one pass", "two passes"]


@pytest.mark.as_used
def test_memory_is_that_of_the_compiled_program():
    arguments = shapes(L, D, D), shapes(B, T, D)
    for name, passes in (("one pass", 1), ("two passes", 2)):
        gradient = jg.clipped_grad(deep, 1.0, passes=passes)
        found = jax.jit(gradient).lower(*arguments).compile().memory_analysis()
        cost = gradient.costs(*arguments)[name]
        assert cost.nbytes == found.temp_size_in_bytes + found.output_size_in_bytes


def test_masks_static_arguments_and_errors_are_those_of_a_call():
    def loss(w, x, kind):
        return jnp.sin(w @ x) if kind == "sin" else jnp.cos(w @ x)

    gradient = jg.clipped_grad(loss, 1.0, in_axes=(None, 0, None))
    costs = gradient.costs(jnp.ones(3), jnp.ones((4, 3)), "sin", mask=jnp.ones(4, bool))
    assert costs["plain gradient"].operations == 2 * (2 * 4 * 3)
    with pytest.raises(ValueError, match="clipped_grad: expected"):
        gradient.costs(jnp.ones(3), jnp.float32(1.0), "sin")
