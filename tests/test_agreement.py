import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxgrad as jg
from jaxgrad.agreement import RTOL
from jaxgrad.network import Params, closed_form, derivation, init_params, loss

B, H, D = 6, 3, 4


@pytest.fixture(params=[jnp.float64, jnp.float32, jnp.bfloat16, jnp.float16], ids=str)
def data(request):
    kp, kx, ky = jax.random.split(jax.random.key(0), 3)
    X = jax.random.normal(kx, (B, D), jnp.float32).astype(request.param)
    return (
        init_params(kp, D, H, request.param),
        X,
        jnp.where(jax.random.bernoulli(ky, shape=(B,)), 1, -1).astype(X.dtype),
    )


def changed(change):
    """closed_form.grad, with its result replaced by change(gradient, x, y)."""
    return lambda p, x, y: change(closed_form.grad(p, x, y), x, y)


def disagreement(candidate, *args, **options):
    """The report's problems by path; also checks that its assertion raises with the same table."""
    report = jg.check_gradient(candidate, loss, *args, **options)
    problems = {leaf.path: leaf.problem for leaf in report.leaves if leaf.problem}
    assert report.agrees == (not problems)
    if problems:
        with pytest.raises(AssertionError, match="the gradients disagree") as caught:
            report.assert_agrees()
        assert str(report) in str(caught.value)
    else:
        report.assert_agrees()
    return problems


@pytest.mark.every(5)
def test_the_right_gradient_agrees_one_example_or_a_batch_with_or_without_oracle(data):
    for candidate in (closed_form.grad, closed_form.batched_grad, jax.vmap(closed_form.grad, (None, 0, 0))):
        assert disagreement(candidate, *data, reference_dtype=jnp.float64) == {}
    assert disagreement(closed_form.grad, *data) == {}
    assert disagreement(closed_form.batched_grad, *data, batch_size=4) == {}


def test_the_report_says_what_was_compared(data):
    report = jg.check_gradient(closed_form.grad, loss, *data)
    assert [leaf.path for leaf in report.leaves] == [".W", ".b", ".w"]
    assert [leaf.shape for leaf in report.leaves] == [(H, D), (H,), (H,)]
    dtype = str(data[0].W.dtype)
    assert {(leaf.dtype, leaf.expected_dtype, leaf.rtol) for leaf in report.leaves} == {(dtype, dtype, RTOL[dtype])}
    assert report.examples == B
    table = str(report)
    assert table.splitlines()[0].split()[:3] == ["leaf", "shape", "dtype"]
    assert f"agrees with jax.grad on {B} examples" in table


@pytest.mark.every(2)
def test_a_wrong_sign_is_caught(data):
    assert set(disagreement(changed(lambda g, x, y: jax.tree.map(jnp.negative, g)), *data)) == {".W", ".b", ".w"}
    assert set(disagreement(changed(lambda g, x, y: g._replace(w=-g.w)), *data)) == {".w"}


@pytest.mark.every(3)
def test_a_transposed_matrix_is_caught(data):
    assert disagreement(changed(lambda g, x, y: g._replace(W=g.W.T)), *data) == {
        ".W": f"has shape ({B}, {D}, {H}), expected ({B}, {H}, {D})"
    }
    square = init_params(jax.random.key(1), H, H, data[0].W.dtype)
    found = disagreement(changed(lambda g, x, y: g._replace(W=g.W.T)), square, data[1][:, :H], data[2])
    assert set(found) == {".W"}


@pytest.mark.every(3)
def test_a_missing_example_weight_is_caught(data):
    params, X, Y = data
    weights = jnp.linspace(0.5, 2, B).astype(X.dtype)

    def weighted(params, x, y, weight):
        return weight * loss(params, x, y)

    def right(params, x, y, weight):
        return jax.tree.map(lambda g: weight * g, closed_form.grad(params, x, y))

    assert jg.check_gradient(right, weighted, params, X, Y, weights).agrees
    report = jg.check_gradient(lambda p, x, y, weight: closed_form.grad(p, x, y), weighted, params, X, Y, weights)
    assert all("differs in" in leaf.problem for leaf in report.leaves)
    with pytest.raises(AssertionError):
        jg.assert_agree(lambda p, x, y, weight: closed_form.grad(p, x, y), weighted, params, X, Y, weights)


@pytest.mark.every(2)
def test_right_on_average_and_wrong_per_example_is_caught(data):
    def averaged(params, X, Y):
        each = closed_form.batched_grad(params, X, Y)
        return jax.tree.map(lambda g: jnp.broadcast_to(g.mean(0, keepdims=True), g.shape), each)

    def swapped(params, X, Y):
        return closed_form.batched_grad(params, X[::-1], Y[::-1])

    for candidate in (averaged, swapped):
        assert set(disagreement(candidate, *data)) == {".W", ".b", ".w"}


def test_a_single_wrong_example_is_caught_and_named(data):
    def one_wrong(params, X, Y):
        g = closed_form.batched_grad(params, X, Y)
        return g._replace(b=g.b.at[4].multiply(1.5))

    report = jg.check_gradient(one_wrong, loss, *data)
    assert [leaf.worst_example for leaf in report.leaves if leaf.problem] == [4]
    assert disagreement(one_wrong, *data) == {".b": "differs in 1 examples"}


@pytest.mark.every(5)
def test_the_worst_example_is_counted_over_the_whole_batch_when_it_comes_in_parts(data):
    params, X, Y = data
    marked = jnp.arange(B, dtype=X.dtype)

    def marked_loss(params, x, y, mark):
        return loss(params, x, y)

    def wrong_at_four(params, x, y, mark):
        g = closed_form.grad(params, x, y)
        return g._replace(b=jnp.where(mark == 4, 2 * g.b, g.b))

    for batch_size in (None, 1, 4, 100):
        report = jg.check_gradient(wrong_at_four, marked_loss, params, X, Y, marked, batch_size=batch_size)
        assert {leaf.path: leaf.worst_example for leaf in report.leaves if leaf.problem} == {".b": 4}


def test_a_wrong_dtype_is_caught(data):
    other = jnp.float32 if data[0].W.dtype != jnp.float32 else jnp.float64
    found = disagreement(changed(lambda g, x, y: g._replace(b=g.b.astype(other))), *data)
    assert found == {".b": f"has dtype {jnp.dtype(other)}, expected {data[0].b.dtype}"}


@pytest.mark.every(2)
def test_nan_on_both_sides_is_caught(data):
    params, X, Y = data
    X = X.at[2].set(jnp.nan)
    found = disagreement(closed_form.grad, params, X, Y)
    assert found == dict.fromkeys((".W", ".b", ".w"), "is not finite in 1 examples")
    assert {leaf.worst_example for leaf in jg.check_gradient(closed_form.grad, loss, params, X, Y).leaves} == {2}


def test_assert_agree_is_the_same_as_an_assertion():
    w, X = jnp.ones(3), jnp.eye(3)
    square = lambda w, x: (w @ x) ** 2  # noqa: E731
    jg.assert_agree(lambda w, x: 2 * (w @ x) * x, square, w, X, reference_dtype=jnp.float64, batch_size=2)
    with pytest.raises(AssertionError, match="the gradients disagree"):
        jg.assert_agree(lambda w, x: (w @ x) * x, square, w, X)


def test_infinity_is_caught(data):
    found = disagreement(changed(lambda g, x, y: g._replace(w=g.w / jnp.zeros((), g.w.dtype))), *data)
    assert found == {".w": f"is not finite in {B} examples"}


@pytest.mark.every(2)
def test_missing_and_unexpected_leaves_and_other_containers_are_caught(data):
    found = disagreement(changed(lambda g, x, y: {"W": g.W}), *data)
    assert found == {
        ".W": "is missing",
        ".b": "is missing",
        ".w": "is missing",
        "['W']": "is not a parameter",
    }
    params, X, Y = data

    def listed_loss(params, x, y):
        return loss(Params(*params), x, y)

    listed = list(params)
    found = jg.check_gradient(lambda p, x, y: tuple(closed_form.grad(Params(*p), x, y)), listed_loss, listed, X, Y)
    assert [leaf.problem for leaf in found.leaves if leaf.problem] == [
        "is a tuple, expected the parameters' list and the same containers in it"
    ]
    with pytest.raises(AssertionError):
        found.assert_agrees()


@pytest.mark.every(2)
def test_the_literal_first_answer_of_the_exercise_is_caught(data):
    wrong = changed(lambda g, x, y: g)
    assert disagreement(wrong, *data) == {}

    def literal(params, x, y):
        return closed_form.grad(params, x, y)._replace(W=derivation.first_answer_literal(params, x, y))

    assert set(disagreement(literal, *data)) == {".W"}


def test_the_oracle_shows_the_digits_that_jax_grad_loses():
    params = Params(jnp.zeros((1, 1), jnp.float32), jnp.array([15.0], jnp.float32), jnp.ones(1, jnp.float32))
    X, Y = jnp.ones((1, 1), jnp.float32), jnp.ones(1, jnp.float32)
    assert set(disagreement(closed_form.grad, params, X, Y)) == {".W", ".b"}  # float32 jax.grad is the wrong one
    assert disagreement(closed_form.grad, params, X, Y, reference_dtype=jnp.float64) == {}
    assert set(disagreement(jg.network.autodiff.grad, params, X, Y, reference_dtype=jnp.float64)) == {".W", ".b"}


def test_a_zero_gradient_agrees_with_zero_and_with_nothing_else():
    w, X = jnp.ones(3), jnp.ones((2, 3))

    def flat(w, x):
        return 0.0 * (w @ x)

    assert jg.check_gradient(lambda w, x: jnp.zeros(3), flat, w, X).agrees
    assert not jg.check_gradient(lambda w, x: jnp.full(3, 1e-300), flat, w, X).agrees


def test_no_examples_at_all_agree_and_wrong_shapes_still_do_not(data):
    params, X, Y = data
    report = jg.check_gradient(closed_form.batched_grad, loss, params, X[:0], Y[:0])
    assert report.agrees
    assert report.examples == 0
    assert report.leaves[0].worst_example is None
    report.assert_agrees()
    wrong = jg.check_gradient(changed(lambda g, x, y: g._replace(W=g.W.T)), loss, params, X[:0], Y[:0])
    assert not wrong.agrees


def test_trees_of_parameters_and_of_batches():
    params = {"layers": [jnp.ones((3, 4)), jnp.ones((2, 3))], "scale": jnp.ones(())}
    batch = {"x": jnp.linspace(-1, 1, 20).reshape(5, 4), "t": jnp.ones((5, 2))}

    def tree_loss(params, example):
        h = jnp.tanh(params["layers"][0] @ example["x"])
        return params["scale"] * jnp.sum((params["layers"][1] @ h - example["t"]) ** 2)

    report = jg.check_gradient(jax.grad(tree_loss), tree_loss, params, batch)
    assert report.agrees
    assert [leaf.path for leaf in report.leaves] == ["['layers'][0]", "['layers'][1]", "['scale']"]
    assert [leaf.shape for leaf in report.leaves] == [(3, 4), (2, 3), ()]


def test_factored_gradients_are_materialized_before_the_comparison():
    class Held:
        def __init__(self, gradients):
            self.gradients = gradients

        def materialize(self):
            return self.gradients

    w, X = jnp.ones(3), jnp.eye(3)
    candidate = lambda w, X: Held(2 * (X @ w)[:, None] * X)  # noqa: E731
    assert jg.check_gradient(candidate, lambda w, x: (w @ x) ** 2, w, X).agrees


def test_the_verdict_does_not_depend_on_how_the_batch_is_split():
    X = jnp.array([[1e4, 0.0], [1.0, 0.0], [1e-8, 0.0]])
    w = jnp.ones(2)
    flipped = lambda w, x: jnp.where(x < 1e-3, -1, 1).astype(x.dtype) * x  # noqa: E731
    reports = [jg.check_gradient(flipped, lambda w, x: w @ x, w, X, batch_size=n) for n in (None, 1, 2)]
    assert all(report == reports[0] for report in reports)
    assert reports[0].leaves[0].worst_example == 2
    assert not reports[0].agrees


def test_candidates_in_numpy_of_one_example_or_of_a_batch():
    w, X = jnp.array([1.0, 2.0, -1.0]), jnp.eye(3)
    square = lambda w, x: (w @ x) ** 2  # noqa: E731

    def one(w, x):
        return np.asarray(2 * np.dot(np.asarray(w), np.asarray(x)) * np.asarray(x))

    def many(w, X):
        return 2 * (np.asarray(X) @ np.asarray(w))[:, None] * np.asarray(X)

    for candidate, batched in ((one, None), (one, False), (many, None), (many, True)):
        assert jg.check_gradient(candidate, square, w, X, batched=batched).agrees
        assert jg.check_gradient(candidate, square, w, X[:0], batched=batched).agrees
        assert not jg.check_gradient(lambda *a, f=candidate: -f(*a), square, w, X, batched=batched).agrees


def test_python_scalars_and_complex_gradients_give_a_report_and_no_traceback():
    w, x = {"a": jnp.ones(())}, jnp.ones(1)
    loss_of = lambda w, x: w["a"] * x  # noqa: E731
    assert not jg.check_gradient(lambda w, x: {"a": 1.0}, loss_of, w, x, batched=True).agrees
    complex_one = lambda w, x: {"a": x.astype(complex)}  # noqa: E731
    assert "has dtype complex128" in jg.check_gradient(complex_one, loss_of, w, x).leaves[0].problem


def test_the_tolerance_can_be_set_and_applies_to_norms():
    w, X = jnp.array([1.0, 1e-6]), jnp.array([[1.0, 1e-6], [2.0, 1e-6]])
    square = lambda w, x: 0.5 * (w @ x) ** 2  # noqa: E731
    slightly_off = lambda w, x: (w @ x) * x * (1 + 1e-6)  # noqa: E731
    assert not jg.check_gradient(slightly_off, square, w, X).agrees
    assert not jg.check_gradient(slightly_off, square, w, X, rtol=9e-7).agrees
    assert jg.check_gradient(slightly_off, square, w, X, rtol=1.1e-6).agrees
    np.testing.assert_allclose(jg.check_gradient(slightly_off, square, w, X).leaves[0].max_rel, 1e-6, rtol=1e-3)


@pytest.mark.usefixtures("plain_types")
def test_bad_input_is_named(data):
    params, X, Y = data
    with pytest.raises(ValueError, match=r"expected one batch size in all batched arguments, got 6 in argument 1, 5"):
        jg.check_gradient(closed_form.grad, loss, params, X, Y[:5])
    with pytest.raises(ValueError, match=r"expected an example axis 0 in argument 2, got shape \(\)"):
        jg.check_gradient(closed_form.grad, loss, params, X, Y[0])
    with pytest.raises(ValueError, match="expected at least one batched argument besides the parameters, got none"):
        jg.check_gradient(closed_form.grad, loss, params)
    with pytest.raises(TypeError, match=r"expected parameters of a floating dtype, got int\d\d at \.b"):
        jg.check_gradient(closed_form.grad, loss, params._replace(b=jnp.ones(3, int)), X, Y)
    with pytest.raises(TypeError, match="expected real floating parameters, got complex"):
        jg.check_gradient(closed_form.grad, loss, params._replace(b=jnp.ones(3, complex)), X, Y)
    with pytest.raises(ValueError, match="expected None or float64 as reference_dtype, got 'float16'"):
        jg.check_gradient(closed_form.grad, loss, params, X, Y, reference_dtype="float16")
    for rtol in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="expected 0 ≤ rtol < ∞"):
            jg.check_gradient(closed_form.grad, loss, params, X, Y, rtol=rtol)
    with pytest.raises(ValueError, match="expected batch_size ≥ 1, got 0"):
        jg.check_gradient(closed_form.grad, loss, params, X, Y, batch_size=0)

    def broken(params, x, y):
        raise RuntimeError("not today")

    with pytest.raises(ValueError, match=r"got one that raises\. With one example: RuntimeError: not today"):
        jg.check_gradient(broken, loss, params, X, Y)


# --- central differences, axes, argnums


def two_layers(params, x):
    return jnp.sum(jnp.tanh(params["V"] @ jax.nn.relu(params["W"] @ x + params["b"])) ** 2)


def weights(dtype=jnp.float64):
    rng = np.random.default_rng(3)
    shapes = {"W": (5, 3), "b": (5,), "V": (2, 5)}
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_a_right_gradient_agrees_with_central_differences(dtype):
    params, X = weights(dtype), jnp.asarray(np.random.default_rng(4).normal(size=(40, 3)), dtype)

    def by_hand(params, x):  # computed in float32 at least, and rounded once
        wide = jax.tree.map(lambda a: a.astype("float64" if dtype == "float64" else "float32"), (params, x))
        return jax.tree.map(lambda g, p: g.astype(p.dtype), jax.grad(two_layers)(*wide), params)

    report = jg.check_gradient(by_hand, two_layers, params, X, numerical=True, batch_size=16)
    assert report.agrees, report
    assert all(leaf.numerical <= 1 for leaf in report.leaves)
    assert str(report).endswith("agrees with jax.grad and central differences on 40 examples")


def test_central_differences_find_a_wrong_custom_vjp():
    @jax.custom_vjp
    def squared(a):
        return a**2

    squared.defvjp(lambda a: (a**2, a), lambda a, ct: (ct * a * 2.01,))

    def loss(params, x):
        return squared(params["W"] @ x).sum() + params["b"].sum()

    params, X = weights(), jnp.asarray(np.random.default_rng(4).normal(size=(7, 3)))
    assert jg.check_gradient(jax.grad(loss), loss, params, X).agrees  # jax.grad has the same error
    report = jg.check_gradient(jax.grad(loss), loss, params, X, numerical=True)
    problems = {leaf.path: leaf.problem for leaf in report.leaves if leaf.problem}
    assert problems == {"['W']": "differs from central differences in 7 examples"}
    with pytest.raises(AssertionError, match="differs from central differences"):
        report.assert_agrees()


def test_central_differences_find_an_error_of_one_in_a_million():
    right = jax.grad(two_layers)
    wrong = lambda params, x: jax.tree.map(lambda a: a * (1 + 1e-6), right(params, x))  # noqa: E731
    params, X = weights(), jnp.asarray(np.random.default_rng(4).normal(size=(40, 3)))
    loose = jg.check_gradient(wrong, two_layers, params, X, numerical=True, rtol=1e-5)
    assert loose.agrees
    report = jg.check_gradient(wrong, two_layers, params, X, numerical=True, rtol=1e-8)
    assert all(leaf.numerical > 1 for leaf in report.leaves), report


def test_a_kink_at_the_point_is_not_an_error():
    params = jax.tree.map(jnp.zeros_like, weights())  # every relu is at 0
    X = jnp.asarray(np.random.default_rng(4).normal(size=(6, 3)))

    def loss(params, x):
        return jnp.abs(params["W"] @ x + params["b"]).sum() + jax.nn.relu(params["V"]).sum() * x.sum()

    assert jg.check_gradient(jax.grad(loss), loss, params, X, numerical=True).agrees


def test_central_differences_see_through_stop_gradient():
    loss = lambda w, x: jax.lax.stop_gradient(w) @ x + w @ x  # noqa: E731
    w, X = jnp.ones(3), jnp.eye(3)
    assert jg.check_gradient(jax.grad(loss), loss, w, X).agrees
    assert not jg.check_gradient(jax.grad(loss), loss, w, X, numerical=True).agrees


@pytest.mark.parametrize("batched", [False, True])
def test_arguments_may_be_shared_and_have_their_example_axis_elsewhere(batched):
    def loss(w, data, scale):
        return scale * jnp.sin(w @ data["x"]) * data["y"]

    w, scale = jnp.array([1.0, 2.0, 3.0]), jnp.asarray(2.0)
    data = {"x": jnp.arange(12.0).reshape(3, 4), "y": jnp.array([1.0, -1.0, 2.0, 0.5])}
    axes = (None, {"x": 1, "y": 0}, None)
    candidate = jax.grad(loss)
    if batched:
        candidate = jax.vmap(candidate, axes)
    for options in ({}, {"batch_size": 3}, {"numerical": True, "reference_dtype": jnp.float64}):
        report = jg.check_gradient(candidate, loss, w, data, scale, in_axes=axes, batched=batched, **options)
        assert report.agrees, report
        assert report.examples == 4
    wrong = lambda *args: 2 * candidate(*args)  # noqa: E731
    assert not jg.check_gradient(wrong, loss, w, data, scale, in_axes=axes, batched=batched).agrees
    in_numpy = lambda w, data, scale: np.asarray(scale * np.cos(np.dot(w, data["x"])) * data["y"] * data["x"])  # noqa: E731
    if not batched:
        assert jg.check_gradient(in_numpy, loss, w, data, scale, in_axes=axes).agrees


def test_argnums_choose_what_is_differentiated():
    loss = lambda x, w, b: jnp.tanh(w @ x + b["b"])  # noqa: E731
    args = jnp.arange(12.0).reshape(4, 3), jnp.array([0.1, 0.2, -0.1]), {"b": jnp.asarray(0.5)}
    axes = (0, None, None)
    for argnums in (1, 2, (1, 2), (2, 1)):
        found = jg.check_gradient(jax.grad(loss, argnums), loss, *args, argnums=argnums, in_axes=axes, numerical=True)
        assert found.agrees, found
    paths = [leaf.path for leaf in found.leaves]
    assert paths == ["[0]['b']", "[1]"]
    assert not jg.check_gradient(jax.grad(loss, (1, 2)), loss, *args, argnums=(2, 1), in_axes=axes).agrees
