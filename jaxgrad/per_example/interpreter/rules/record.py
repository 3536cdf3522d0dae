"""The record of one primitive, and helpers to write records."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxgrad import _jax
from jaxgrad.per_example.algebra.product import Product
from jaxgrad.per_example.interpreter.values import Unevaluated, Value, mapped

Keeps = Callable[[_jax.Equation, Sequence[Value]], Sequence[Value] | None]
Makes = Callable[[_jax.Equation, Sequence[Value]], Product | None]
Operands = Callable[[_jax.Equation], Sequence[int]]


def first(eqn: _jax.Equation) -> Sequence[int]:
    """The first operand."""
    return (0,)


def every(eqn: _jax.Equation) -> Sequence[int]:
    """All operands."""
    return range(len(eqn.invars))


class Record(NamedTuple):
    """The rules for one primitive. A case without a rule is evaluated, never guessed.

    Attributes:
        keeps: a function from operands, some of them unevaluated products, to the results; the function is None, or
            returns None, if the primitive has no such rule.
        makes: a function from arrays to the unevaluated product that the primitive makes of them; the function is
            None, or returns None, if it makes none.
        operands: which operands may be unevaluated products, or maps shared by all examples.
        keeps_zero: whether the results are zero if all of these operands are.
        linear: the operands in which the primitive is jointly linear, with the others fixed; None for `operands`.
        bilinear: whether it is linear in each of `operands` with the others fixed, but not jointly.
        identity: whether each result equals its operand.
    """

    keeps: Keeps | None = None
    makes: Makes | None = None
    operands: Operands = first
    keeps_zero: bool = True
    linear: Operands | None = None
    bilinear: bool = False
    identity: bool = False

    def linear_in(self, eqn: _jax.Equation) -> Sequence[int]:
        """The operands in which the primitive is linear."""
        return (self.linear or self.operands)(eqn)


def each(
    eqn: _jax.Equation, value: Unevaluated, function: Callable[[Product], Any], out: int = 0, on_windows: bool = False
) -> Unevaluated | None:
    """Apply a function to every term of a value; the result stands for the equation's result number `out`."""
    aval = eqn.outvars[out].aval
    return mapped(value, aval.shape, aval.dtype, function, on_windows)


def on_first(function: Callable[[_jax.Equation, Product], Any], on_windows: bool = False) -> Keeps:
    """Lift a function on products to a rule for a primitive with one result that rearranges its first operand."""

    def keeps(eqn: _jax.Equation, values: Sequence[Value]) -> Sequence[Value] | None:
        if not isinstance(values[0], Unevaluated):
            return None
        result = each(eqn, values[0], lambda term: function(eqn, term), on_windows=on_windows)
        return None if result is None else [result]

    return keeps


def axes_of(eqn: _jax.Equation, name: str) -> list[int]:
    """The axes in a param, as Python integers; JAX allows NumPy's there."""
    return [int(k) for k in eqn.params[name]]
