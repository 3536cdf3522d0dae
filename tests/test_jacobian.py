"""The gradients of all outputs of a model, against `jax.vmap(jax.jacrev)`."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from support.quick import quick_jit

import jaxgrad as jg
from benchmarks import roofline


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def dense(params, x):
    return params["V"] @ jnp.tanh(params["W"] @ x + params["b"])


def image(params, x):
    h = jnp.tanh(jax.lax.conv(x[None], params["K"], (1, 1), "SAME"))
    return params["V"] @ jnp.tanh(jax.lax.conv(h, params["L"], (1, 1), "SAME")).mean((0, 2, 3))


def table(params, ids):
    return params["V"] @ jnp.tanh(params["E"][ids]).mean(0) + (params["E"] ** 2).sum()


def tree_of_outputs(params, x):
    h = jnp.tanh(x @ params["W"].T + params["b"][None])
    return {"mean": h.mean(0) @ params["V"].T, "total": h.sum()}


def normalized(params, x):
    W = params["W"] / jnp.sqrt((params["W"] ** 2).sum(1, keepdims=True))
    return params["V"] @ jnp.tanh(W @ x)


def loop(params, x):
    def step(h, x):
        h = jnp.tanh(params["W"] @ x + params["V"] @ h)
        return h, h

    return jax.lax.scan(step, jnp.zeros(30), x)[1].sum(0)


def rematerialized(params, x):
    return params["V"] @ jax.checkpoint(lambda W, x: jnp.tanh(W @ x))(params["W"], x)


WEIGHTS = {"W": normal(1, 30, 20), "b": normal(2, 30), "V": normal(3, 10, 30)}
MODELS = {
    "dense": (dense, WEIGHTS, normal(4, 6, 20)),
    "image": (
        image,
        {"K": normal(1, 8, 3, 3, 3), "L": normal(2, 16, 8, 3, 3), "V": normal(3, 10, 16), "unused": normal(5, 3, 4)},
        normal(4, 6, 3, 9, 9),
    ),
    "large image": (
        image,
        {"K": normal(1, 8, 3, 7, 7), "L": normal(2, 96, 8, 7, 7), "V": normal(3, 10, 96)},
        normal(4, 3, 3, 5, 5),
    ),
    "table": (table, {"E": normal(1, 50, 30), "V": WEIGHTS["V"]}, jnp.arange(30).reshape(6, 5) * 7 % 50),
    "tree of outputs": (tree_of_outputs, WEIGHTS, normal(4, 6, 7, 20)),
    "normalized": (normalized, WEIGHTS, normal(4, 6, 20)),
    "loop": (loop, {"W": normal(1, 30, 20), "V": normal(3, 30, 30) / 6}, normal(4, 6, 5, 20)),
    "rematerialized": (rematerialized, WEIGHTS, normal(4, 6, 20)),
    "one example": (dense, WEIGHTS, normal(4, 1, 20)),
}


@pytest.mark.every(11)
@pytest.mark.parametrize(("name", "jit"), [*((name, True) for name in MODELS), ("dense", False)])
def test_agrees_with_the_materialized_jacobian(name, jit):
    model, params, x = MODELS[name]
    direction = jax.tree.map(jnp.cos, params)

    def results(params, x):
        J = jg.per_example_jacobian(model)(params, x)
        other = jg.per_example_jacobian(model)(params, x[::-1])
        diagonals = J.diagonal_gram(), J.diagonal_gram(other)
        return J, J.materialize(), J.norms(), J.gram(), diagonals, J.dot(direction), J.rows(), J.rows().materialize()

    @quick_jit
    def expected(params, x):
        rows = jax.vmap(jax.jacrev(lambda params, x: ravel_pytree(model(params, x))[0]), (None, 0))(params, x)
        flat = jnp.concatenate([a.reshape(len(x), a.shape[1], -1) for a in jax.tree.leaves(rows)], 2)
        return rows, jnp.linalg.norm(flat, axis=2), jnp.einsum("bop,cqp->bcoq", flat, flat), flat

    found = (quick_jit(results) if jit else results)(params, x)
    J, materialized, norms, gram, diagonals, dot, rows, flattened = found
    want, lengths, kernel, flat = expected(params, x)
    B, O, scale = J.batch_size, J.outputs, float(jnp.abs(flat).max())  # noqa: E741
    chex.assert_trees_all_close(materialized, want, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(norms, lengths, rtol=1e-9, atol=1e-12 * scale)
    np.testing.assert_allclose(gram, kernel, rtol=1e-9, atol=1e-9 * scale**2)
    for found, second in zip(diagonals, (flat, flat[::-1]), strict=True):
        diagonal = jnp.einsum("bop,cop->bco", flat, second)
        np.testing.assert_allclose(found, diagonal, rtol=1e-9, atol=1e-9 * scale**2)
    np.testing.assert_allclose(dot, flat @ ravel_pytree(direction)[0], rtol=1e-9, atol=1e-10 * scale)
    assert rows.batch_size == B * O
    chex.assert_trees_all_close(
        flattened, jax.tree.map(lambda a: a.reshape(B * O, *a.shape[2:]), want), rtol=1e-9, atol=1e-11
    )


def test_what_all_outputs_share_is_computed_and_held_once():
    model, params, x = MODELS["dense"]
    J = jg.per_example_jacobian(model)(params, x)
    B, O = 6, 10  # noqa: E741
    numbers = B * (O * 30 + 20) + B * O * 30 + B * 30 + 3 * B  # W, b and V, whose rows are numbered, and the weights
    assert J.nbytes == numbers * 8 + B * O * 4

    def counted(params, x):
        jax.debug.callback(lambda _: passes.append(1), x[0])
        return dense(params, x)

    passes = []
    jg.per_example_jacobian(counted)(params, x).norms()
    jax.effects_barrier()
    assert len(passes) == B


@pytest.mark.every(0)
def test_the_kernel_of_two_batches_and_of_other_numbers_of_outputs():
    params = {"W": normal(1, 30, 20)}
    model = lambda params, x: jnp.tanh(x @ params["W"].T).sum(1)  # noqa: E731
    x, y = normal(2, 3, 4, 20), normal(3, 5, 2, 20)
    jacobian = jg.per_example_jacobian(model)
    got = jacobian(params, x).gram(jacobian(params, y))
    J, K = (jax.vmap(jax.jacrev(model), (None, 0))(params, a)["W"].reshape(len(a), -1, 600) for a in (x, y))
    np.testing.assert_allclose(got, jnp.einsum("bop,cqp->bcoq", J, K), rtol=1e-10)


def test_it_is_a_pytree_for_jit_and_vmap():
    J = jg.per_example_jacobian(dense)(WEIGHTS, MODELS["dense"][2])
    np.testing.assert_allclose(jax.jit(lambda J: J.gram())(J), J.gram(), rtol=1e-12)
    assert jax.tree.map(lambda a: a, J).outputs == 10


def test_outputs_that_cannot_be_differentiated_are_named():
    for model in (lambda W, x: jnp.argmax(W @ x), lambda W, x: None, lambda W, x: (W @ x).astype(complex)):
        with pytest.raises(TypeError, match="per_example_jacobian: expected a function that returns real floating"):
            jg.per_example_jacobian(model)(normal(1, 5, 3), normal(2, 4, 3))


def test_the_wide_mlp_s_kernel_holds_less_than_its_rows():
    params = [normal(1, 64, 48), normal(2, 64, 64), normal(3, 10, 64)]

    def model(params, x):
        for W in params[:-1]:
            x = jnp.tanh(W @ x)
        return params[-1] @ x

    x = normal(4, 32, 48)
    memory = lambda f: jax.jit(f).lower(params, x).compile().memory_analysis()  # noqa: E731
    dense = memory(lambda params, x: jax.vmap(jax.jacrev(model), (None, 0))(params, x)).output_size_in_bytes
    assert memory(jg.attribution.ntk(model)).temp_size_in_bytes < dense / 2


def test_the_kernel_of_a_convolutional_network_takes_no_more_memory_than_its_rows():
    sizes = [(16, 3), (32, 16), (64, 32), (64, 64)]
    params = {"conv": [normal(k, *size, 3, 3) for k, size in enumerate(sizes)], "V": normal(9, 10, 64)}

    def model(params, x):
        h = x[None]
        for W in params["conv"]:
            h = jax.nn.relu(jax.lax.conv(h, W, (1, 1), "SAME"))
        return params["V"] @ h.mean((0, 2, 3))

    def rows(params, x):
        J = jax.vmap(jax.jacrev(model), (None, 0))(params, x)
        flat = jnp.concatenate([a.reshape(len(x) * 10, -1) for a in jax.tree.leaves(J)], 1)
        return flat @ flat.T

    x = normal(10, 64, 3, 16, 16)
    memory = [
        jax.jit(f).lower(params, x).compile().memory_analysis().temp_size_in_bytes
        for f in (jg.attribution.ntk(model), rows)
    ]
    assert memory[0] <= memory[1]


@pytest.mark.every(0)
@pytest.mark.parametrize(("dtype", "rounding"), [(jnp.float32, 2.0**-24), (jnp.bfloat16, 2.0**-9)])
@pytest.mark.parametrize("B", [64, 256])
@pytest.mark.as_used
def test_norms_and_kernels_under_jit_at_real_sizes_are_as_accurate_as_their_dtype(dtype, rounding, B):
    """The factors are rounded to the dtype; everything computed from them is summed in float32."""
    params, x = {"W": normal(1, 128, 64) / 8, "b": normal(2, 128), "V": normal(3, 10, 128) / 8}, normal(4, B, 64)
    with jax.enable_x64(False):
        narrow = jax.tree.map(lambda a: jnp.asarray(a, dtype), (params, x))
        J = jax.jit(jg.per_example_jacobian(dense))(*narrow)
        norms, kernel, diagonal = jax.jit(lambda J: (J.norms(), J.gram(), J.diagonal_gram()))(J)
        rows = jax.tree.map(lambda a: np.asarray(a, np.float64), J.rows().factors)
    assert norms.dtype == kernel.dtype == diagonal.dtype == jnp.float32
    wide = jg.PerExampleGrads(jax.tree.map(jnp.asarray, rows))  # the same factors, everything else in float64
    np.testing.assert_allclose(norms.reshape(-1), wide.norms(), rtol=200 * 2.0**-24)
    scale = np.asarray(wide.norms())
    off = np.abs(np.asarray(kernel).transpose(0, 2, 1, 3).reshape(B * 10, B * 10) - np.asarray(wide.gram()))
    assert (off <= 200 * 2.0**-24 * scale[:, None] * scale[None, :]).all()
    lengths = scale.reshape(B, 10)
    off = np.abs(np.asarray(diagonal) - np.einsum("bcoo->bco", np.asarray(kernel)))
    assert (off <= 200 * 2.0**-24 * lengths[:, None] * lengths[None, :]).all()
    exact = jg.per_example_jacobian(dense)(params, x).norms()
    np.testing.assert_allclose(norms, exact, rtol=64 * rounding)


def test_the_work_in_the_activations_does_not_grow_with_the_outputs():
    """Twice as many inputs add as many operations for 2 outputs as for 12, which have 36 times as many pairs."""

    def operations(inputs, outputs):
        params = {"in": jnp.zeros((inputs, 16)), "out": jnp.zeros((16, outputs))}
        kernel = jg.attribution.ntk(lambda p, x: jnp.tanh(x @ p["in"]) @ p["out"])
        return roofline.product_operations(kernel, params, jnp.zeros((8, inputs)))

    few, many = (operations(256, n) - operations(128, n) for n in (2, 12))
    assert few == many > 0
