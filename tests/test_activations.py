import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import oracle

from jaxgrad.network import ACTIVATIONS, Activation, activations, logistic

DTYPES = {"float64": np.float64, "float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
PARTS = ("value", "slope", "curvature")

# The table in the docstring of activations.py: ulp bounds for float32 and float64 ...
BOUNDS = {
    "logistic": (4, 6, 8),
    "tanh": (8, 8, 10),
    "softplus": (4, 4, 6),
    "relu": (1, 1, 1),
    "leaky_relu": (1, 1, 1),
    "identity": (1, 1, 1),
    "elu": (6, 4, 4),
    "gelu": (10, 12, 16),
    "gelu_tanh": (10, 12, 20),
    "silu": (6, 10, 20),
    "sine": (2, 2, 2),
}
# ... and, within 0.5 of a zero of the function, absolute bounds in eps: (part, zeros, bound).
ZEROS = {
    "logistic": [("curvature", [0.0], 1)],
    "tanh": [("value", [0.0], 2), ("curvature", [0.0], 4)],
    "elu": [("value", [0.0], 2)],
    "silu": [("slope", [-1.2784645], 2), ("curvature", [-2.3993573, 2.3993573], 2)],
    "gelu": [("slope", [-0.7517916], 2), ("curvature", [-1.4142136, 1.4142136], 2)],
    "gelu_tanh": [("slope", [-0.7524615], 4), ("curvature", [-1.42, 1.42], 4)],
}


def grid(dtype) -> np.ndarray:
    """|z| ≤ 80, denser near 0, with both ends and both signs of zero."""
    small = 10.0 ** np.arange(-6, 0, 0.25)
    edges = np.asarray(
        [z + s * 0.5 for zeros in ZEROS.values() for _, points, _ in zeros for z in points for s in (-1, 1)]
    )
    around = (edges[:, None] + np.linspace(-0.05, 0.05, 21)[None]).ravel()  # where the relative bound takes over
    parts = [np.linspace(-80, 80, 481), np.linspace(-8, 8, 401), np.linspace(-1, 1, 101), small, -small, [0.0], around]
    return np.unique(np.concatenate(parts).astype(dtype))


def absolute_bound(name, part, z):
    for zero_part, zeros, bound in ZEROS.get(name, []):
        if zero_part == part and min(abs(float(z) - zero) for zero in zeros) < 0.5:
            return bound
    if name == "sine":  # it has zeros everywhere, so its bound is absolute
        return 1
    return 0


@pytest.mark.every(33)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_within_the_documented_ulp_of_60_digit_arithmetic(name, dtype):
    z = grid(DTYPES[dtype])
    wide = dtype in ("float64", "float32")
    eps = float(ml_dtypes.finfo(DTYPES[dtype]).eps)
    for part, exact, bound in zip(PARTS, oracle.EXACT[name], BOUNDS[name], strict=True):
        true = [exact(v) for v in oracle.numbers(z)]
        for function in (getattr(ACTIVATIONS[name], part), jax.jit(getattr(ACTIVATIONS[name], part))):
            found = np.asarray(function(jnp.asarray(z)))
            assert found.dtype == z.dtype
            for zi, fi, ti in zip(z, found, true, strict=True):
                off = oracle.ulps(fi, ti, DTYPES[dtype])
                absolute = abs(oracle.mp.mpf(float(fi)) - ti) / eps
                near = absolute_bound(name, part, zi)
                half = 3 if (name, part) == ("logistic", "value") else 1
                assert off <= (bound if wide else half) or absolute <= near, (part, float(zi), off, float(absolute))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_joint_form_equals_the_three_functions(name):
    z = jnp.asarray(grid(np.float32))
    a = ACTIVATIONS[name]
    for one, part in zip(a.jet(z), PARTS, strict=True):
        np.testing.assert_allclose(one, getattr(a, part)(z), rtol=1e-6, atol=1e-7)


@pytest.mark.every(3)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_finite_for_every_finite_argument(name):
    for dtype in DTYPES.values():
        info = ml_dtypes.finfo(dtype)
        extreme = [float(info.max), float(info.smallest_normal), float(info.smallest_subnormal), 1e4, 200.0, 0.0]
        z = jnp.asarray(np.array([s * e for e in extreme for s in (1, -1)]).astype(dtype))
        for part in PARTS:
            assert np.isfinite(np.asarray(getattr(ACTIVATIONS[name], part)(z)).astype(float)).all(), part


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_nan_in_nan_out(name):
    nan = jnp.float32(jnp.nan)
    assert jnp.isnan(ACTIVATIONS[name].value(nan))


@pytest.mark.every(7)
@pytest.mark.parametrize("name", sorted(set(ACTIVATIONS) - {"relu", "leaky_relu", "elu", "identity"}))
def test_slope_and_curvature_are_the_derivatives_and_can_be_differentiated_at_zero_too(name):
    a = ACTIVATIONS[name]
    for z in (0.0, -0.0, 0.7, -0.7, 3.0, -3.0):
        np.testing.assert_allclose(jax.grad(a.value)(z), a.slope(z), rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(jax.grad(a.slope)(z), a.curvature(z), rtol=1e-11, atol=1e-14)
        h = 1e-5
        third = (a.curvature(z + h) - a.curvature(z - h)) / (2 * h)
        np.testing.assert_allclose(jax.grad(a.curvature)(z), third, rtol=1e-6, atol=1e-8)


@pytest.mark.every(3)
@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("logistic", jax.nn.sigmoid),
        ("tanh", jnp.tanh),
        ("softplus", jax.nn.softplus),
        ("relu", jax.nn.relu),
        ("leaky_relu", jax.nn.leaky_relu),
        ("elu", jax.nn.elu),
        ("gelu", lambda z: jax.nn.gelu(z, approximate=False)),
        ("gelu_tanh", lambda z: jax.nn.gelu(z, approximate=True)),
        ("silu", jax.nn.silu),
        ("sine", jnp.sin),
        ("identity", lambda z: z),
    ],
)
def test_the_functions_are_those_of_jax_nn(name, function):
    z = jnp.concatenate([jnp.linspace(-9, 9, 101), jnp.zeros(1)])
    np.testing.assert_allclose(ACTIVATIONS[name].value(z), function(z), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(ACTIVATIONS[name].slope(z), jax.vmap(jax.grad(function))(z), rtol=1e-9, atol=1e-12)


@given(st.floats(-20, 20), st.sampled_from([jnp.sin, jax.nn.mish, lambda z: z**3, lambda z: jnp.exp(-z * z)]))
def test_from_function_differentiates_any_elementwise_function(z, function):
    a = Activation.from_function(function)
    assert a.value(z) == function(jnp.asarray(z))
    np.testing.assert_allclose(a.slope(z), jax.grad(function)(z), rtol=1e-12)
    np.testing.assert_allclose(a.curvature(z), jax.grad(jax.grad(function))(z), rtol=1e-10, atol=1e-14)


def test_from_function_of_the_same_function_is_the_same_activation_so_jit_compiles_once():
    assert Activation.from_function(jnp.sin) == Activation.from_function(jnp.sin)
    assert hash(Activation.from_function(jnp.sin)) == hash(Activation.from_function(jnp.sin))
    assert Activation.from_function(jnp.sin) != Activation.from_function(jnp.cos)


@pytest.mark.usefixtures("plain_types")
def test_from_function_refuses_what_it_cannot_use():
    with pytest.raises(TypeError, match=r"Activation\.from_function: expected an elementwise JAX function, got 3"):
        Activation.from_function(3)

    class Unhashable:
        __hash__ = None

        def __call__(self, z):
            return z

    with pytest.raises(TypeError, match="expected a hashable function"):
        Activation.from_function(Unhashable())


def test_jax_grad_loses_the_slope_where_ours_keeps_it():
    for dtype, z in ((jnp.float32, 20.0), (jnp.float32, 80.0), (jnp.float64, 80.0), (jnp.bfloat16, 6.0)):
        z = dtype(z)
        s = jax.nn.sigmoid(z)
        assert jax.grad(jax.nn.sigmoid)(z) == 0
        assert s - s * s == 0
        true = oracle.logistic_slope(oracle.mp.mpf(float(z)))
        assert oracle.ulps(logistic.slope(z), true, np.dtype(dtype)) <= 6


def test_the_docstring_holds_the_bounds_that_are_tested():
    rows = [line.split("|") for line in activations.__doc__.splitlines() if line.startswith("| ")][1:]
    documented = {
        name.strip(): (tuple(int(c) for c in cells[:3]), cells[3].strip())
        for _, names, *cells, _ in rows
        for name in names.split(",")
    }
    assert {name: bounds for name, (bounds, _) in documented.items()} == BOUNDS
    for name, zeros in ZEROS.items():
        for part, _, bound in zeros:
            assert part in documented[name][1]
            assert str(bound) in documented[name][1]
