"""How the transforms are called: arguments and results of every sort, held against jax.vmap(jax.value_and_grad(…))."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import quick_jit
from test_transform import many, many_data, mlp, mlp_data

import jaxgrad as jg

B = 5
W, X = jnp.arange(1.0, 4.0), jnp.arange(3.0 * B).reshape(B, 3) / 7
JIT = pytest.mark.parametrize("jit", [lambda f: f, quick_jit], ids=["eager", "jit"])


def same(found, expected, rtol=0.0):
    """Equal trees of arrays: values, shapes, dtypes, and whether these are weak."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert isinstance(a, jax.Array)
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert a.weak_type == b.weak_type
        np.testing.assert_allclose(a, b, rtol=rtol)


# --- Results that are not gradients ----------------------------------------------------------------------------------

VALUES = {
    "sine": lambda w, x: jnp.sin(w @ x),
    "a constant": lambda w, x: jnp.float32(3),
    "a number": lambda w, x: 3.0,
    "zero": lambda w, x: jnp.zeros(()),
    "the number 0": lambda w, x: 0.0,
    "its own first entry": lambda w, x: w[0],
}
AUX = {
    "an axis more": lambda w, x: x[None],
    "zeros": lambda w, x: jnp.zeros(3),
    "repeated": lambda w, x: jnp.broadcast_to(w * x, (2, 3)),
    "a parameter repeated": lambda w, x: jnp.broadcast_to(w[0], (3, 4)),
    "a product": lambda w, x: jnp.outer(w, x),
    "the gradient": jax.grad(lambda w, x: jnp.sin(w @ x)),
    "the parameter": lambda w, x: w,
    "numbers": lambda w, x: (3, 2.5, True, 1j, 0, 0.0, False, 0j),
    "weak": lambda w, x: (jnp.asarray(2.0), jnp.broadcast_to(jnp.asarray(0.0), (2,)), jnp.asarray(0)),
    "NumPy": lambda w, x: (np.float32(3), np.float32(0), np.arange(3), np.zeros((2, 1), np.int8)),
    "other dtypes": lambda w, x: (jnp.zeros((), jnp.bfloat16), jnp.arange(2), x > 1, x.astype(jnp.float16)[None]),
    "a tree": lambda w, x: {"a": x[None], "b": [jnp.zeros(3), None, 2], "key": jax.random.key(0), "none": ()},
}


@JIT
@pytest.mark.parametrize("value", VALUES)
def test_results_that_are_not_gradients_are_the_arrays_that_jax_returns(value, jit):
    def loss(w, x):
        return VALUES[value](w, x), {name: aux(w, x) for name, aux in AUX.items()}

    (values, extra), G = jit(jax.vmap(jax.value_and_grad(loss, has_aux=True), (None, 0)))(W, X)
    g, found = jit(jg.per_example_grad(loss, has_aux=True))(W, X)
    same(found, extra)
    same(g.materialize(), G, 1e-12)
    found, g = jit(jg.per_example_value_and_grad(loss, has_aux=True))(W, X)
    same(found, (values, extra))
    same(g.sum(), G.sum(0), 1e-12)
    for size in (None, 2):
        _, info = jit(jg.clipped_grad(loss, 1.0, has_aux=True, microbatch_size=size))(W, X)
        same((info.values, info.aux), (values, extra))


# --- What leaves a transform -----------------------------------------------------------------------------------------

CALLS = {
    "per_example_grad": jg.per_example_grad,
    "per_example_value_and_grad": jg.per_example_value_and_grad,
    "clipped_grad": lambda loss: jg.clipped_grad(loss, 1.0),
    "in microbatches": lambda loss: jg.clipped_grad(loss, 1.0, microbatch_size=2),
    "norms": lambda loss: lambda *args: jg.per_example_grad(loss)(*args).norms(),
    "explain": jg.explain,
}


@pytest.mark.parametrize("name", CALLS)
def test_no_tracer_leaks(name):
    with jax.checking_leaks():
        CALLS[name](mlp)(*mlp_data())
        if name == "explain":
            CALLS[name](many)(*many_data())
        else:
            jax.eval_shape(CALLS[name](many), *many_data())
