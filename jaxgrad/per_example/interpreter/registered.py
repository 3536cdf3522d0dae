"""Rules that users register: what a primitive computes, written in operations that the interpreter knows.

Such a rule is a function of the primitive's operands. The interpreter traces it and walks the program in place of the
equation, to find the product in it; numbers that are not part of a product come from the primitive itself.
"""

import functools
import threading
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from jaxgrad import _jax
from jaxgrad.errors import caller
from jaxgrad.per_example.interpreter.rules import ragged


@dataclass(frozen=True, eq=False)
class Rule:
    """One registered rule.

    Attributes:
        primitive: the primitive, or its name.
        name: the name that the call must carry; None for all calls.
        equals: (operands, params) → the results, or None to decline.
    """

    primitive: _jax.Primitive | str
    name: str | None
    equals: Callable[..., Any]

    @property
    def key(self) -> tuple[str, str | None]:
        """What the rule is registered for; two primitives of one name are told apart by `concerns`."""
        return str(self.primitive), self.name

    def concerns(self, eqn: _jax.Equation) -> bool:
        """Whether the rule is for this equation; kernels that were batched by `jax.vmap` have other operands."""
        if eqn.primitive is not self.primitive and eqn.primitive.name != self.primitive:
            return False
        named = self.name is None or _jax.kernel_name(eqn) == self.name
        return named and not _jax.is_batched_kernel(eqn)

    def __str__(self) -> str:
        return f"{self.primitive}" if self.name is None else f"{self.primitive} {self.name!r}"


class Reference(NamedTuple):
    """What one equation computes, in other operations.

    Attributes:
        rule: the rule that says so.
        program: the program, with the equation's operands.
        results: for each result of the program, the number of the equation's result that it equals.
    """

    rule: Rule
    program: _jax.Program
    results: tuple[int, ...]


_LOCK = threading.Lock()
_RULES: tuple[Rule, ...] = ()  # the newest first; replaced as a whole, so that a reader needs no lock
_INSIDE: ContextVar[tuple[Rule, ...]] = ContextVar("inside", default=())  # the rules that are being traced


BUILT_IN = tuple(Rule(name, None, equals) for name, equals in ragged.EQUALS.items())
"""Rules of this form that jaxgrad has itself."""


def rules() -> tuple[Rule, ...]:
    """The registered rules, the newest first."""
    return _RULES


def add(rule: Rule, override: bool) -> None:
    """Register a rule; it is an error if there is one for the same calls, unless `override` is set."""
    global _RULES
    with _LOCK:
        if not override and any(_same(rule, other) for other in _RULES):
            raise ValueError(
                f"{caller()}: expected a primitive without a rule, got {rule}, which has one. Pass override=True to "
                f"put this rule before it, or name= to tell two kernels apart."
            )
        _RULES = (rule, *_RULES)


def _same(rule: Rule, other: Rule) -> bool:
    both = {rule.primitive, other.primitive}
    names = {str(primitive) for primitive in both}
    return rule.name == other.name and (len(both) == 1 or (len(names) == 1 and any(isinstance(p, str) for p in both)))


def remove(rule: Rule) -> None:
    """Remove a rule; nothing happens if it was removed before."""
    global _RULES
    with _LOCK:
        _RULES = tuple(other for other in _RULES if other is not rule)


def is_inside(eqn: _jax.Equation) -> bool:
    """Whether there is a rule for an equation in the programs within this one."""
    if not _RULES:
        return False
    return any(
        rule.concerns(inner) for jaxpr in _jax.programs_in(eqn) for inner in _jax.equations_in(jaxpr) for rule in _RULES
    )


def rule_of(eqn: _jax.Equation) -> Rule | None:
    """The first rule for this equation, which may decline."""
    return next((rule for rule in (*_RULES, *BUILT_IN) if rule.concerns(eqn)), None)


def reference_of(eqn: _jax.Equation) -> Reference | None:
    """What the equation computes, by the first rule that does not decline; None if all do."""
    known = (*_RULES, *BUILT_IN)
    if eqn.effects:
        return None
    for rule in known:
        if rule.concerns(eqn):
            found = _cached(rule, eqn, known)
            # Constants may be traced values of the program that is being traced now, which no other may use.
            found = _reference(rule, eqn) if found is not None and found.program.consts else found
            if found is not None:
                return found
    return None


@functools.lru_cache(512)
def _cached(rule: Rule, eqn: _jax.Equation, known: tuple[Rule, ...]) -> Reference | None:
    found = _reference(rule, eqn)
    if found is None or not found.program.consts:
        return found
    return found._replace(program=found.program._replace(consts=(None,)))  # not to be used, nor held


def _reference(rule: Rule, eqn: _jax.Equation) -> Reference | None:
    if rule in _INSIDE.get():
        raise ValueError(
            f"{caller()}: expected the rule for {rule} in terms of other primitives, got one that comes back to it. "
            f"Write `equals` in operations of jax.numpy and jax.lax."
        )
    results: list[int] | None = None

    def function(*operands: Any) -> list[Any]:
        nonlocal results
        found = _results_of(rule, eqn, operands)
        if found is None:
            return []
        results = [k for k, result in enumerate(found) if result is not None]
        return [_as_result(rule, k, found[k], eqn.outvars[k].aval) for k in results]

    token = _INSIDE.set((*_INSIDE.get(), rule))
    try:
        program = _jax.traced_for(function, eqn)
        if results is None:
            return None
        if program.jaxpr.effects:
            raise ValueError(f"{caller()}: expected a rule for {rule} without effects, got {program.jaxpr.effects}.")
        for inner in _jax.equations_in(program.jaxpr):
            reference_of(inner)
    finally:
        _INSIDE.reset(token)
    return Reference(rule, program, tuple(results))


def _results_of(rule: Rule, eqn: _jax.Equation, operands: Sequence[Any]) -> Sequence[Any] | None:
    shapes = ", ".join(_named(v.aval) for v in eqn.invars)
    try:
        found = rule.equals(*operands, **eqn.params)
    except Exception as error:
        raise ValueError(
            f"{caller()}: the rule for {rule} raised {type(error).__name__} at operands ({shapes}): {error}. "
            f"It is given the params as keyword arguments. Return None for operands that the rule is not meant for."
        ) from error
    if found is None:
        return None
    found = found if isinstance(found, list | tuple) else [found]
    if len(found) != len(eqn.outvars):
        raise ValueError(
            f"{caller()}: expected the rule for {rule} to return {len(eqn.outvars)} results at operands ({shapes}), "
            f"as the primitive does, got {len(found)}. Put None in place of a result that it does not know."
        )
    return found


def _as_result(rule: Rule, k: int, found: Any, aval: Any) -> Any:
    """A result of a rule in the primitive's dtype."""
    result = jnp.asarray(found)
    kinds = [_kind(a.dtype) for a in (result, aval)]
    if tuple(result.shape) != tuple(aval.shape) or kinds[0] != kinds[1]:
        raise ValueError(
            f"{caller()}: expected {_named(aval)} as result {k} of the rule for {rule}, as the primitive returns, got "
            f"{_named(result)}. Return None for operands that the rule is not meant for."
        )
    return result if result.dtype == aval.dtype else lax.convert_element_type(result, aval.dtype)


def _kind(dtype: Any) -> Any:
    """What may be converted to each other: floating dtypes, complex dtypes; any other dtype is its own kind."""
    return next((kind for kind in (jnp.floating, jnp.complexfloating) if jnp.issubdtype(dtype, kind)), dtype)


def _named(aval: Any) -> str:
    return f"{aval.dtype}{list(aval.shape)}"
