"""per_example_norms and clipped_grad(passes=2): the results of one pass, with a plain gradient's memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.quick import quick_jit
from support.zoo import ENTRIES
from support.zoo.maps import NOT_LINEAR
from test_zoo import axes_of, close

import jaxgrad as jg
from benchmarks.models import block, cross_entropy, deep_language_model
from jaxgrad import per_example_norms


@pytest.fixture(autouse=True)
def jax_defaults():
    """JAX's default promotion rules, in float64."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


# Hand-written backward passes that are not linear: a second pass cannot reproduce their results and raises an error.
REFUSED = {*NOT_LINEAR, "custom_vjp_that_is_not_the_derivative"}


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.name in REFUSED], ids=lambda entry: entry.name)
def test_backward_passes_that_are_not_linear_are_refused(entry):
    gradient = jg.clipped_grad(entry.loss, 1.0, in_axes=axes_of(entry), passes=2)
    with pytest.raises(ValueError, match=r"clipped_grad: expected backward passes that are linear .* Take passes=1"):
        gradient(entry.params, *entry.batch)


def until(h, start, step):
    """step applied until a counter reaches the sum of h."""
    return jax.lax.while_loop(lambda c: c[0] < h.sum(), lambda c: (c[0] + 1, step(c[1])), (0.0, start))[1]


BACKWARD = {  # (whether it is linear, the backward pass for activations h and a cotangent d)
    "relu": (False, lambda h, d: jax.nn.relu(d)),
    "clip": (False, lambda h, d: jnp.clip(d, -1, 1)),
    "normalize": (False, lambda h, d: d / jnp.maximum(1, jnp.linalg.norm(d))),
    "squares in a loop": (False, lambda h, d: until(h, d, lambda d: d * d)),
    "a loop until it is small": (False, lambda h, d: jax.lax.while_loop(lambda d: d.sum() > 1, lambda d: d / 2, d)),
    "softmax": (False, lambda h, d: jax.nn.softmax(d)),
    "nothing of the cotangent": (False, lambda h, d: jnp.ones_like(d)),
    "plus the activations": (False, lambda h, d: d + h),
    "scaled": (True, lambda h, d: 2 * d * jnp.tanh(h)),
    "masked": (True, lambda h, d: jnp.where(h > 0, d, 0)),
    "halved in a loop": (True, lambda h, d: until(h, d, lambda d: d / 2)),
    "permuted": (True, lambda h, d: d[jnp.argsort(h)]),
    "a Fourier transform": (True, lambda h, d: jnp.fft.ifft(jnp.fft.fft(d)).real),
    "a solve": (True, lambda h, d: jnp.linalg.solve(jnp.eye(d.size) + jnp.outer(h, h), d)),
    "cast": (True, lambda h, d: d.astype(jnp.bfloat16).astype(d.dtype)),
    "cast to a narrow range": (False, lambda h, d: d.astype(jnp.float16).astype(d.dtype)),
    "nothing": (True, lambda h, d: jnp.zeros_like(d)),
}


@pytest.mark.every(7)
@pytest.mark.parametrize("name", BACKWARD)
def test_which_backward_passes_are_linear(name):
    linear, backward = BACKWARD[name]

    @jax.custom_vjp
    def layer(h):
        return h * 1.0

    layer.defvjp(lambda h: (h * 1.0, h), lambda h, d: (backward(h, d),))
    gradient = jg.clipped_grad(lambda W, x: jnp.tanh(layer(W @ x)).sum(), 1.0, passes=2)
    if linear:
        gradient(jnp.ones((5, 4)), jnp.ones((3, 4)))
    else:
        with pytest.raises(ValueError, match="expected backward passes that are linear"):
            gradient(jnp.ones((5, 4)), jnp.ones((3, 4)))


IN_FLOAT16 = {  # losses of W [5, 4] and x [4]: whether a cotangent is in float16, and the loss
    "activations": (True, lambda W, x: jnp.tanh(W.astype(jnp.float16) @ x.astype(jnp.float16)).astype(W.dtype).sum()),
    "in a loop": (
        True,
        lambda W, x: jax.lax.fori_loop(0, 2, lambda _, h: jnp.tanh(h), (W @ x).astype("float16")).sum(),
    ),
    "rounding the result": (False, lambda W, x: jnp.tanh(W @ x).sum().astype(jnp.float16)),
    "only the data": (False, lambda W, x: jnp.tanh(W @ (x.astype(jnp.float16) ** 2).astype(W.dtype)).sum()),
    "no gradient": (False, lambda W, x: (W @ x).sum() * jax.lax.stop_gradient((W @ x).astype(jnp.float16).sum())),
}


@pytest.mark.parametrize("name", IN_FLOAT16)
def test_cotangents_in_float16_are_refused(name):
    """A weight of 1e-8 is 6e-8 in float16, so an example would move the sum by six times its bound."""
    refused, loss = IN_FLOAT16[name]
    gradient = jg.clipped_grad(loss, 1.0, passes=2)
    W, x = jnp.ones((5, 4), jnp.float32), jnp.ones((3, 4), jnp.float32)
    if refused:
        with pytest.raises(ValueError, match=r"a cotangent in float16, whose range is too small .* Take passes=1"):
            gradient(W, x)
    else:
        found, expected = gradient(W, x)[0], jg.clipped_grad(loss, 1.0)(W, x)[0]
        np.testing.assert_allclose(found, expected, rtol=2.0**-10)  # the weights are in the loss's dtype


@pytest.mark.every(281)
@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.name not in REFUSED], ids=lambda entry: entry.name)
def test_the_zoo_has_the_norms_and_sums_of_vmap(entry):
    axes = axes_of(entry)
    losses = jax.vmap(entry.loss, axes)
    values = quick_jit(losses)(entry.params, *entry.batch)
    expected = quick_jit(jax.vmap(jax.grad(entry.loss), axes))(entry.params, *entry.batch)
    leaves = [np.asarray(a) for a in jax.tree.leaves(expected)]
    flat = [a.reshape(len(a), -1) for a in leaves]
    lengths = np.sqrt(sum((np.abs(a) ** 2).sum(1) for a in flat))
    bound = max(float(lengths.mean()), 1e-300)

    @quick_jit
    def run(params, batch):
        leaf_norms = per_example_norms(entry.loss, in_axes=axes, leaf_norms=True)(params, *batch)
        return *leaf_norms, jg.clipped_grad(entry.loss, bound, in_axes=axes, passes=2)(params, *batch)

    found, norms, (total, info) = run(entry.params, entry.batch)
    close(found, values, np.abs(values).max(), 1e-12, "values")
    for n, a in zip(jax.tree.leaves(norms), flat, strict=True):
        close(n, np.linalg.norm(a, axis=1), np.abs(a).max(initial=0), entry.rtol, "leaf norms")
    close(info.norms, lengths, lengths.max(), entry.rtol, "norms")
    factors = np.minimum(1, bound / np.where(lengths > 0, lengths, bound))
    for total_, a in zip(jax.tree.leaves(total), leaves, strict=True):
        close(total_, np.tensordot(factors, a, 1), np.abs(a).sum(), max(entry.rtol, 1e-8), "clipped sum")


def layers(params, x):
    """Residual layers in a loop, each computed again in the backward pass."""

    def layer(h, p):
        return h + jnp.tanh(h @ p["up"]) @ p["down"] + p["bias"], None

    return (jax.lax.scan(jax.checkpoint(layer), x, params["layers"])[0] ** 2).mean()


def stacked(L, D, H, make=jnp.ones):
    return {"layers": {"up": make((L, D, H)), "down": make((L, H, D)), "bias": make((L, D))}}


def memory(function, *arguments):
    found = jax.jit(function).lower(*arguments).compile().memory_analysis()
    return found.temp_size_in_bytes + found.output_size_in_bytes


@pytest.mark.every(2)
@pytest.mark.parametrize("T", [64, 512])
def test_two_passes_hold_what_a_plain_gradient_holds(T):
    params = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, jnp.float32),
        jax.eval_shape(lambda: stacked(8, 128, 256)),
    )
    X = jax.ShapeDtypeStruct((8, T, 128), jnp.float32)
    plain = memory(jax.grad(lambda p, X: jax.vmap(layers, (None, 0))(p, X).mean()), params, X)
    norms = memory(per_example_norms(layers), params, X)
    two = memory(jg.clipped_grad(layers, 1.0, passes=2), params, X)
    one = memory(jg.clipped_grad(layers, 1.0), params, X)
    assert norms <= 1.15 * plain
    assert two <= 1.25 * plain  # 1.11 and 1.08 with jaxlib 0.10.2; 1.11 and 1.21 with 0.10.0
    assert two < one


def test_what_is_measured_is_not_held_through_the_loop_that_follows():
    """The cotangents of the logits, which are larger than all that the loop over layers holds."""
    model = deep_language_model(L=4, V=8192, D=64, T=256, B=4).astype(jnp.float32)
    arguments = (model.params, *model.batch)
    losses = jax.vmap(model.loss, (None, 0))
    plain = memory(jax.value_and_grad(lambda p, *batch: losses(p, *batch).mean()), *arguments)
    assert memory(per_example_norms(model.loss), *arguments) <= plain  # 0.93 of it; 1.38 if they are held
    assert memory(jg.clipped_grad(model.loss, 1.0, passes=2), *arguments) <= 1.05 * plain  # 1.00; 1.43


def tied(layer, params, ids, mode="fill"):
    """A loss whose table is its unembedding too, with a loop over layers between the two uses."""
    step = jax.checkpoint(lambda h, p: (layer(p, h), None))
    h = jax.lax.scan(step, params["E"].at[ids[:-1]].get(mode=mode), params["layers"])[0]
    return cross_entropy(h @ params["E"].T, jnp.maximum(ids[1:], 0)).mean()


def small_layer(W, h):
    return h + jnp.tanh(h @ W)


def small_tied(V, D, T, B, dtype):
    rng = np.random.default_rng(13)
    params = {"E": rng.normal(size=(V, D)), "layers": rng.normal(size=(2, D, D)) / D}
    return jax.tree.map(lambda a: jnp.asarray(a, dtype), params), jnp.asarray(rng.integers(0, V, (B, T + 1)), jnp.int32)


def norms_by_vmap(loss, params, ids):
    G = quick_jit(jax.vmap(jax.grad(loss), (None, 0)))(params, ids)
    return jax.tree.map(lambda a: np.sqrt((np.asarray(a, np.float64) ** 2).reshape(len(ids), -1).sum(1)), G)


@pytest.mark.every(2)
@pytest.mark.parametrize("mode", ["fill", "clip", "promise_in_bounds"])
def test_a_tied_table_has_the_norms_of_vmap(mode):
    params, ids = small_tied(40, 16, 24, 5, jnp.float64)
    ids = ids.at[:, :3].set(ids[:, 3:4])  # ids repeat
    ids = ids if mode == "promise_in_bounds" else ids.at[1, 4].set(1000).at[2, 5].set(-1)
    expected = norms_by_vmap(functools.partial(tied, small_layer, mode=mode), params, ids)

    def loss(params, ids, size):
        return size * tied(small_layer, params, ids, mode)

    def compared(params, ids, size):
        options = {"in_axes": (None, 0, None)}
        one, two = (jg.clipped_grad(loss, 0.1 * size, passes=n, **options)(params, ids, size)[0] for n in (1, 2))
        return per_example_norms(loss, leaf_norms=True, **options)(params, ids, size)[1], one, two

    compared = quick_jit(compared)
    for size in (1.0, 1e-170, 1e170):
        found, one, two = jax.tree.map(lambda a, size=size: np.asarray(a) / size, compared(params, ids, size))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), found, expected)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9), one, two)


@pytest.mark.parametrize(("dtype", "rounding"), [(jnp.float32, 2.0**-20), (jnp.bfloat16, 2.0**-5)])
def test_a_tied_table_at_real_sizes(dtype, rounding):
    loss = functools.partial(tied, small_layer)
    params, ids = small_tied(500, 64, 64, 64, dtype)
    expected = norms_by_vmap(loss, jax.tree.map(lambda a: a.astype(jnp.float64), params), ids)
    with jax.enable_x64(False):
        _, found = jax.jit(per_example_norms(loss, leaf_norms=True))(params, ids)
    np.testing.assert_allclose(found["E"], expected["E"], rtol=rounding)


def test_a_tied_table_is_not_held_through_the_loop():
    model, loss = deep_language_model(L=4, V=8192, D=64, T=256, B=4).astype(jnp.float32), functools.partial(tied, block)
    params, ids = {name: model.params[name] for name in ("E", "layers")}, model.batch[0]
    losses = jax.vmap(loss, (None, 0))
    plain = memory(jax.value_and_grad(lambda params, ids: losses(params, ids).mean()), params, ids)
    assert memory(per_example_norms(loss), params, ids) <= 1.02 * plain
    assert memory(jg.clipped_grad(loss, 1.0, passes=2), params, ids) <= 1.05 * plain


def test_a_mask_is_repeated_inside_the_loop():
    """JAX moves the broadcasts of an attention mask out of the loop; for each example, they would be large."""
    model = deep_language_model(L=3, V=64, D=16, T=32, B=5).astype(jnp.float64)
    program = jax.make_jaxpr(per_example_norms(model.loss))(model.params, *model.batch)
    loops = [eqn for eqn in program.jaxpr.eqns if eqn.primitive is jax.lax.scan_p]
    forward = loops[0]
    held = [v.aval for v in forward.invars if v.aval.shape[-2:] == (32, 32)]
    assert [a.shape for a in held] == [(32, 32)]
    values, norms = quick_jit(per_example_norms(model.loss))(model.params, *model.batch)
    G = quick_jit(jax.vmap(jax.value_and_grad(model.loss), (None, 0)))(model.params, *model.batch)
    np.testing.assert_allclose(values, G[0], rtol=1e-5)
    squares = sum((np.asarray(a, np.float64) ** 2).reshape(5, -1).sum(1) for a in jax.tree.leaves(G[1]))
    np.testing.assert_allclose(norms, np.sqrt(squares), rtol=1e-5)


def batch_of(seed, B=6, T=5, D=4):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(B, T, D)))


def drawn(seed, L=3, D=4, H=7):
    rng = np.random.default_rng(seed)
    return stacked(L, D, H, lambda shape: jnp.asarray(rng.normal(size=shape)))


@pytest.mark.every(11)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weighting": "normalize"},
        {"weighting": jg.clipping.automatic(0.1)},
        {"microbatch_size": 4},
        {"max_norm": {"layers": {"up": 0.3, "down": 0.1, "bias": 1e9}}},
    ],
    ids=["clip", "normalize", "automatic", "microbatches", "groups"],
)
@pytest.mark.parametrize("masked", [False, True])
def test_what_one_pass_returns_two_passes_return(options, masked):
    params, X = drawn(0), batch_of(1)
    mask = jnp.arange(6) % 3 != 1 if masked else None
    options = {"max_norm": 0.5} | options
    one = quick_jit(jg.clipped_grad(layers, **options))(params, X, mask=mask)
    two = quick_jit(jg.clipped_grad(layers, **options, passes=2))(params, X, mask=mask)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), one, two)


@pytest.mark.every(0)
@pytest.mark.parametrize("jit", [quick_jit, lambda f: f], ids=["jit", "eager"])
def test_examples_that_are_masked_or_not_finite_add_exactly_zero(jit):
    def loss(w, x, key, n):
        return jnp.log(x @ w).sum() * (1 + 0 * jax.random.normal(key)) / n

    w = jnp.ones(4)
    X = jnp.abs(batch_of(2)).at[1].set(jnp.inf).at[2, 0, 0].set(jnp.nan).at[3].set(0.0)
    keys, counts = jax.random.split(jax.random.key(0), 6), jnp.arange(6)  # the first divides by zero
    gradient = jit(jg.clipped_grad(loss, 0.5, passes=2))
    total, info = gradient(w, X, keys, counts, mask=jnp.arange(6) != 5)
    alone, _ = gradient(w, X[4:5], keys[4:5], counts[4:5], mask=jnp.array([True]))
    np.testing.assert_array_equal(total, alone)
    assert int(info.nonfinite) == 4
    nothing, _ = gradient(w, X[:3], keys[:3], counts[:3], mask=jnp.zeros(3, bool))
    np.testing.assert_array_equal(nothing, jnp.zeros(4))


@pytest.mark.every(3)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_one_example_moves_the_sum_by_at_most_the_bound(dtype):
    params = jax.tree.map(lambda a: (a / 2).astype(jnp.float32), drawn(3))
    X = (10.0 ** np.random.default_rng(4).uniform(-3, 2, (200, 1, 1))) * np.asarray(batch_of(5, 200))

    def loss(params, x):  # computes in the narrow dtype, on parameters of float32
        return layers(jax.tree.map(lambda a: a.astype(dtype), params), x.astype(dtype))

    gradient = jg.clipped_grad(loss, 1.0, passes=2)
    with jax.enable_x64(False):
        each = jax.jit(jax.vmap(lambda x: gradient(params, x[None])[0]))(jnp.asarray(X, jnp.float32))
    lengths = np.sqrt(sum((np.asarray(a, np.float64) ** 2).reshape(200, -1).sum(1) for a in jax.tree.leaves(each)))
    assert lengths.max() > 0.9
    assert lengths.max() <= gradient.sensitivity(1, dtype)


@pytest.mark.every(5)
@pytest.mark.parametrize("B", [64, 256])
@pytest.mark.parametrize(("dtype", "rounding"), [(jnp.float32, 2.0**-24), (jnp.bfloat16, 2.0**-8)])
def test_results_are_as_accurate_as_the_dtype_at_real_sizes(dtype, rounding, B):
    params = jax.tree.map(lambda a: (a / 8).astype(dtype), drawn(9, L=4, D=64, H=128))
    X = batch_of(10, B, T=32, D=64).astype(dtype)
    exact = jax.tree.map(lambda a: a.astype(jnp.float64), (params, X))
    G = jax.jit(jax.vmap(jax.grad(layers), (None, 0)))(*exact)
    lengths = np.sqrt(sum((np.asarray(a) ** 2).reshape(B, -1).sum(1) for a in jax.tree.leaves(G)))
    bound = float(np.float32(np.median(lengths)))
    with jax.enable_x64(False):
        total, info = jax.jit(jg.clipped_grad(layers, bound, passes=2))(params, X)
        one, _ = jax.jit(jg.clipped_grad(layers, bound))(params, X)
    np.testing.assert_allclose(info.norms, lengths, rtol=32 * rounding)
    expected = jax.tree.map(lambda a: np.tensordot(np.minimum(1, bound / lengths), a, 1), G)
    for a, b, c in zip(jax.tree.leaves(total), jax.tree.leaves(expected), jax.tree.leaves(one), strict=True):
        off = np.abs(np.asarray(a, np.float64) - b).max()
        assert off <= max(64 * rounding * np.abs(b).max(), 2 * np.abs(np.asarray(c, np.float64) - b).max())


def test_sums_of_two_passes_have_the_derivatives_of_one():
    params, X = drawn(11), batch_of(12)

    def squares(passes):
        def function(params, X):
            total, info = jg.clipped_grad(layers, 0.5, passes=passes)(params, X)
            return sum((a**2).sum() for a in jax.tree.leaves(total)) + info.norms.sum()

        return quick_jit(jax.grad(function, (0, 1)))(params, X)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9), squares(2), squares(1))


def test_inside_shard_map_each_device_sums_its_own_examples():
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere, each = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("d")
    params, X = drawn(7), batch_of(8)

    def local(params, X):
        total, info = jg.clipped_grad(layers, 0.5, passes=2)(params, X)
        return jax.tree.map(lambda a: jax.lax.psum(a, "d"), total), info.norms

    found = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(everywhere, each), out_specs=(everywhere, each)))
    total, info = quick_jit(jg.clipped_grad(layers, 0.5))(params, X)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), found(params, X), (total, info.norms))


def test_weights_in_a_narrow_loss_are_rounded_towards_zero():
    X = jnp.asarray(np.random.default_rng(6).normal(size=(256, 1, 8)) * 3, jnp.bfloat16)
    gradient = jg.clipped_grad(lambda w, x: (x[0] @ w).astype(jnp.bfloat16), 1.0, passes=2)
    each = jax.vmap(lambda x: gradient(jnp.zeros(8, jnp.float32), x[None].astype(jnp.float32))[0])(X)
    assert np.linalg.norm(np.asarray(each, np.float64), axis=1).max() <= 1 + 1e-6


def test_bad_input():
    with pytest.raises(ValueError, match="clipped_grad: expected 1 or 2 passes, got 3"):
        jg.clipped_grad(layers, 1.0, passes=3)
    with pytest.raises(TypeError, match="per_example_norms: expected a function"):
        per_example_norms(3)


def cross_entropy_by_vocabulary(params, x, y):
    """A loss that never holds all logits: a checkpointed scan over slices of the vocabulary, with a running maximum."""
    h, slices = jnp.tanh(x @ params["h"]), params["W"].shape[0]
    rows = params["W"].shape[1]

    @jax.checkpoint
    def step(carry, slice_):
        largest, total, own = carry
        k, W = slice_
        logits = h @ W.T
        new = jnp.maximum(largest, jax.lax.stop_gradient(logits.max(1)))
        total = total * jnp.exp(largest - new) + jnp.exp(logits - new[:, None]).sum(1)
        local = y - k * rows
        there = jnp.take_along_axis(logits, jnp.clip(local, 0, rows - 1)[:, None], 1)[:, 0]
        return (new, total, own + jnp.where((local >= 0) & (local < rows), there, 0)), None

    start = (jnp.full(y.shape, -1e30, h.dtype), jnp.zeros(y.shape, h.dtype), jnp.zeros(y.shape, h.dtype))
    (largest, total, own), _ = jax.lax.scan(step, start, (jnp.arange(slices), params["W"]))
    return (largest + jnp.log(total) - own).mean()


def test_a_cross_entropy_over_slices_of_the_vocabulary_keeps_its_memory():
    rng = np.random.default_rng(0)
    params = {"h": jnp.asarray(rng.normal(size=(6, 6))), "W": jnp.asarray(rng.normal(size=(3, 5, 6)))}
    batch = jnp.asarray(rng.normal(size=(4, 7, 6))), jnp.asarray(rng.integers(0, 15, (4, 7)))

    def whole(params, x, y):
        logits = jnp.tanh(x @ params["h"]) @ params["W"].reshape(15, 6).T
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1).mean()

    G = jax.vmap(jax.grad(whole), (None, 0, 0))(params, *batch)
    lengths = np.sqrt(sum((np.asarray(a) ** 2).reshape(4, -1).sum(1) for a in jax.tree.leaves(G)))
    np.testing.assert_allclose(quick_jit(per_example_norms(cross_entropy_by_vocabulary))(params, *batch)[1], lengths)

    B, T, D, slices, rows = 8, 128, 64, 16, 512
    shapes = {"h": (D, D), "W": (slices, rows, D)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    batch = jax.ShapeDtypeStruct((B, T, D), jnp.float32), jax.ShapeDtypeStruct((B, T), jnp.int32)
    loss = cross_entropy_by_vocabulary
    plain = memory(jax.grad(lambda p, *batch: jax.vmap(loss, (None, 0, 0))(p, *batch).mean()), params, *batch)
    assert plain < B * T * slices * rows * 4 / 3  # all logits
    assert memory(per_example_norms(loss), params, *batch) <= 1.1 * plain
    assert memory(jg.clipped_grad(loss, 1.0, passes=2), params, *batch) <= 1.2 * plain
    assert memory(jg.clipped_grad(loss, {"h": 1.0, "W": jnp.ones(slices)}), params, *batch) <= 1.2 * plain
