"""check_rule: test the rules that `register_rule` has registered, on random operands."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxgrad import _jax
from jaxgrad.errors import naming
from jaxgrad.per_example.interpreter import registered
from jaxgrad.per_example.interpreter.values import Shared, Unevaluated, Value, array_of, is_zero, without_as_written
from jaxgrad.per_example.interpreter.walk import evaluate


class RuleRow(NamedTuple):
    """The result of one comparison of a rule with its primitive by `check_rule`.

    Attributes:
        rule: the primitive, and the name for which the rule is registered.
        operand: "arrays" if all operands were arrays; otherwise the operand that was an unevaluated product.
        factored: whether the result was an unevaluated product.
        deviation: the largest difference between the results of the rule and of the primitive, divided by the largest
            entry.
        allowed: the largest deviation that is accepted.

    Example:
        >>> with jg.register_rule("integer_pow", lambda x, y: x * x if y == 2 else None):
        ...     print(check_rule(lambda x: jax.lax.integer_pow(x, 2), jnp.ones((4, 6), jnp.float32)).rows[0])
        integer_pow  arrays  materialized  0.0e+00 of 6.4e-06
    """

    rule: str
    operand: str
    factored: bool
    deviation: float
    allowed: float

    @property
    def agrees(self) -> bool:
        """Whether the deviation is at most the allowed one; False if it is NaN."""
        return self.deviation <= self.allowed

    def __str__(self) -> str:
        held = "factored" if self.factored else "materialized"
        return f"{self.rule}  {self.operand}  {held}  {self.deviation:.1e} of {self.allowed:.1e}"


@dataclass(frozen=True)
class RuleReport:
    """The comparisons of `check_rule`; they print as a table.

    Attributes:
        rows: for each equation, one row for arrays, and one for each operand that was replaced by a product.

    Example:
        >>> with jg.register_rule("square", lambda x: x * x):
        ...     check_rule(jnp.square, jnp.ones((4, 6))).agrees
        True
    """

    rows: tuple[RuleRow, ...]

    @property
    def agrees(self) -> bool:
        """Whether all rows agree."""
        return all(row.agrees for row in self.rows)

    @property
    def factored(self) -> bool:
        """Whether any result stays factored; if none does, the rule is of no use at these shapes."""
        return any(row.factored for row in self.rows)

    def __str__(self) -> str:
        useless = (
            [] if self.factored else ["No result stays factored: explain says why where a loss uses the primitive."]
        )
        return "\n".join([*map(str, self.rows), *useless])


def check_rule(fun: Callable[..., Any], *operands: Any, rtol: float | None = None, seed: int = 0) -> RuleReport:
    """Check the registered rules of all primitives that a function uses, on random operands.

    For each equation of the function whose primitive has a rule, the rule and the primitive must give the same result:
    on the given operands, on random operands, and on random operands of which one is a product u ⊗ v. In the last case,
    applying the rule to the unevaluated product and then materializing the result must give the same as applying the
    primitive to the materialized product.

    Args:
        fun: a function that uses the primitives, such as the function that calls your kernel. For a kernel in the
            backward pass of a `jax.custom_vjp`, pass the gradient, `jax.grad(loss)`.
        operands: the arguments of fun, trees of arrays. Random numbers replace arrays of floating dtypes; integers and
            booleans stay as they are. A product stays factored only if its operands hold fewer numbers than its result,
            so pass matrices of at least 8 × 8.
        rtol: the largest deviation that is accepted, relative to the largest entry of the result; None for eps^(3/4),
            where eps is that of the result's dtype: about 6e-6 in float32.
        seed: the seed of the random numbers.

    Returns:
        A `RuleReport`, in which all rows agree.

    Raises:
        AssertionError: a rule disagrees with its primitive; the message names the rule, the operand and the deviation.
        ValueError: nothing was checked, because the function uses no primitive that has a rule, uses it only inside a
            loop or a branch, or because the rule declines; or a rule raises an error or returns a shape that is not
            that of the primitive's result.

    Example:
        >>> with jg.register_rule("sin", lambda x, **params: x - x**3 / 6):               # a wrong rule
        ...     check_rule(jnp.sin, jnp.ones((10, 12), jnp.float32))
        Traceback (most recent call last):
        AssertionError: check_rule: expected the rule for sin to agree with the primitive, got: ...
    """
    with naming("check_rule"):
        leaves, tree = jax.tree.flatten(operands)
        leaves = [jnp.asarray(leaf) for leaf in leaves]
        closed = jax.make_jaxpr(lambda *leaves: fun(*jax.tree.unflatten(tree, leaves)))(*leaves)
        program, survey = _jax.program_of(closed), _Survey([], [], set())
        operand_values = jax.jit(lambda leaves: list(_evaluated(program, leaves, survey)))(leaves)
        rng = np.random.default_rng(seed)
        rows: list[RuleRow] = []
        for (eqn, reference), values in zip(survey.checked, operand_values, strict=True):
            rows += _equation_rows(eqn, reference, values, rng, rtol)
        if not rows:
            _refuse_unchecked(program, survey)
        for row in rows:
            if not row.agrees:
                raise AssertionError(
                    f"check_rule: expected the rule for {row.rule} to agree with the primitive, got: a deviation of "
                    f"{row.deviation:.1e} with operands ({row.operand}), allowed is {row.allowed:.1e}. Correct `equals`"
                    f", or let it return None for such operands."
                )
        return RuleReport(tuple(rows))


class _Survey(NamedTuple):
    """A program's equations with a rule that applies, the rules that decline, and the names of all primitives.

    The name of a primitive is followed by that of the kernel, as in "pallas_call 'matmul'".
    """

    checked: list[tuple[_jax.Equation, registered.Reference]]
    declined: list[str]
    names: set[str]


def _evaluated(program: _jax.Program, operands: Sequence[Any], survey: _Survey) -> Iterator[list[Any]]:
    """Evaluate a program, inner jits included, and fill the survey; yield the operands of each equation to check."""
    known = dict(zip(program.jaxpr.constvars, program.consts, strict=True))
    known |= dict(zip(program.jaxpr.invars, operands, strict=True))
    for eqn in program.jaxpr.eqns:
        values = [v.val if isinstance(v, _jax.Literal) else known[v] for v in eqn.invars]
        kernel = _jax.kernel_name(eqn) if _jax.is_foreign(eqn) else None
        survey.names.add(eqn.primitive.name if kernel is None else f"{eqn.primitive.name} {kernel!r}")
        if eqn.primitive is _jax.jit_p:
            yield from _evaluated(_jax.body(eqn), values, survey)
        elif (rule := registered.rule_of(eqn)) is not None:
            reference = registered.reference_of(eqn)
            if reference is None:
                survey.declined.append(str(rule))
            else:
                survey.checked.append((eqn, reference))
                yield [jnp.asarray(value, v.aval.dtype) for value, v in zip(values, eqn.invars, strict=True)]
        known |= dict(zip(eqn.outvars, _jax.bind(eqn, values), strict=True))


def _refuse_unchecked(program: _jax.Program, survey: _Survey) -> None:
    """Raise the ValueError that says why no equation was checked."""
    if survey.declined:
        raise ValueError(f"check_rule: expected a rule that applies, got: the rule for {survey.declined[0]} declines.")
    inner = [eqn for eqn in _jax.equations_in(program.jaxpr) if registered.rule_of(eqn) is not None]
    if inner:
        raise ValueError(
            f"check_rule: expected a primitive with a rule outside of loops, branches and functions with custom "
            f"derivatives, got {inner[0].primitive} inside of one. Pass the function that calls it."
        )
    raise ValueError(
        f"check_rule: expected a function that uses a primitive with a registered rule, got the primitives "
        f"{', '.join(sorted(survey.names)) or '(none)'}. There are rules for "
        f"{', '.join(map(str, registered.rules())) or 'none'}. For a rule of a backward pass, pass the gradient "
        f"function."
    )


def _equation_rows(
    eqn: _jax.Equation, reference: registered.Reference, values: list[Any], rng: np.random.Generator, rtol: float | None
) -> list[RuleRow]:
    """The comparisons for one equation."""
    inexact = [jnp.issubdtype(v.dtype, jnp.inexact) for v in values]
    random = [_random(rng, v) if is_inexact else v for v, is_inexact in zip(values, inexact, strict=True)]
    rows = [_row(eqn, reference, "arrays", random, None, rtol)]
    as_given = _row(eqn, reference, "arrays", values, None, rtol)
    if not as_given.agrees:
        rows = [as_given]
    for k, (v, is_inexact) in enumerate(zip(values, inexact, strict=True)):
        if is_inexact and v.ndim > 1 and v.size:
            sides = _small_integers(rng, v.shape[:1], v.dtype), _small_integers(rng, v.shape[1:], v.dtype)
            rows.append(_row(eqn, reference, f"operand {k} a product", random, (k, *sides), rtol))
    return rows


def _random(rng: np.random.Generator, a: Any) -> Any:
    """Random numbers with the shape and dtype of an array."""
    numbers = rng.normal(size=a.shape)
    if jnp.issubdtype(a.dtype, jnp.complexfloating):
        numbers = numbers + 1j * rng.normal(size=a.shape)
    return jnp.asarray(numbers).astype(a.dtype)


def _small_integers(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> Any:
    """Numbers whose products are exact in every floating dtype, so that only the rule can make a difference."""
    return jnp.asarray(rng.choice([-3, -2, -1, 1, 2, 3], size=shape)).astype(dtype)


def _row(
    eqn: _jax.Equation,
    reference: registered.Reference,
    operand: str,
    values: list[Any],
    product: tuple[int, Any, Any] | None,
    rtol: float | None,
) -> RuleRow:
    """Compare the rule with the primitive on these operands; `product` (k, u, v) replaces operand k by u ⊗ v."""

    def primitive(sides: Sequence[Any], operands: Sequence[Any]) -> list[Any]:
        operands = list(operands)
        if product is not None:
            operands[product[0]] = _outer(*sides)
        results = _jax.bind(eqn, operands)
        return [results[k] for k in reference.results]

    sides = product[1:] if product is not None else ()
    kinds: list[bool] = []

    def by_rule(sides: Sequence[Any], operands: Sequence[Any], shared: bool) -> list[Any]:
        if product is None:
            count = len(reference.results)
            kinds.extend(isinstance(r, Unevaluated) for r in _walked(reference.program, list(operands)))
            results = evaluate(reference.program, operands, [False] * count, [True] * count)
            return [jnp.asarray(array_of(r)) for r in results]
        program = _jax.program_of(jax.make_jaxpr(primitive)(sides, operands))
        results = _walked(program, [*sides, *(Shared(v) if shared else v for v in operands)])
        kinds.extend(isinstance(r, Unevaluated) and not is_zero(r) for r in results)
        return [jnp.asarray(array_of(without_as_written(r))) for r in results]

    expected = jax.jit(primitive)(sides, values)
    worst = RuleRow(str(reference.rule), operand, False, 0.0, 0.0)
    for shared in (False, True) if product is not None else (False,):
        results = jax.jit(by_rule, static_argnums=2)(sides, values, shared)
        for a, b in zip(results, expected, strict=True):
            allowed = _allowed(b.dtype) if rtol is None else rtol
            row = worst._replace(deviation=_deviation(a, b), allowed=allowed)
            if worst.agrees and not row.deviation / (allowed or 1.0) < worst.deviation / (worst.allowed or 1.0):
                worst = row
    return worst._replace(factored=any(kinds))


def _walked(program: _jax.Program, values: Sequence[Value]) -> list[Value]:
    all_results = [True] * len(program.jaxpr.outvars)
    return evaluate(program, values, all_results, all_results)


def _outer(u: Any, v: Any) -> Any:
    narrow = jnp.issubdtype(u.dtype, jnp.floating) and u.dtype.itemsize < 2
    dtype = jnp.float32 if narrow else u.dtype
    return lax.dot_general(u.astype(dtype), v.astype(dtype), (((), ()), ((), ()))).astype(u.dtype)


def _deviation(result: Any, expected: Any) -> float:
    """The largest difference, divided by the largest finite entry; entries that are both NaN or infinite are equal."""
    wide = np.complex128 if jnp.iscomplexobj(expected) else np.float64
    a, b = np.asarray(result).astype(wide), np.asarray(expected).astype(wide)
    different = ~((a == b) | (np.isnan(a) & np.isnan(b)))
    size = np.abs(b[np.isfinite(b)]).max(initial=0)
    return float(np.abs(a[different] - b[different]).max(initial=0) / (size if size > 0 else 1))


def _allowed(dtype: Any) -> float:
    return float(jnp.finfo(dtype).eps) ** 0.75 if jnp.issubdtype(dtype, jnp.inexact) else 0.0
