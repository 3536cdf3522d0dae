"""Primitives with rules that a user registers: Pallas kernels, and primitives made by hand."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from support.own_primitives import (
    RULES,
    W,
    X,
    agrees,
    directly,
    half_p,
    how,
    kernel,
    normal,
    own_loss,
    primitive,
    product_p,
)
from support.quick import quick_jit

import jaxgrad as jg
from jaxgrad.per_example import check_rule
from jaxgrad.per_example.interpreter import registered


@pytest.fixture(autouse=True)
def _no_rule_is_left():
    before = registered.rules()
    yield
    assert registered.rules() == before


# --- A Pallas matmul ------------------------------------------------------------------------------------------------


forward, input_kernel = kernel("forward"), kernel("input_kernel", lambda g, W: g @ W.T)
weight_kernel = kernel("weight_kernel", lambda x, g: x.T @ g)


def layer(weight_kernel=weight_kernel):
    @jax.custom_vjp
    def dense(W, x):
        return forward(x, W)

    dense.defvjp(
        lambda W, x: (forward(x, W), (W, x)), lambda kept, g: (weight_kernel(kept[1], g), input_kernel(g, kept[0]))
    )
    return dense


def pallas_loss(W, x):
    return jnp.sin(layer()(W, x)).sum()


def rule_for_weight_kernel():
    return jg.register_rule("pallas_call", lambda x, g, **params: x.T @ g, name="weight_kernel")


def test_a_pallas_kernel_takes_the_direct_route_until_it_has_a_rule():
    row = jg.explain(pallas_loss)(W, X).rows[0]
    assert (row.how, row.primitive) == ("materialized", "pallas_call")
    assert "register_rule" in row.why
    assert __file__ in row.source
    with rule_for_weight_kernel():
        row = jg.explain(pallas_loss)(W, X).rows[0]
        assert (row.how, row.factors) == ("factored", ("Outer([4, 3, 30], [4, 3, 20])",))
        assert agrees(pallas_loss, W, X)
        g = jg.per_example_grad(pallas_loss, strict=True)(W, X)
    expected = directly(pallas_loss, W, X)
    np.testing.assert_allclose(g.norms(), np.sqrt((expected**2).sum((1, 2))), rtol=1e-5)
    np.testing.assert_allclose(g.sum(), expected.sum(0), rtol=1e-4, atol=1e-5)
    assert how(pallas_loss, W, X) == "materialized"


@pytest.mark.every(3)
@pytest.mark.parametrize("where", ["jit", "checkpoint", "scan", "cond", "a weight of the weight"])
def test_a_rule_reaches_into_programs_and_maps(where):
    layers = normal(2, 3, 20, 20) / 4

    def loss(W, x):
        match where:
            case "jit":
                return jax.jit(pallas_loss)(W, x)
            case "checkpoint":
                return jax.checkpoint(pallas_loss)(W, x)
            case "scan":
                step = jax.checkpoint(lambda h, W: (jnp.tanh(layer()(W, h)), None))
                return lax.scan(step, x, W)[0].sum()
            case "cond":
                return lax.cond(x.sum() > 0, pallas_loss, lambda W, x: pallas_loss(2 * W, x), W, x)
        return pallas_loss(jnp.tanh(W.T).T, x)

    params, batch = (layers, X[..., :20]) if where == "scan" else (W, X)
    assert how(loss, params, batch) == "materialized"
    with rule_for_weight_kernel():
        assert how(loss, params, batch) == "factored"
        assert agrees(loss, params, batch)
        _, norms = jg.per_example_norms(loss)(params, batch)
    expected = directly(loss, params, batch).reshape(4, -1)
    np.testing.assert_allclose(norms, np.linalg.norm(expected, axis=1), rtol=1e-5)


def test_the_gradients_of_all_outputs_of_a_kernel_stay_factored():
    with rule_for_weight_kernel():
        J = jg.per_example_jacobian(lambda W, x: layer()(W, x).sum(0)[:5])
        assert quick_jit(lambda W, X: J(W, X).nbytes)(W, X) < 4 * 5 * W.nbytes / 4
        found = quick_jit(lambda W, X: J(W, X).materialize())(W, X)
    np.testing.assert_allclose(found, jax.vmap(jax.jacrev(lambda W, x: (x @ W).sum(0)[:5]), (None, 0))(W, X), rtol=1e-4)


def test_a_rule_for_one_kernel_is_not_asked_for_others():
    asked = []

    def equals(x, g, **params):
        asked.append(params["name"])
        return x.T @ g

    with jg.register_rule("pallas_call", equals, name="another"):
        assert how(pallas_loss, W, X) == "materialized"
    with jg.register_rule("pallas_call", equals, name="weight_kernel"):
        assert how(pallas_loss, W, X) == "factored"
    assert set(asked) == {"weight_kernel"}


def test_a_kernel_that_the_loss_batches_by_vmap_takes_the_direct_route_and_explain_says_so():
    def loss(W, x):
        return jax.vmap(pallas_loss, (None, 0))(W, x.reshape(3, 1, 30)).sum()

    with rule_for_weight_kernel():
        assert agrees(loss, W, X)
        assert "batched this kernel" in jg.explain(loss)(W, X).rows[0].why


def test_a_kernel_without_a_name_has_that_of_its_function():
    def multiplied(a, b):
        def product_kernel(a, b, out):
            out[...] = a[...].T @ b[...]

        out = jax.ShapeDtypeStruct((a.shape[1], b.shape[1]), a.dtype)
        return pl.pallas_call(product_kernel, out_shape=out, interpret=True)(a, b)

    def loss(W, x):
        return jnp.sin(layer(multiplied)(W, x)).sum()

    why = jg.explain(loss)(W, X).rows[0].why
    assert "the kernel 'product_kernel' computes: jaxgrad.register_rule(…, name='product_kernel')" in why
    with jg.register_rule("pallas_call", lambda a, b, **params: a.T @ b, name="product_kernel"):
        assert how(loss, W, X) == "factored"
        assert agrees(loss, W, X)
    with (
        jg.register_rule("pallas_call", lambda a, b, **params: a.T @ b, name="product_kernle"),
        pytest.raises(
            ValueError, match=r"pallas_call 'product_kernel'.* There are rules for pallas_call 'product_kernle'"
        ),
    ):
        jg.per_example.check_rule(multiplied, X[0], X[0])


def test_a_rule_that_multiplies_integers_makes_no_product_and_explain_says_why():
    product = primitive("int8_product", lambda a, b: (a.astype(jnp.int32).T @ b.astype(jnp.int32)).astype(jnp.float32))

    def loss(W, x):
        return jnp.sin(layer(lambda x, g: product.bind(jnp.round(x), jnp.round(g)))(W, x)).sum()

    def integers(a, b):
        return jnp.matmul(a.T.astype(jnp.int32), b.astype(jnp.int32)).astype(jnp.float32)

    with jg.register_rule(product, integers):
        assert "convert the operands to a floating dtype" in jg.explain(loss)(W, X).rows[0].why
    with jg.register_rule(product, lambda a, b: jnp.round(a).T @ jnp.round(b)):
        assert how(loss, W, X) == "factored"


def test_a_rule_that_declines_changes_nothing():
    with jg.register_rule("pallas_call", lambda *operands, **params: None):
        assert how(pallas_loss, W, X) == "materialized"
        assert agrees(pallas_loss, W, X)
        with pytest.raises(ValueError, match=r"check_rule: expected a rule that applies.*pallas_call declines"):
            check_rule(forward, X[0], W)
        with rule_for_weight_kernel():
            assert how(pallas_loss, W, X) == "factored"


def test_a_kernel_with_several_results_of_which_the_rule_knows_one():
    def both(x, g, W):
        def run(x, g, W, out, other):
            out[...], other[...] = x[...].T @ g[...], g[...] @ W[...].T

        shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (W, x)]
        return pl.pallas_call(run, out_shape=shapes, interpret=True, name="both")(x, g, W)

    @jax.custom_vjp
    def dense(W, x):
        return forward(x, W)

    dense.defvjp(lambda W, x: (forward(x, W), (W, x)), lambda kept, g: tuple(both(kept[1], g, kept[0])))

    def loss(W, x):
        return jnp.sin(dense(W, x)).sum()

    def two_layers(params, x):
        return jnp.sin(dense(params[1], jnp.tanh(dense(params[0], x)))).sum()

    params = (W, normal(3, 20, 25))
    with jg.register_rule("pallas_call", lambda x, g, W, **params: [x.T @ g, None], name="both"):
        assert how(loss, W, X) == "factored"
        assert [row.how for row in jg.explain(two_layers)(params, X).rows] == ["factored"] * 2
        assert agrees(loss, W, X)
        assert agrees(two_layers, params, X)
        assert check_rule(both, X[0], X[0, :, :20], W).agrees


# --- Primitives made by hand ---------------------------------------------------------------------------------------


def test_a_primitive_that_makes_a_product_and_one_that_keeps_it():
    assert jg.explain(own_loss)(W, X).rows[0].primitive == "half"
    with jg.register_rule(product_p, RULES[product_p]):
        assert how(own_loss, W, X) == "materialized"
        with jg.register_rule(half_p, RULES[half_p]):
            row = jg.explain(own_loss)(W, X).rows[0]
            assert (row.how, row.factors) == ("factored", ("Outer([4, 3, 30], [4, 3, 20])",))
            assert agrees(own_loss, W, X)
            report = check_rule(jax.grad(own_loss), W, X[0])
    assert report.agrees
    assert report.factored
    operands = [(row.rule, row.operand) for row in report.rows]
    assert operands[-2:] == [("half", "arrays"), ("half", "operand 0 a product")]
    assert str(report).count("\n") == len(report.rows) - 1


def test_the_primitive_itself_computes_what_is_not_part_of_a_product():
    """A rule that is only near the primitive shows which of the two computed a number."""
    near = primitive("near", lambda a, b: a @ b)

    @jax.custom_vjp
    def dense(W, x):
        return x @ W

    dense.defvjp(lambda W, x: (x @ W, (W, x)), lambda kept, g: (near.bind(kept[1].T, g), g @ kept[0].T))

    def loss(W, x):
        return jnp.sin(dense(W, x)).sum()

    small, long = W[:4, :3], normal(4, 4, 50, 4)
    with jg.register_rule(near, lambda a, b: 3 * (a @ b)):
        row = jg.explain(loss)(small, long).rows[0]
        assert (row.how, row.why) == ("materialized", "smaller")
        assert agrees(loss, small, long)
        found = jg.per_example_grad(loss)(W, X).materialize()
    np.testing.assert_allclose(found, 3 * directly(loss, W, X), rtol=1e-4, atol=1e-4)


def test_a_map_of_weights_in_a_loop_that_all_examples_share():
    def loss(W, x):
        W = lax.fori_loop(0, 3, lambda i, w: half_p.bind(w) + 0.1 * jnp.flip(w, 0), W)
        return jnp.sin(x @ W).sum()

    with jg.register_rule(half_p, RULES[half_p]):
        assert agrees(loss, W, X)
        g = jg.per_example_grad(loss)(W, X)
        expected = directly(loss, W, X)
        np.testing.assert_allclose(g.dot(W), np.einsum("bij,ij->b", expected, W), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(g.norms(), np.sqrt((expected**2).sum((1, 2))), rtol=1e-4)


def test_a_rule_may_use_a_value_that_is_traced_now():
    @jax.jit
    def run(c, W, X):
        with jg.register_rule(half_p, lambda a: c * a):
            return jg.per_example_grad(lambda W, x: jnp.sin(x @ half_p.bind(W)).sum())(W, X).norms()

    for _ in range(2):
        norms = run(jnp.float32(0.5), W, X)
        run.clear_cache()
    expected = directly(lambda W, x: jnp.sin(x @ (W / 2)).sum(), W, X)
    np.testing.assert_allclose(norms, np.sqrt((expected**2).sum((1, 2))), rtol=1e-5)


# --- The registry ---------------------------------------------------------------------------------------------------


def test_a_rule_is_registered_once():
    with jg.register_rule(half_p, RULES[half_p]) as rule:
        assert str(rule) == "the rule for half"
        for again in (half_p, "half"):
            with pytest.raises(ValueError, match=r"register_rule: expected a primitive without a rule, got half"):
                jg.register_rule(again, RULES[half_p])
        with jg.register_rule(half_p, lambda a: None, override=True):
            assert check_rule(half_p.bind, W).agrees
        with jg.register_rule("half", lambda a: a, override=True), pytest.raises(AssertionError):
            check_rule(half_p.bind, W)
        rule.remove()
        with jg.register_rule(half_p, RULES[half_p]):
            assert check_rule(half_p.bind, W).agrees
        rule.remove()


@pytest.mark.parametrize("primitive", [lax.dot_general_p, "dot_general", "transpose", "ragged_dot_general"])
def test_a_primitive_that_is_known_already_needs_override(primitive):
    with pytest.raises(ValueError, match="for which jaxgrad has its own"):
        jg.register_rule(primitive, lambda *a, **params: None)
    with jg.register_rule(primitive, lambda *a, **params: None, override=True):
        loss = lambda W, x: jnp.sin(x @ W.T).sum()  # noqa: E731
        assert how(loss, W.T, X) == "factored"
        assert agrees(loss, W.T, X)


def test_a_registered_rule_is_asked_before_a_known_one():
    def by_hand(a, b, *, dimension_numbers, **params):
        if dimension_numbers != (((0,), (0,)), ((), ())) or a.ndim != 2 or b.ndim != 2:
            return None
        return (a[:, :, None] * b[:, None, :]).sum(0)

    one = lambda W, x: jnp.sin(x[:1] @ W).sum()  # noqa: E731
    with jg.register_rule(lax.dot_general_p, by_hand, override=True):
        assert agrees(one, W, X)
        assert check_rule(lambda a, b: lax.dot_general(a, b, (((0,), (0,)), ((), ()))), X[0], X[0, :, :20]).agrees


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((kernel, lambda a: a), TypeError, "expected a primitive or its name, got function"),
        (("", lambda a: a), TypeError, "expected a primitive or its name, got str"),
        ((half_p, "a / 2"), TypeError, "expected equals to be a function, got str"),
        (("jit", lambda a: a), ValueError, "got jit. Register a rule for the primitive inside of it"),
        ((lax.scan_p, lambda a: a), ValueError, "got scan. Register a rule for the primitive inside of it"),
    ],
)
def test_what_cannot_be_registered(arguments, error, message):
    with pytest.raises(error, match=f"register_rule: .*{message}"):
        jg.register_rule(*arguments)


def test_a_jitted_function_keeps_the_rules_it_was_traced_with():
    norms = jax.jit(lambda W, X: jg.per_example_grad(own_loss)(W, X).nbytes)
    before = int(norms(W, X))
    with jg.register_rule(half_p, RULES[half_p]), jg.register_rule(product_p, RULES[product_p]):
        assert int(norms(W, X)) == before
        assert jg.per_example_grad(own_loss)(W, X).nbytes < before


def test_rules_are_registered_from_many_threads():
    names = [f"thread_{k}" for k in range(16)]
    rules = []

    def work(name):
        rules.append(jg.register_rule("pallas_call", lambda a, b, **params: a @ b, name=name))

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {rule.name for rule in registered.rules()} >= set(names)
    for rule in rules:
        rule.remove()
