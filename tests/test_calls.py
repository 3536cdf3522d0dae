"""How the transforms are called: arguments and results of every kind, against jax.vmap(jax.value_and_grad(…))."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import sparse
from support.quick import quick_jit
from test_transform import close, from_factors, many, many_data, mlp, mlp_data, normal, reference

import jaxgrad as jg

WRONG_AXES = [
    (axes, got)
    for axis, got in ((True, "True"), (np.True_, "np.True_"), (1.0, "1.0"), ("0", "'0'"))
    for axes in (axis, (None, axis, 0))
]
B = 5
W, X = jnp.arange(1.0, 4.0), jnp.arange(3.0 * B).reshape(B, 3) / 7
JIT = pytest.mark.parametrize("jit", [quick_jit, lambda f: f], ids=["jit", "eager"])


def same(found, expected, rtol=0.0):
    """Assert equal trees of arrays: values, shapes, dtypes and weak types."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert isinstance(a, jax.Array)
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert a.weak_type == b.weak_type
        np.testing.assert_allclose(a, b, rtol=rtol)


# --- Parameters, examples and shared arguments ------------------------------------------------------------------------


@pytest.mark.every(7)
@pytest.mark.parametrize(
    ("argnums", "in_axes"),
    [
        *((k, (0, None, None, 0)) for k in (1, 2, -3, (1,), [-2])),
        ((2, 1), 0),
        ((-2, 1), np.int32(0)),
        *(((1, 2), k) for k in (1, -1)),
        *(((1, 2), (k, None, {"v": None}, n)) for k, n in ((0, np.int64(-1)), (-2, 1), ({"x": 0, "more": None}, 0))),
        ((1, 2), ({"x": -1, "more": [1, {"y": None, "z": 0}]}, None, None, 0)),
    ],
)
def test_argnums_and_in_axes(argnums, in_axes):
    def loss(x, p, q, y):
        shift, others = x["more"]
        return mlp(p | q, x["x"], y.sum() + shift.sum() + jnp.sum(others["y"]) * others["z"].sum())

    def placed(axis, tree):
        return tree if axis is None else jax.tree.map(lambda a: jnp.moveaxis(a, 0, axis), tree)

    (p, X, Y), axes = mlp_data(), in_axes if isinstance(in_axes, tuple) else (in_axes, None, None, in_axes)
    axes = jax.tree.map(int, axes)
    x = {"x": X, "more": [normal(5, 6, 3), {"y": normal(6, 6, 2), "z": normal(7, 6, 4)}]}
    args = jax.tree.map(placed, axes, (x, p, {"v": p.pop("v")}, Y[:, None]), is_leaf=lambda axis: axis is None)
    close(quick_jit(from_factors(loss, argnums, in_axes))(*args), quick_jit(reference(loss, argnums, axes))(*args))


@pytest.mark.parametrize("transform", [jg.per_example_grad, jg.explain])
@pytest.mark.parametrize("flag", [True, np.bool_(True), jnp.array(True)], ids=["bool", "numpy", "jax"])
def test_shared_arguments_may_be_anything_and_are_not_traced(transform, flag):
    def loss(p, x, y, function, name, flag, power):
        return function(mlp(p, x, y)) ** power if flag and name == "on" else x.sum()

    (p, X, Y), shared = mlp_data(), (jnp.cos, "on", flag, 3)
    result = transform(loss, in_axes=(None, 0, 0, None, None, None, None))(p, X, Y, *shared)
    if transform is jg.per_example_grad:
        close(result.materialize(), quick_jit(reference(lambda *a: loss(*a, *shared)))(p, X, Y)[0])


def test_keyword_arguments_are_batched():
    def loss(p, x, *, y, extra):
        return mlp(p, x, y + extra["a"].sum())

    (p, X, Y), extra = mlp_data(), {"a": normal(5, 6, 2)}
    g = jg.per_example_grad(loss)(p, X, y=Y, extra=extra)
    expected = quick_jit(reference(lambda p, x, y, e: loss(p, x, y=y, extra=e), 0, (None, 0, 0, 0)))(p, X, Y, extra)
    close(g.materialize(), expected[0])
    assert (len(g), jg.per_example_grad(loss).__name__) == (6, "loss")


@pytest.mark.every(7)
@pytest.mark.parametrize("shared", [True, 2.0, 3, "a word", None, np.float32(2), jnp.float32(2), len], ids=str)
def test_keyword_arguments_that_are_not_arrays_are_shared_and_not_traced(shared):
    def loss(w, x, *, option, inner):
        assert jax.tree.leaves(option) == jax.tree.leaves(shared)
        assert inner[1] == "on"
        factor = option if isinstance(option, float | int | jax.Array | np.number) else 1.0
        return jnp.sin(w @ (x + inner[0])) * jnp.asarray(factor, w.dtype)

    G = jax.vmap(jax.grad(lambda w, x, a: loss(w, x, option=shared, inner=(a, "on"))), (None, 0, 0))(W, X, X[:, 0])
    options = {"option": shared, "inner": (X[:, 0], "on")}
    same(jg.per_example_grad(loss)(W, X, **options).materialize(), G, 1e-12)
    same(jg.per_example_value_and_grad(loss)(W, X, **options)[1].materialize(), G, 1e-12)
    same(jg.clipped_grad(loss, np.inf)(W, X, **options)[0], G.sum(0), 1e-12)
    same(jg.clipped_grad(loss, np.inf, microbatch_size=2)(W, X, **options)[0], G.sum(0), 1e-12)
    assert jg.explain(loss)(W, X, **options).batch_size == B


def test_positional_arguments_without_leaves_are_shared_and_others_need_none_in_in_axes():
    loss = lambda w, x, none, empty: jnp.sin(w @ x)  # noqa: E731
    assert len(jg.per_example_grad(loss)(W, X, None, {})) == B
    for argument, message in (
        (2.0, r"got shape \(\)"),
        ("a word", "got str"),
        (len, "got builtin"),
        (np.array(["a"]), "got"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"argument 2, .*{message}.* None in in_axes"):
            jg.per_example_grad(loss)(W, X, argument, {})
        assert len(jg.per_example_grad(loss, in_axes=(None, 0, None, 0))(W, X, argument, {})) == B


@pytest.mark.every(0)
def test_a_sparse_batch_is_named_and_its_parts_are_a_batch():
    def loss(w, x):
        return jnp.sin(x @ w)

    def loss_of_parts(w, data, indices):
        return loss(w, sparse.BCOO((data, indices), shape=(3,)))

    batch = sparse.BCOO.fromdense(X, n_batch=1)
    for args, options in (((W, batch), {}), ((W,), {"x": batch}), ((W, sparse.BCOO.fromdense(X)), {})):
        with pytest.raises(TypeError, match=r"per_example_grad: expected dense arrays .* Pass its parts"):
            jg.per_example_grad(loss)(*args, **options)
    expected = jax.vmap(jax.grad(loss), (None, 0))(W, X)
    same(jg.per_example_grad(loss_of_parts)(W, batch.data, batch.indices).materialize(), expected, 1e-12)
    features = sparse.BCOO.fromdense(jnp.diag(W))  # a shared argument may be sparse
    shared = jg.per_example_grad(lambda w, f, x: loss(f @ w, x), in_axes=(None, None, 0))(W, features, X)
    same(shared.materialize(), jax.vmap(jax.grad(lambda w, x: loss(W * w, x)), (None, 0))(W, X), 1e-12)


@pytest.mark.parametrize("transform", [jg.per_example_grad, jg.explain])
def test_a_shared_argument_may_be_the_same_object_as_the_parameters(transform):
    """A proximal term: the start is the same array as the parameters, but it is shared and not traced."""

    def loss(w, x, start, scale):
        assert not isinstance(start, jax.core.Tracer)
        assert not isinstance(scale, jax.core.Tracer)
        return jnp.sin(w @ x) + jnp.square(w - start / 2).sum()

    result = transform(loss, in_axes=(None, 0, None, None))(W, X, W, X)
    if transform is jg.per_example_grad:
        same(result.materialize(), jax.vmap(jax.grad(loss), (None, 0, None, None))(W, X, W, X), 1e-12)


@pytest.mark.usefixtures("plain_types")
@pytest.mark.parametrize(
    ("in_axes", "error", "message"),
    [
        (None, ValueError, "expected at least one batched argument"),
        ((None, None, None), ValueError, "expected at least one batched argument"),
        (1, ValueError, r"expected an example axis 1 in argument 2, got shape \(6,\)"),
        ((None, -3, 0), ValueError, r"expected an example axis -3 in argument 1, got shape \(6, 7\)"),
        ((None, {"x": 0}, 0), ValueError, "expected in_axes to be a tree prefix of the arguments"),
        ({"x": 0}, ValueError, "expected in_axes to be a tree prefix of the arguments"),
        ((None, 1, 0), ValueError, "expected one batch size .*, got 7 in argument 1, 6 in argument 2"),
        ((1, 0), ValueError, r"each of the 3 positional .*got \(1, 0\). Write in_axes=\(None, 1, 0\)"),
        ([0] * 4, ValueError, r"each of the 3 positional .* Write in_axes=\(None, 0, 0\)"),
        (
            (0, 0, None),
            ValueError,
            r"got 0. If the parameters are argument 2, pass argnums=2; else in_axes=\(None, 0, None\)",
        ),
        (({"W": 1, "b": None}, 0, 0), ValueError, "expected None in in_axes at the differentiated argument 0"),
        *((axes, TypeError, f"expected whole numbers or None in in_axes, got {got}") for axes, got in WRONG_AXES),
    ],
)
def test_in_axes_that_do_not_fit_are_named(in_axes, error, message):
    for name in ("per_example_grad", "per_example_value_and_grad", "explain"):
        with pytest.raises(error, match=f"{name}: .*{message}"):
            getattr(jg, name)(mlp, in_axes=in_axes)(*mlp_data())
    with pytest.raises(error, match=f"clipped_grad: .*{message}"):
        jg.clipped_grad(mlp, 1.0, in_axes=in_axes)(*mlp_data())


def test_parameters_in_another_place_are_recognized():
    x, params = jnp.ones(3), {"in": jnp.ones((5, 3)), "out": jnp.ones((2, 5))}
    with pytest.raises(ValueError, match=r"one batch size .* If the parameters are argument 1, pass argnums=1\."):
        jg.per_example_grad(lambda x, params: (params["out"] @ params["in"] @ x).sum())(x, params)


def test_attribution_and_streams_take_in_axes():
    """Attribution and streams take the loss's in_axes, which start with None for the parameters."""
    axes, shift = (None, 1, None), jnp.ones(())
    loss = lambda w, x, shift: jnp.sin(w @ x + shift)  # noqa: E731
    batch, options = (X.T, shift), {"in_axes": axes}
    g = jg.per_example_grad(loss, **options)(W, *batch)
    same(jg.attribution.grand(loss, **options)([W], *batch), g.norms(), 1e-12)
    same(jg.attribution.tracin(loss, **options)([W], [1.0], batch, batch), g.gram(), 1e-12)
    np.testing.assert_allclose(jg.streams.gram(loss, **options)(W, [batch]), g.gram(), rtol=1e-12)
    np.testing.assert_allclose(jg.streams.norms(loss, **options)(W, *batch).rows["norms"], g.norms(), rtol=1e-12)


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


@pytest.mark.every(13)
@JIT
@pytest.mark.parametrize("value", VALUES)
def test_results_that_are_not_gradients_equal_those_of_jax(value, jit):
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


# --- Tracer leaks -----------------------------------------------------------------------------------------------------

CALLS = {
    "per_example_grad": jg.per_example_grad,
    "per_example_value_and_grad": jg.per_example_value_and_grad,
    "clipped_grad": lambda loss: jg.clipped_grad(loss, 1.0),
    "in microbatches": lambda loss: jg.clipped_grad(loss, 1.0, microbatch_size=2),
    "norms": lambda loss: lambda *args: jg.per_example_grad(loss)(*args).norms(),
    "explain": jg.explain,
}


@pytest.mark.every(7)
@pytest.mark.parametrize("name", CALLS)
def test_no_tracer_leaks(name):
    with jax.checking_leaks():
        CALLS[name](mlp)(*mlp_data())
        if name == "explain":
            CALLS[name](many)(*many_data())
        elif name == "per_example_grad":
            jax.eval_shape(CALLS[name](many), *many_data())
