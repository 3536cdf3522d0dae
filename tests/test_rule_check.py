"""check_rule: wrong rules are found, right ones accepted, and rules that do not fit are errors."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from support.own_primitives import RULES, W, X, half_p, normal, primitive, product_p

import jaxgrad as jg
from jaxgrad.per_example import check_rule
from jaxgrad.per_example.interpreter import registered


@pytest.fixture(autouse=True)
def _no_rule_is_left():
    before = registered.rules()
    yield
    assert registered.rules() == before


@pytest.mark.parametrize(
    ("equals", "message"),
    [
        (lambda a, b, *, alpha: a @ b, r"rule for scaled_product .*deviation of 4\.3e-01 with operands \(arrays\)"),
        (lambda a, b, *, alpha: 0.7001 * (a @ b), r"rule for scaled_product .*deviation of 1\.4e-04"),
        (lambda a, b, *, alpha: alpha * (a @ b[::-1]), r"rule for scaled_product .*with operands \(arrays\)"),
        (lambda a, b, *, alpha: alpha * (a @ b) + 1e-3, r"rule for scaled_product .*deviation"),
        (lambda a, b, *, alpha: jnp.full((8, 9), jnp.nan, a.dtype), r"deviation of nan"),
    ],
)
def test_the_check_finds_a_wrong_rule(equals, message):
    with jg.register_rule(product_p, equals), pytest.raises(AssertionError, match=message):
        check_rule(lambda a, b: product_p.bind(a, b, alpha=0.7), normal(7, 8, 10), normal(8, 10, 9))


def test_the_check_finds_a_rule_that_is_wrong_where_an_operand_is_a_product():
    """The second rule is right for the numbers that are drawn from a normal distribution."""
    round_p = primitive("round_to_halves", lambda a: jnp.round(a * 2) / 2)
    with jg.register_rule(round_p, lambda a: a), pytest.raises(AssertionError, match="round_to_halves"):
        check_rule(round_p.bind, normal(7, 8, 10))
    square_p = primitive("square_of_large", lambda a: jnp.where(jnp.abs(a) > 5, a * a, a))
    message = r"square_of_large .*\(operand 0 a product\)"
    with jg.register_rule(square_p, lambda a: a), pytest.raises(AssertionError, match=message):
        check_rule(square_p.bind, normal(7, 8, 10))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64, jnp.complex64])
def test_the_check_accepts_a_right_rule_in_every_dtype(dtype):
    with jg.register_rule(product_p, RULES[product_p]):
        report = check_rule(
            lambda a, b: product_p.bind(a, b, alpha=0.5), jnp.ones((8, 40), dtype), jnp.zeros((40, 9), dtype)
        )
    assert len(report.rows) == 3


def test_the_check_is_an_error_if_there_is_nothing_to_check():
    with pytest.raises(
        ValueError, match=r"check_rule: expected a function that uses .* got the primitives half, sin\."
    ):
        check_rule(lambda a: jnp.sin(half_p.bind(a)), W)
    with jg.register_rule(half_p, RULES[half_p]):
        with pytest.raises(ValueError, match=r"outside of loops, .* got half inside of one"):
            check_rule(lambda a: lax.fori_loop(0, 2, lambda i, a: half_p.bind(a), a), W)
        assert check_rule(jax.jit(lambda a: half_p.bind(a) + 1), W).agrees


@pytest.mark.parametrize(
    ("equals", "message"),
    [
        (lambda a: a @ a, r"per_example_grad: the rule for half raised TypeError at operands \(float32\[30, 20\]\)"),
        (lambda a: a.T, r"expected float32\[30, 20\] as result 0 of the rule for half, .* got float32\[20, 30\]"),
        (lambda a: [a, a], r"expected the rule for half to return 1 results .* got 2"),
        (lambda a: a > 0, r"expected float32\[30, 20\] as result 0 of the rule for half, .* got bool\[30, 20\]"),
        (lambda a: half_p.bind(a), r"expected the rule for half in terms of other primitives, got one that comes back"),
        (lambda a: jax.debug.print("{}", a) or a, r"expected a rule for half without effects"),
    ],
)
def test_a_rule_that_does_not_fit_is_an_error(equals, message):
    with jg.register_rule(half_p, equals), pytest.raises(ValueError, match=message):
        jg.per_example_grad(lambda W, x: jnp.sin(x @ half_p.bind(W)).sum())(W, X)


def test_rules_that_call_each_other_are_an_error():
    double_p = primitive("double", lambda a: a * 2)
    with (
        jg.register_rule(half_p, lambda a: double_p.bind(a) / 4),
        jg.register_rule(double_p, lambda a: half_p.bind(a) * 4),
        pytest.raises(ValueError, match="comes back to it"),
    ):
        check_rule(half_p.bind, W)
    with jg.register_rule(half_p, lambda a: double_p.bind(a) / 4), jg.register_rule(double_p, lambda a: a * 2):
        assert check_rule(half_p.bind, W).factored


def test_a_report_says_if_a_rule_keeps_no_product():
    with jg.register_rule("integer_pow", lambda x, y: x * x if y == 2 else None):
        report = check_rule(lambda x: jax.lax.integer_pow(x, 2), jnp.ones((4, 6), jnp.float32))
    assert report.agrees
    assert "No result stays factored" in str(report)
