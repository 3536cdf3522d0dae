"""Kronecker blocks of a weight and its bias: against the dense algebra in float64, and which pairs are found."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support.dense import assert_close
from support.quick import quick_jit

import jaxgrad as jg
from jaxgrad import curvature

NHWC = ("NHWC", "HWIO", "NHWC")
RNG = np.random.default_rng(0)
B = 24  # more than a block has rows or columns, so that the eigenvectors are unique


def draw(*shape):
    return RNG.normal(size=shape) / np.sqrt(shape[-1])


# --- Against a weight whose last column is the bias ------------------------------------------------------------------


def of_columns(weights, x):
    """[out, in + 1] times (x, 1)."""
    return weights @ jnp.append(x, jnp.ones(1, x.dtype))


def columns(p, x, label):
    return curvature.softmax.value(of_columns(p["out"], jnp.tanh(of_columns(p["in"], x))), label)


def columns_over_positions(p, x, label):
    """x [T, D]; the hidden layer is used at every position, twice, in a scan."""

    def layer(h, weights):
        return jnp.tanh(jax.vmap(lambda h: of_columns(weights, h))(h)), None

    h = jax.vmap(lambda x: of_columns(p["in"], x))(x)
    h, _ = lax.scan(jax.checkpoint(layer), jnp.tanh(h), p["stack"])
    return curvature.softmax.value(of_columns(p["out"], h.mean(0)), label)


def left(p, x, label):
    """W @ x + b."""
    return curvature.softmax.value(p["out"]["W"] @ jnp.tanh(p["in"]["W"] @ x + p["in"]["b"]) + p["out"]["b"], label)


def right(p, x, label):
    """x @ W + b."""
    return curvature.softmax.value(jnp.tanh(x @ p["in"]["W"] + p["in"]["b"]) @ p["out"]["W"] + p["out"]["b"], label)


def over_positions(p, x, label, each=False):
    """x @ W + b at every position; with `each`, W.T @ x + b under vmap."""

    def dense(p, h):
        return jax.vmap(lambda h: p["W"].T @ h + p["b"])(h) if each else h @ p["W"] + p["b"][None]

    def layer(h, p):
        return jnp.tanh(dense(p, h)), None

    h, _ = lax.scan(jax.checkpoint(layer), jnp.tanh(dense(p["in"], x)), p["stack"])
    return curvature.softmax.value(h.mean(0) @ p["out"]["W"] + p["out"]["b"], label)


FLAT = {"in": draw(7, 6), "out": draw(3, 8)}
DEEP = {"in": draw(7, 6), "stack": draw(2, 7, 8), "out": draw(3, 8)}
X, SEQUENCES, LABELS = draw(B, 5), draw(B, 30, 5), np.arange(B) % 3
CASES = {  # name: (the loss of columns, their weights, the loss of pairs, whether its weights are transposed, inputs)
    "W @ x": (columns, FLAT, left, False, X),
    "x @ W": (columns, FLAT, right, True, X),
    "positions": (columns_over_positions, DEEP, over_positions, True, SEQUENCES),
    "vmap": (columns_over_positions, DEEP, functools.partial(over_positions, each=True), True, SEQUENCES),
}


def pair(weights, transposed):
    W = weights[..., :-1]
    return {"W": np.swapaxes(W, -1, -2) if transposed else W, "b": weights[..., -1]}


def column(pair, transposed):
    W = np.asarray(pair["W"])
    return np.concatenate([np.swapaxes(W, -1, -2) if transposed else W, np.asarray(pair["b"])[..., None]], -1)


@pytest.mark.parametrize("shared", ["expand", "reduce"])
@pytest.mark.parametrize("name", CASES)
def test_a_bias_is_a_column_of_its_weight(name, shared):
    loss, weights, loss_of_pairs, transposed, x = CASES[name]
    apart = functools.partial(pair, transposed=transposed)
    direction = jax.tree.map(lambda a: draw(*a.shape), weights)

    @functools.partial(quick_jit, static_argnums=0)
    def run(loss, params, v):
        factors = curvature.kfac(loss, shared=shared)(params, x, LABELS)
        F = curvature.ekfac(factors, jg.per_example_grad(loss)(params, x, LABELS))
        solved = F.solve(v, curvature.relative(0.01))
        return factors, F.trace(), F.product(v), solved

    one = run(loss, weights, direction)
    two = run(loss_of_pairs, jax.tree.map(apart, weights), jax.tree.map(apart, direction))
    assert_close(two[1], one[1])
    for layer, f in one[0].items():
        f_ = two[0][layer]["W"]
        assert f_.bias.path == f"['{layer}']['b']"
        assert two[0][layer]["b"] is None
        assert_close(f_.left, f.left)
        assert_close(f_.right, f.right)
        for found, expected in zip(two[2:], one[2:], strict=True):
            assert_close(column(found[layer], transposed), expected[layer], 1e-8)
        v, v_ = direction[layer], apart(direction[layer])
        W, b = f_.solve((v_["W"], v_["b"]), 0.1)
        assert_close(column({"W": W, "b": b}, transposed), f.solve(v, 0.1), 1e-8)


def in_basis(block, W, b):
    """The mean squares of gradients [B, *shape] of a weight and its bias, in the basis of an EK-FAC block."""
    parts = block.layout.to_matrix(jnp.asarray(W)), block.bias.layout.to_matrix(jnp.asarray(b))
    G = np.concatenate(parts, -1)
    turned = np.einsum("gfa,bgfk,gkc->bgac", *(np.asarray(a, np.float64) for a in (block.left, G, block.right)))
    return (turned**2).mean(0)


@pytest.mark.parametrize("T", [1, 2, 30])
def test_the_gradients_may_be_those_of_another_loss(T):
    params, x = {"W": draw(8, 9), "b": draw(8)}, draw(B, T, 9)
    loss = lambda p, x: jnp.tanh(x @ p["W"].T + p["b"][None]).sum()  # noqa: E731
    other = lambda p, x: jnp.sin(x @ p["W"].T).sum() + (jnp.cos(p["b"]) * jnp.sin(x[0, :8])).sum()  # noqa: E731
    factors = quick_jit(curvature.kfac(loss))(params, x)
    F = quick_jit(curvature.ekfac)(factors, quick_jit(jg.per_example_grad(other))(params, x))
    G = quick_jit(jax.vmap(jax.grad(other), (None, 0)))(params, x)
    assert_close(F.blocks["W"].values, in_basis(F.blocks["W"], G["W"], G["b"]))


@pytest.mark.as_used
def test_small_eigenvalues_keep_their_digits_where_a_bias_cancels_its_weight():
    """Inputs that hardly differ from their mean: along (mean, -1) the gradients are small, and those of W and b not."""
    rng = np.random.default_rng(1)
    x = np.float32(4 + 0.01 * rng.normal(size=(256, 20)))
    params = {"W": np.float32(draw(30, 20)), "b": np.float32(draw(30))}
    loss = lambda p, x: jnp.tanh(p["W"] @ x + p["b"]).sum()  # noqa: E731
    factors, g = jax.jit(curvature.kfac(loss))(params, x), jax.jit(jg.per_example_grad(loss))(params, x)
    block = jax.jit(curvature.ekfac)(factors, g).blocks["W"]
    delta = np.float64(g.factors["b"][0].left)
    expected = in_basis(block, delta[:, :, None] * np.float64(x)[:, None], delta)
    assert block.values.dtype == jnp.float32
    assert (block.values >= 0).all()
    error = np.abs(np.float64(block.values) - expected)
    assert (error <= 1e-3 * expected + (16 * 2.0**-24) ** 2 * expected.max()).all()
    assert expected.min() < 1e-6 * expected.max()


# --- Convolutions, against the moments of cotangents and patches -----------------------------------------------------

IMAGES = RNG.normal(size=(B, 6, 5, 2))
KERNELS = {
    "NHWC": {"K": draw(3, 2, 2, 4), "b": draw(4), "V": draw(3, 4), "c": draw(3)},
    "NCHW": {"K": draw(4, 2, 3, 2), "b": draw(4, 1, 1), "V": draw(3, 4), "c": draw(3)},
}


def convolved(layout, p, image, label, tap):
    """A convolution with a bias, to whose outputs [6, 5, 4] `tap` is added, and a dense layer."""
    if layout == "NHWC":
        h = lax.conv_general_dilated(image[None], p["K"], (1, 1), "SAME", dimension_numbers=NHWC)[0] + p["b"]
    else:
        h = lax.conv_general_dilated(image.transpose(2, 0, 1)[None], p["K"], (1, 1), "SAME")[0] + p["b"]
        h = h.transpose(1, 2, 0)
    return curvature.softmax.value(p["V"] @ jnp.tanh(h + tap).mean((0, 1)) + p["c"], label)


def patches(layout):
    """[B, 30, K], in the order of the kernel's entries of one output."""
    padded = np.pad(IMAGES, [(0, 0), (1, 1), (0, 1), (0, 0)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 2), (1, 2))  # [B, 6, 5, N, 3, 2]
    order = (0, 1, 2, 4, 5, 3) if layout == "NHWC" else (0, 1, 2, 3, 4, 5)
    return windows.transpose(order).reshape(B, 30, 12)


@pytest.fixture(name="any_rank")
def fixture_any_rank():
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.usefixtures("any_rank")
@pytest.mark.parametrize("shared", ["expand", "reduce"])
@pytest.mark.parametrize("layout", KERNELS)
def test_a_convolution_and_its_bias_are_one_block(layout, shared, monkeypatch):
    params = KERNELS[layout]
    loss = lambda p, image, label: convolved(layout, p, image, label, np.zeros((6, 5, 4)))  # noqa: E731
    taps = functools.partial(convolved, layout, params)
    delta = quick_jit(jax.vmap(jax.grad(taps, 2), (0, 0, None)))(IMAGES, LABELS, np.zeros((6, 5, 4)))
    delta, a = np.asarray(delta).reshape(B, 30, 4), np.pad(patches(layout), [(0, 0), (0, 0), (0, 1)], constant_values=1)
    G = np.einsum("btf,btk->bfk", delta, a)
    T = 30
    if shared == "reduce":
        delta, a, T = delta.sum(1, keepdims=True), a.mean(1, keepdims=True), 1
    factors = quick_jit(curvature.kfac(loss, shared=shared))(params, IMAGES, LABELS)
    assert (factors["K"].bias.path, factors["V"].bias.path) == ("['b']", "['c']")
    L, R = np.einsum("btf,bte->fe", delta, delta) / B, np.einsum("btk,btl->kl", a, a) / B / T
    if layout == "NHWC":  # here the patches have their entries in the order of the factors
        assert_close(factors["K"].right[0], R)
    assert_close(factors["K"].left[0], L)
    assert_close(np.linalg.eigvalsh(factors["K"].right[0]), np.linalg.eigvalsh(R))
    monkeypatch.setattr(sys.modules["jaxgrad.curvature.ekfac"], "chunk_size", lambda each, count: 2)
    v = jax.tree.map(lambda a: draw(*a.shape), params)
    g = quick_jit(jg.per_example_grad(loss))(params, IMAGES, LABELS)
    F = quick_jit(curvature.ekfac)(factors, g)
    solution = quick_jit(F.solve)(v, 0.05)
    kernel = lambda a: np.asarray(a).reshape(12, 4).T if layout == "NHWC" else np.asarray(a).reshape(4, 12)  # noqa: E731
    matrix = lambda v: np.append(kernel(v["K"]), np.asarray(v["b"]).reshape(4, 1), 1)  # noqa: E731
    U = np.kron(np.linalg.eigh(L)[1], np.linalg.eigh(R)[1])
    values = ((G.reshape(B, -1) @ U) ** 2).mean(0)
    dense = (U * values) @ U.T + 0.05 * np.eye(len(U))
    assert_close(matrix(solution), np.linalg.solve(dense, matrix(v).ravel()).reshape(4, 13), 1e-8)


# --- Which pairs are found -------------------------------------------------------------------------------------------


def dense(p, x):
    return x @ p["W"] + p["b"]


def heads(p, x):
    return jnp.einsum("td,dhf->thf", x, p["W"]) + p["b"]


def in_two_places(p, x):
    return dense(p, jnp.tanh(dense(p, x)))


def with_two_weights(p, x):
    return x @ p["first"]["W"] + x[::-1] @ p["second"]["W"] + p["second"]["b"]


def with_groups(p, x):
    return lax.conv_general_dilated(x.T[None], p["W"], (1,), "SAME", feature_group_count=2) + p["b"]


def in_bfloat16(p, x):
    return jnp.tanh(dense(jax.tree.map(lambda a: a.astype(jnp.bfloat16), p), x.astype(jnp.bfloat16)))


W, BIAS, PLACES = draw(4, 4), draw(4), draw(9, 4)
PAIRS = {  # name: (the function before tanh and a sum, parameters, {the path of a weight: that of its bias})
    "dense": (dense, {"W": W, "b": BIAS}, {"['W']": "['b']"}),
    "heads": (heads, {"W": draw(4, 2, 3), "b": draw(2, 3)}, {"['W']": "['b']"}),
    "axes of size 1": (dense, {"W": W, "b": draw(1, 4)}, {"['W']": "['b']"}),
    "one output": (dense, {"W": draw(4, 2)[:, :1], "b": draw(1)}, {}),
    "in two places": (in_two_places, {"W": W, "b": BIAS}, {"['W']": "['b']"}),
    "cast": (in_bfloat16, {"W": W, "b": BIAS}, {"['W']": "['b']"}),
    "the nearest path": (
        with_two_weights,
        {"first": {"W": W}, "second": {"W": W[:, ::-1], "b": BIAS}},
        {"['first']['W']": None, "['second']['W']": "['second']['b']"},
    ),
    "scaled weight": (lambda p, x: x @ p["W"] / 2 + p["b"], {"W": W, "b": BIAS}, {"['W']": None}),
    "bias used elsewhere": (
        lambda p, x: jnp.tanh(x @ p["W"] + p["b"]) * p["b"],
        {"W": W, "b": BIAS},
        {"['W']": None},
    ),
    "weight used elsewhere": (lambda p, x: jnp.tanh(dense(p, x)) @ p["W"], {"W": W, "b": BIAS}, {"['W']": None}),
    "one for each position": (lambda p, x: x @ p["W"] + p["b"], {"W": W, "b": PLACES}, {"['W']": None}),
    "other axes": (
        lambda p, x: jnp.einsum("td,dhf->thf", x, p["W"]) + p["b"].T,
        {"W": draw(4, 2, 3), "b": draw(3, 2)},
        {"['W']": "['b']"},
    ),
    "groups of a convolution": (with_groups, {"W": draw(4, 2, 3), "b": draw(4, 1)}, {"['W']": None}),
}


@pytest.mark.usefixtures("any_rank")
@pytest.mark.parametrize("name", PAIRS)
def test_which_pairs_are_found(name):
    function, params, expected = PAIRS[name]
    x = draw(5, 9, 4)
    with jax.numpy_dtype_promotion("standard"), jax.checking_leaks():
        factors = quick_jit(curvature.kfac(lambda p, x: jnp.sin(function(p, x)).sum()))(params, x)
    found = {
        jax.tree_util.keystr(path): f.bias.path if f.bias else None
        for path, f in jax.tree_util.tree_leaves_with_path(factors, is_leaf=lambda f: hasattr(f, "bias"))
    }
    found = {path: bias for path, bias in found.items() if path not in ("['b']",)}
    assert found == expected


@pytest.mark.usefixtures("any_rank")
def test_a_bias_with_its_axes_in_another_order_has_its_entries_at_the_right_place():
    function, params, _ = PAIRS["other axes"]
    x = draw(40, 9, 4)
    other = {"W": params["W"], "b": params["b"].T}

    def solved(function, p):
        loss = lambda p, x: jnp.sin(function(p, x)).sum()  # noqa: E731
        F = curvature.ekfac(curvature.kfac(loss)(p, x), jg.per_example_grad(loss)(p, x))
        return F.solve(p, 0.1)

    found, expected = (
        quick_jit(functools.partial(solved, function))(params),
        quick_jit(functools.partial(solved, heads))(other),
    )
    assert_close(found["W"], expected["W"], 1e-8)
    assert_close(found["b"], expected["b"].T, 1e-8)


def test_the_cotangents_of_a_first_layer_stay_as_they_are():
    """Nothing but the weight's gradient is computed from them, so that they could be multiplied by the inputs first."""
    params = {"W": draw(4, 5), "b": draw(4), "V": draw(2, 4)}
    x, mix = draw(6, 30, 5), draw(6, 30, 30)

    def outputs(p, x, mix, tap):
        h = mix @ (x @ p["W"].T + p["b"][None] + tap)
        return jnp.sin(h @ p["V"].T).sum()

    loss = lambda p, x, mix: outputs(p, x, mix, np.zeros((30, 4)))  # noqa: E731
    delta = quick_jit(jax.vmap(jax.grad(outputs, 3), (None, 0, 0, None)))(params, x, mix, np.zeros((30, 4)))
    f = quick_jit(curvature.kfac(loss))(params, x, mix)["W"]
    a = np.pad(x, [(0, 0), (0, 0), (0, 1)], constant_values=1)
    assert_close(f.left[0], np.einsum("btf,bte->fe", delta, delta) / 6)
    assert_close(f.right[0], np.einsum("btk,btl->kl", a, a) / 6 / 30)


# --- Weights that every step of a loop uses --------------------------------------------------------------------------


def recurrent(p, x, taps):
    """A recurrent network over x [T, D]; `taps` [T, H] are added before the nonlinearity."""

    def step(h, inputs):
        x, tap = inputs
        return jnp.tanh(p["U"] @ h + p["W"] @ x + p["b"] + tap), h

    last, before = lax.scan(step, jnp.zeros(4), (x, taps))
    return jnp.sin(p["V"] @ last + p["c"]).sum(), before


def test_the_steps_of_a_loop_are_positions_of_the_weights_that_it_uses():
    params = {"U": draw(4, 4), "W": draw(4, 3), "b": draw(4), "V": draw(2, 4), "c": draw(2)}
    x, zeros = draw(6, 20, 3), np.zeros((20, 4))
    delta, before = quick_jit(jax.vmap(jax.grad(recurrent, 2, has_aux=True), (None, 0, None)))(params, x, zeros)
    loss = lambda p, x: recurrent(p, x, zeros)[0]  # noqa: E731
    with jax.checking_leaks():
        factors = quick_jit(curvature.kfac(loss))(params, x)
    left = np.einsum("btf,bte->fe", delta, delta) / 6
    a = np.pad(before, [(0, 0), (0, 0), (0, 1)], constant_values=1)
    assert (factors["U"].bias.path, factors["W"].bias, factors["V"].bias.path) == ("['b']", None, "['c']")
    for name, inputs in (("U", a), ("W", x)):
        assert_close(factors[name].left[0], left)
        assert_close(factors[name].right[0], np.einsum("btk,btl->kl", inputs, inputs) / 6 / 20)
    F = quick_jit(curvature.ekfac)(factors, quick_jit(jg.per_example_grad(loss))(params, x))
    G = quick_jit(jax.vmap(jax.grad(loss), (None, 0)))(params, x)
    assert_close(F.trace(), sum((np.asarray(a) ** 2).sum() for a in jax.tree.leaves(G)) / 6)
    reduced = quick_jit(curvature.kfac(loss, shared="reduce"))(params, x)
    assert reduced["U"] is reduced["W"] is None  # the sides of all steps would first have to be summed


def test_the_steps_of_nested_loops_are_positions_too():
    params, x = {"U": draw(4, 4), "b": draw(4)}, draw(6, 5, 6, 4)

    def step(p):
        return lambda h, x: (jnp.tanh(p["U"] @ h + p["b"] + x), None)

    def nested(p, x):
        return lax.scan(lambda h, x: lax.scan(step(p), h, x), jnp.zeros(4), x)[0].sum()

    def flat(p, x):
        return lax.scan(step(p), jnp.zeros(4), x.reshape(30, 4))[0].sum()

    found, expected = (quick_jit(curvature.kfac(f))(params, x)["U"] for f in (nested, flat))
    assert found.bias == expected.bias
    assert_close(found.left, expected.left)
    assert_close(found.right, expected.right)


def test_a_bias_that_a_loop_and_another_layer_use_stays_apart():
    params, x = {"U": draw(4, 4), "b": draw(4)}, draw(6, 20, 4)

    def loss(p, x):
        step = lambda h, x: (jnp.tanh(p["U"] @ h + p["b"] + x), None)  # noqa: E731
        return (lax.scan(step, jnp.zeros(4), x)[0] * p["b"]).sum()

    factors = quick_jit(curvature.kfac(loss))(params, x)
    assert factors["U"].bias is None
    assert factors["U"].right.shape == (1, 4, 4)


def test_the_memory_for_a_weight_in_a_loop_does_not_grow_with_the_steps():
    params = {"U": jnp.ones((64, 64), jnp.float32), "b": jnp.ones(64, jnp.float32)}

    def loss(p, x):
        return lax.scan(lambda h, x: (jnp.tanh(p["U"] @ h + p["b"] + x), None), jnp.zeros(64, x.dtype), x)[0].sum()

    def used(f, T):
        x = jax.ShapeDtypeStruct((4, T, 64), jnp.float32)
        return jax.jit(f).lower(params, x).compile().memory_analysis().temp_size_in_bytes

    plain = jax.grad(lambda p, x: jax.vmap(loss, (None, 0))(p, x).sum())
    assert used(curvature.kfac(loss), 512) < 1.1 * used(plain, 512) + 4 * 4 * 65 * 65


# --- Errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("plain_types")
def test_errors_say_what_a_joint_block_takes():
    loss = lambda p, x: jnp.tanh(p["W"] @ x + p["b"]).sum()  # noqa: E731
    params, x = {"W": draw(3, 4), "b": draw(3)}, draw(5, 4)
    with pytest.raises(ValueError, match=r'^kfac: expected biases="joint" or "apart", got True'):
        curvature.kfac(loss, biases=True)
    factors = curvature.kfac(loss)(params, x)
    with pytest.raises(
        ValueError, match=r"^KroneckerFactors\.solve: expected a pair for the weight and its bias \['b'\]"
    ):
        factors["W"].solve(params["W"], 0.1)
    apart = curvature.kfac(loss, biases="apart")(params, x)
    with pytest.raises(ValueError, match=r"^KroneckerFactors\.solve: expected an array of shape \(3, 4\), got"):
        apart["W"].solve((params["W"], params["b"]), 0.1)
    other = {"W": draw(3, 4), "b": draw(1)}
    g = jg.per_example_grad(lambda p, x: jnp.tanh(p["W"] @ x).sum() * p["b"].sum())(other, x)
    with pytest.raises(ValueError, match=r"^ekfac: expected factors of shape \(1,\) at \['b'\], got \(3,\)"):
        curvature.ekfac(factors, g)


def test_a_tree_with_missing_parameters_has_factors_for_the_others():
    loss = lambda p, x: jnp.tanh(p["W"] @ x).sum()  # noqa: E731
    params, x = {"W": draw(3, 4), "b": None}, draw(5, 4)
    F = curvature.ekfac(curvature.kfac(loss)(params, x), jg.per_example_grad(loss)(params, x))
    assert F.solve(params, 0.1)["W"].shape == (3, 4)


def test_a_bias_of_several_axes_has_no_factors_of_its_own():
    params, x = {"W": draw(4, 2, 3), "b": draw(2, 3)}, draw(5, 20, 4)
    loss = lambda p, x: jnp.tanh(jnp.einsum("td,dhf->thf", x, p["W"]) + p["b"][None]).sum()  # noqa: E731
    found = curvature.kfac(loss, biases="apart")(params, x)
    assert found["W"] is not None
    assert found["b"] is None
