import inspect
import itertools

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree
from support import oracle

from conftest import FUZZ
from jaxgrad.network import (
    ACTIVATIONS,
    Activation,
    Params,
    autodiff,
    closed_form,
    init_params,
    logistic,
    loss,
    signs,
    tanh,
)

NAMES = [
    "grad",
    "value_and_grad_one",
    "input_grad",
    "batched_grad",
    "batched_input_grad",
    "value_and_grad",
    "hessian_vector_product",
]
SMOOTH = sorted(set(ACTIVATIONS) - {"relu", "leaky_relu", "elu"})
RTOL = {"float64": 1e-11, "float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}


def batch(seed, B, H, D, dtype=jnp.float64, scale=1.0):
    kp, kx, ky = jax.random.split(jax.random.key(seed), 3)
    params = init_params(kp, D, H, dtype)
    params = params._replace(b=params.b + jnp.linspace(-1, 1, H).astype(dtype))
    X = (scale * jax.random.normal(kx, (B, D), jnp.float64)).astype(dtype)
    return params, X, jnp.where(jax.random.bernoulli(ky, shape=(B,)), 1, -1).astype(dtype)


def close(found, expected, rtol):
    """Norm-wise, leaf by leaf; and the same shapes and dtypes."""
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a).astype(np.float64), np.asarray(b).astype(np.float64)
        assert np.isfinite(a).all()
        assert np.linalg.norm(a - b) <= rtol * np.linalg.norm(b) + 1e-300, (a, b)


sizes = st.sampled_from([0, 1, 2, 5])
cases = {
    "seed": st.integers(0, 20),
    "B": sizes,
    "H": sizes,
    "D": sizes,
    "name": st.sampled_from(sorted(ACTIVATIONS)),
    "dtype": st.sampled_from(sorted(RTOL)),
}


def everything(module, sigma):
    """All gradients of a module in one compiled program, because compilation takes most of the time."""

    def function(params, X, Y):
        results = [module.batched_grad(params, X, Y, sigma), module.batched_input_grad(params, X, Y, sigma)]
        if len(X):
            one = (params, X[0], Y[0], sigma)
            results += [module.value_and_grad(params, X, Y, sigma)]
            results += [module.grad(*one), module.value_and_grad_one(*one), module.input_grad(*one)]
        return results

    return jax.jit(function)


@given(**cases)
def test_closed_form_is_jax_grad_for_all_shapes_activations_and_dtypes(seed, B, H, D, name, dtype):
    params, X, Y = batch(seed, B, H, D, jnp.dtype(dtype))
    sigma = ACTIVATIONS[name]
    found = everything(closed_form, sigma)(params, X, Y)
    close(found, everything(autodiff, sigma)(params, X, Y), RTOL[dtype])


@given(**cases)
@settings(max_examples=6 * FUZZ)
def test_hessian_vector_product_is_jvp_of_grad(seed, B, H, D, name, dtype):
    params, X, Y = batch(seed, max(B, 1), H, D, jnp.dtype(dtype))
    V = jax.tree.map(lambda a: a[..., ::-1] + 1, params)
    args = (params, V, X, Y, ACTIVATIONS[name])
    if name == "elu":  # its curvature jumps at 0, where jax.grad takes the other side
        z = X.astype(jnp.float64) @ params.W.astype(jnp.float64).mT + params.b.astype(jnp.float64)[None]
        assume(bool((jnp.abs(z) > 1e-2).all()))
    if dtype in ("float16", "bfloat16"):  # jvp of grad is not accurate enough there: compare with float64
        wide = [jax.tree.map(lambda a: a.astype(jnp.float64), a) for a in args[:4]]
        expected = autodiff.hessian_vector_product(*wide, args[4])
        found = closed_form.hessian_vector_product(*args)
        assert {leaf.dtype for leaf in found} == {jnp.dtype(dtype)}
        close(jax.tree.map(lambda a: a.astype(jnp.float64), found), expected, RTOL[dtype])
    else:
        close(closed_form.hessian_vector_product(*args), autodiff.hessian_vector_product(*args), RTOL[dtype])


@pytest.mark.every(7)
@pytest.mark.parametrize("name", SMOOTH)
def test_hessian_vector_product_is_the_dense_hessian_times_v(name):
    params, X, Y = batch(1, 6, 3, 4)
    flat, unravel = ravel_pytree(params)
    v = jax.random.normal(jax.random.key(9), flat.shape, flat.dtype)
    sigma = ACTIVATIONS[name]

    def mean_loss(flat):
        return jax.vmap(lambda x, y: loss(unravel(flat), x, y, sigma))(X, Y).mean()

    found = closed_form.hessian_vector_product(params, unravel(v), X, Y, sigma)
    np.testing.assert_allclose(ravel_pytree(found)[0], jax.hessian(mean_loss)(flat) @ v, rtol=1e-9, atol=1e-12)


def test_both_modules_have_the_same_names_and_signatures():
    public = {
        name
        for name, f in vars(closed_form).items()
        if inspect.isfunction(f) and not name.startswith("_") and f.__module__ == closed_form.__name__
    }
    assert public == {*NAMES, "factored_grads"}  # only by hand: jax.grad gives no factors
    for name in NAMES:
        function, reference = getattr(closed_form, name), getattr(autodiff, name)
        by_hand, by_jax = (
            [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()]
            for f in (function, reference)
        )
        assert by_hand == by_jax
        assert function.__doc__
        assert reference.__doc__


def test_batched_grad_is_grad_of_each_example():
    params, X, Y = batch(2, 5, 3, 4)
    found = closed_form.batched_grad(params, X, Y)
    each = [closed_form.grad(params, x, y) for x, y in zip(X, Y, strict=True)]
    close(found, jax.tree.map(lambda *a: jnp.stack(a), *each), 1e-14)
    value, mean = closed_form.value_and_grad(params, X, Y)
    close(mean, jax.tree.map(lambda a: a.mean(0), found), 1e-13)
    np.testing.assert_allclose(value, jax.vmap(lambda x, y: loss(params, x, y))(X, Y).mean(), rtol=1e-14)


# --- Accuracy --------------------------------------------------------------------------------------------------


def inside(found, true, bound):
    assert abs(oracle.mp.mpf(float(found)) - true) <= bound, (float(found), float(true), float(bound))


def check_against_the_oracle(params, x, y, dtype, name):
    """The bounds of the module docstring, entry by entry, for every gradient of one example."""
    H, D = params.W.shape
    sigma = ACTIVATIONS[name]
    true = oracle.gradient(params, x, y, name)
    u = 2.0**-53 if dtype == "float64" else 2.0**-24
    w = [abs(float(v)) for v in oracle.numbers(params.w)]
    dz = [(D + 2) * u * float(a) for a in true["abs_z"]]
    spread = sum(a * b * abs(float(c)) for a, b, c in zip(w, dz, true["s1"], strict=True))
    if name != "logistic":  # a slope may change within δz
        spread += sum(a * 3 * b * b for a, b in zip(w, dz, strict=True))
    dbeta = (H + 8) * u * float(true["abs_beta"]) + spread
    pi = float(true["pi"])
    rounding = float(ml_dtypes.finfo(dtype).eps) / 2
    common = 32 * u + 2 * (1 - pi) * dbeta + rounding
    # A factor that underflows loses this much, and the other factors may be large.
    tiny = float(ml_dtypes.finfo(np.float64 if dtype == "float64" else np.float32).smallest_normal)
    tiny *= max(1.0, *w) * max(1.0, float(jnp.abs(x).max()))
    tiny = max(tiny, float(ml_dtypes.finfo(dtype).smallest_normal))

    by_unit = []
    for i in range(H):
        bound = common * abs(true["b"][i])
        if name == "logistic":
            bound += 2 * max(1.0, abs(float(true["s2"][i] / true["s1"][i]))) * dz[i] * abs(true["b"][i])
        else:
            bound += pi * w[i] * (8 * u + 3 * dz[i])
        by_unit.append(bound + tiny)

    value, one = closed_form.value_and_grad_one(params, x, y, sigma)
    mean, of_batch = closed_form.value_and_grad(params, x[None], y[None], sigma)
    each = jax.tree.map(lambda leaf: leaf[0], closed_form.batched_grad(params, x[None], y[None], sigma))
    for found in (closed_form.grad(params, x, y, sigma), one, of_batch, each):
        for i in range(H):
            inside(found.b[i], true["b"][i], by_unit[i])
            s_error = dz[i] * (abs(true["s1"][i]) + 3 * dz[i]) + 16 * u * (abs(true["s"][i]) + 1)
            inside(found.w[i], true["w"][i], common * abs(true["w"][i]) + pi * s_error + tiny)
        for i, j in itertools.product(range(H), range(D)):
            bound = by_unit[i] * max(abs(oracle.numbers(x)[j]), 1e-300) + rounding * abs(true["W"][i][j]) + tiny
            inside(found.W[i, j], true["W"][i][j], bound)
    W = [oracle.numbers(row) for row in np.asarray(params.W)]
    for found in (
        closed_form.input_grad(params, x, y, sigma),
        closed_form.batched_input_grad(params, x[None], y[None], sigma)[0],
    ):
        for j in range(D):
            bound = sum(e * abs(row[j]) for e, row in zip(by_unit, W, strict=True))
            bound += (H + 2) * u * sum(abs(d * row[j]) for d, row in zip(true["b"], W, strict=True))
            inside(found[j], true["x"][j], bound + rounding * abs(true["x"][j]) + tiny)
    for found in (value, mean):
        inside(found, true["loss"], (16 * u + rounding) * true["loss"] + 2 * pi * dbeta + tiny)


@pytest.mark.slow
@given(
    seed=st.integers(0, 10_000),
    H=st.sampled_from([1, 3]),
    D=st.sampled_from([1, 2]),
    dtype=st.sampled_from(sorted(RTOL)),
    name=st.sampled_from(sorted(ACTIVATIONS)),
    log_z=st.floats(-2, 1.6),
    log_margin=st.floats(-2, 4),
    y=st.sampled_from([1.0, -1.0]),
)
@settings(max_examples=60 * FUZZ)
def test_within_the_documented_bound_of_60_digit_arithmetic_margins_to_ten_thousand(
    seed, H, D, dtype, name, log_z, log_margin, y
):
    kW, kb, kw, kx = jax.random.split(jax.random.key(seed), 4)
    params = Params(
        jax.random.normal(kW, (H, D)) * 10**log_z,
        jax.random.normal(kb, (H,)) * 10**log_z,
        jax.random.normal(kw, (H,)),
    )
    x = jax.random.normal(kx, (D,))
    size = abs(float(params.w @ ACTIVATIONS[name].value(params.W @ x + params.b)))
    params = params._replace(w=params.w * (10**log_margin / max(size, 1e-6)))
    params, x = jax.tree.map(lambda a: a.astype(dtype), (params, x))
    if not all(bool(jnp.isfinite(leaf).all()) for leaf in params):  # the largest float16 is 65504
        return
    check_against_the_oracle(params, x, jnp.asarray(y, dtype), dtype, name)


@pytest.mark.every(25)
@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
@pytest.mark.parametrize("dtype", sorted(RTOL))
def test_never_nan_or_inf_for_finite_input(name, dtype):
    sigma = ACTIVATIONS[name]
    margins, zs = (1e4, 100.0, 1.0), np.array([0.0, 1.0, -1.0, 20.0, -20.0, 80.0, -80.0])
    heights = np.asarray(sigma.value(jnp.asarray(zs)))
    cases = np.array(
        [
            (z, m / s if abs(s) > 1e-3 else m, y)
            for m, (z, s), y in itertools.product(margins, zip(zs, heights, strict=True), (1.0, -1.0))
        ]
    )
    if dtype == "float16":
        cases = cases[np.abs(cases[:, 1]) < 6e4]

    def every_gradient(z, w, y):
        params = Params(jnp.zeros((1, 2), dtype), z[None], w[None])
        x, V = jnp.array([1.0, -2.0], dtype), jax.tree.map(jnp.ones_like, params)
        return (
            closed_form.value_and_grad_one(params, x, y, sigma),
            closed_form.input_grad(params, x, y, sigma),
            closed_form.value_and_grad(params, x[None], y[None], sigma),
            closed_form.hessian_vector_product(params, V, x[None], y[None], sigma),
        )

    for leaf in jax.tree.leaves(jax.jit(jax.vmap(every_gradient))(*jnp.asarray(cases.T).astype(dtype))):
        # A float16 result may exceed float16; nothing else may be infinite, and nothing NaN.
        assert not jnp.isnan(leaf).any()
        assert dtype == "float16" or jnp.isfinite(leaf).all()


@pytest.mark.every(3)
@pytest.mark.parametrize(
    ("dtype", "z"), [("float64", 40.0), ("float64", 80.0), ("float32", 20.0), ("float32", 80.0), ("bfloat16", 6.0)]
)
@pytest.mark.parametrize("name", ["logistic", "tanh"])
def test_saturated_units_have_gradients_where_jax_grad_has_none(name, dtype, z):
    sigma = ACTIVATIONS[name]
    params = Params(jnp.zeros((1, 1), dtype), jnp.array([z], dtype), jnp.ones(1, dtype))
    x, y = jnp.ones(1, dtype), jnp.ones((), dtype)
    eager = jax.grad(lambda p: jax.nn.softplus(-y * (p.w @ sigma.value(p.W @ x + p.b))))(params)
    assert eager.W[0, 0] == 0
    assert eager.b[0] == 0
    true = oracle.gradient(params, x, y, name)
    if abs(true["b"][0]) < float(ml_dtypes.finfo(dtype).smallest_normal):
        return  # tanh at z = 80 in float32: 0 is correct
    bound = 16 if dtype != "bfloat16" else 1
    assert oracle.ulps(closed_form.grad(params, x, y, sigma).W[0, 0], true["W"][0][0], dtype) <= bound
    assert oracle.ulps(closed_form.grad(params, x, y, sigma).b[0], true["b"][0], dtype) <= bound
    assert oracle.ulps(closed_form.batched_grad(params, x[None], y[None], sigma).b[0, 0], true["b"][0], dtype) <= bound


@pytest.mark.parametrize("z", [6.0, 20.0, 80.0])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_saturated_gradients_are_right_to_the_ulp(dtype, z):
    params = Params(jnp.zeros((1, 1), dtype), jnp.array([z], dtype), jnp.ones(1, dtype))
    for sign in (1.0, -1.0):
        x, y = jnp.ones(1, dtype), jnp.asarray(sign, dtype)
        true = oracle.gradient(params, x, y)["b"][0]
        assert oracle.ulps(closed_form.grad(params, x, y).b[0], true, dtype) <= (1 if dtype == "bfloat16" else 16)


def test_half_precision_sums_do_not_lose_small_terms():
    # 4096 equal terms of 1: in bfloat16 a running sum sticks at 256.
    D = 4096
    params = Params(jnp.ones((1, D), jnp.bfloat16), jnp.full(1, -D, jnp.bfloat16), jnp.ones(1, jnp.bfloat16))
    X, Y = jnp.ones((300, D), jnp.bfloat16), jnp.ones(300, jnp.bfloat16)
    value, gradient = closed_form.value_and_grad(params, X, Y)  # z = 0
    np.testing.assert_allclose(float(value), np.log1p(np.exp(-0.5)), rtol=1e-2)
    np.testing.assert_allclose(float(gradient.b[0]), -0.25 / (1 + np.exp(0.5)), rtol=1e-2)


# --- Under JAX's transformations --------------------------------------------------------------------------------------


def test_works_under_jit_vmap_grad_and_scan():
    params, X, Y = batch(3, 5, 3, 4)
    jitted = jax.jit(closed_form.batched_grad, static_argnames="activation")(params, X, Y, activation=tanh)
    close(jitted, closed_form.batched_grad(params, X, Y, tanh), 1e-14)
    stacked = jax.vmap(closed_form.value_and_grad, in_axes=(None, 0, 0))(
        params, jnp.stack([X, 2 * X]), jnp.stack([Y, Y])
    )
    close(jax.tree.map(lambda a: a[1], stacked), closed_form.value_and_grad(params, 2 * X, Y), 1e-13)

    def descend(params, _):
        value, gradient = closed_form.value_and_grad(params, X, Y)
        return jax.tree.map(lambda p, g: p - 0.5 * g, params, gradient), value

    _, values = jax.lax.scan(descend, params, length=20)
    assert (jnp.diff(values) < 0).all()


@pytest.mark.every(9)
@pytest.mark.parametrize("name", SMOOTH)
def test_differentiates_a_second_time(name):
    sigma = ACTIVATIONS[name]
    params, X, Y = batch(4, 5, 3, 4)

    def penalty(module):
        return lambda p: sum(jnp.sum(g**2) for g in module.batched_grad(p, X, Y, sigma))

    close(jax.grad(penalty(closed_form))(params), jax.grad(penalty(autodiff))(params), 1e-10)
    V = jax.tree.map(jnp.ones_like, params)
    by_jvp = jax.jvp(lambda p: closed_form.value_and_grad(p, X, Y, sigma)[1], (params,), (V,))[1]
    close(by_jvp, closed_form.hessian_vector_product(params, V, X, Y, sigma), 1e-10)


def test_no_tracer_leaks():
    params, X, Y = batch(5, 2, 3, 4)
    with jax.checking_leaks():
        for module in (closed_form, autodiff):
            module.batched_grad(params, X, Y, Activation.from_function(jnp.arctan))


def test_numpy_lists_and_python_signs_are_accepted():
    params, X, _ = batch(6, 2, 3, 4)
    expected = closed_form.grad(params, X[0], jnp.ones(()))
    for x, y in ((np.asarray(X[0]), 1.0), (X[0].tolist(), 1), (X[0], np.float64(1))):
        close(closed_form.grad(params, x, y), expected, 0)
    numpy_params = Params(*(np.asarray(leaf) for leaf in params))
    close(closed_form.grad(numpy_params, X[0], 1.0), expected, 0)
    assert jax.typeof(loss(params, X[0], 1)).dtype == jnp.float64


def test_mixed_dtypes_keep_each_parameters_dtype():
    params, X, Y = batch(7, 4, 3, 5)
    mixed = Params(params.W.astype(jnp.bfloat16), params.b.astype(jnp.float32), params.w.astype(jnp.float32))
    with jax.numpy_dtype_promotion("standard"):
        found = closed_form.batched_grad(mixed, X.astype(jnp.float32), Y.astype(jnp.float32))
        expected = autodiff.batched_grad(mixed, X.astype(jnp.float32), Y.astype(jnp.float32))
    close(found, expected, 2e-2)


def test_another_activation_recompiles_and_the_same_one_does_not():
    params, X, Y = batch(8, 2, 3, 4)
    a = closed_form.batched_grad(params, X, Y, logistic)
    b = closed_form.batched_grad(params, X, Y, activation=tanh)
    assert not jnp.allclose(a.W, b.W)
    with jax.no_tracing():
        closed_form.batched_grad(params, X, Y, activation=tanh)


def test_inputs_sharded_over_the_batch_give_the_same_numbers():
    params, X, Y = batch(9, 4, 3, 5)
    mesh = jax.make_mesh((len(jax.devices()),), ("batch",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    if len(X) % len(jax.devices()) == 0:
        X_, Y_ = jax.device_put((X, Y), sharding)
        close(closed_form.batched_grad(params, X_, Y_), closed_form.batched_grad(params, X, Y), 1e-14)


# --- Errors ----------------------------------------------------------------------------------------------------

P34 = Params(np.ones((3, 4)), np.ones(3), np.ones(3))
X4, Y4 = np.ones((5, 4)), np.ones(5)
BAD_ONE = [
    ((P34, np.ones(5), 1.0), ValueError, r"expected x of shape \(4,\) to match params.W of shape \(3, 4\), got \(5,\)"),
    ((P34, np.ones((5, 4)), 1.0), ValueError, r"expected x of shape \(4,\).*got \(5, 4\). Pass one example"),
    ((P34, np.ones(4, int), 1.0), TypeError, "expected x of a floating dtype, got int"),
    ((P34, np.ones(4), np.ones(1)), ValueError, r"expected y of shape \(\), got \(1,\)"),
    ((P34, np.ones(4), True), TypeError, r"expected y of a floating dtype, got bool.*signs\(labels\)"),
    ((P34, np.ones(4), np.int32(1)), TypeError, r"expected y of a floating dtype, got int32.*signs\(labels\)"),
    ((P34, "abc", 1.0), TypeError, "expected x to be an array, got str"),
    ((P34._replace(b=np.ones(4)), np.ones(4), 1.0), ValueError, r"params.b of shape \(3,\) to match.*got \(4,\)"),
    ((P34._replace(w=np.ones((3, 1))), np.ones(4), 1.0), ValueError, r"params.w of shape \(3,\).*got \(3, 1\)"),
    ((P34._replace(W=np.ones(4)), np.ones(4), 1.0), ValueError, r"params.W of shape \[H, D\], got \(4,\)"),
    ((P34._replace(W=np.ones((3, 4), int)), np.ones(4), 1.0), TypeError, "expected params.W of a floating dtype"),
    (({"W": P34.W}, np.ones(4), 1.0), TypeError, r"expected params to be Params\(W, b, w\), got dict"),
    ((P34,), TypeError, "missing a required argument: 'x'"),
    ((P34, np.ones(4), 1.0, jnp.tanh), TypeError, r"expected activation to be an Activation.*from_function"),
]
BAD_BATCH = [
    ((P34, np.ones((5, 3)), Y4), ValueError, r"expected X of shape \[B, 4\].*got \(5, 3\)"),
    ((P34, np.ones(4), Y4), ValueError, r"expected X of shape \[B, 4\].*got \(4,\)"),
    ((P34, X4, np.ones(6)), ValueError, r"expected Y of shape \(5,\) to match X of shape \(5, 4\), got \(6,\)"),
    ((P34, X4, np.ones((5, 1))), ValueError, r"expected Y of shape \(5,\).*got \(5, 1\)"),
    ((P34, X4.astype(int), Y4), TypeError, "expected X of a floating dtype, got int"),
    ((P34, X4, Y4.astype(int)), TypeError, r"expected Y of a floating dtype, got int.*signs\(labels\)"),
    ((P34, X4, Y4 > 0), TypeError, r"expected Y of a floating dtype, got bool.*signs\(labels\)"),
]


@pytest.mark.usefixtures("plain_types")
@pytest.mark.parametrize("module", [closed_form, autodiff])
class TestErrorsNameTheCallWhatWasExpectedAndWhatCame:
    @pytest.mark.parametrize("name", ["grad", "value_and_grad_one", "input_grad"])
    @pytest.mark.parametrize(("args", "error", "message"), BAD_ONE)
    def test_one_example(self, module, name, args, error, message):
        with pytest.raises(error, match=message) as caught:
            getattr(module, name)(*args)
        assert str(caught.value).startswith(f"{module.__name__.replace('jaxgrad.exercise', 'network')}.{name}: ")

    @pytest.mark.parametrize("name", ["batched_grad", "batched_input_grad", "value_and_grad"])
    @pytest.mark.parametrize(("args", "error", "message"), BAD_BATCH)
    def test_batch(self, module, name, args, error, message):
        with pytest.raises(error, match=message) as caught:
            getattr(module, name)(*args)
        assert str(caught.value).startswith(f"{module.__name__.replace('jaxgrad.exercise', 'network')}.{name}: ")

    def test_the_mean_of_an_empty_batch(self, module):
        with pytest.raises(ValueError, match="expected at least one example"):
            module.value_and_grad(P34, X4[:0], Y4[:0])
        with pytest.raises(ValueError, match="expected at least one example"):
            module.hessian_vector_product(P34, P34, X4[:0], Y4[:0])

    def test_a_direction_that_does_not_match(self, module):
        V = Params(np.ones((3, 5)), np.ones(3), np.ones(3))
        with pytest.raises(ValueError, match=r"expected V.W of shape \(3, 4\) to match params.W, got \(3, 5\)"):
            module.hessian_vector_product(P34, V, X4, Y4)
        with pytest.raises(TypeError, match="expected V to be Params"):
            module.hessian_vector_product(P34, np.ones(3), X4, Y4)


@pytest.mark.usefixtures("plain_types")
def test_the_loss_itself_checks_too():
    with pytest.raises(ValueError, match=r"network.model.loss: expected x of shape \(4,\)"):
        loss(P34, np.ones(5), 1.0)


def test_signs_feed_the_loss():
    params, X, _ = batch(10, 2, 3, 4)
    assert jnp.isfinite(closed_form.value_and_grad(params, X, signs(["a", "b"], jnp.float64))[0])
