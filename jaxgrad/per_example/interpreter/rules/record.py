"""What is known of one primitive, and what the records are written with."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxgrad import _jax
from jaxgrad.per_example.interpreter.undone import Term
from jaxgrad.per_example.interpreter.values import Undone, Value, mapped

Keeps = Callable[[_jax.Equation, Sequence[Value]], Sequence[Value] | None]
Makes = Callable[[_jax.Equation, Sequence[Value]], Term | None]
Operands = Callable[[_jax.Equation], Sequence[int]]


def first(eqn: _jax.Equation) -> Sequence[int]:
    """The first operand."""
    return (0,)


def every(eqn: _jax.Equation) -> Sequence[int]:
    """All operands."""
    return range(len(eqn.invars))


class Record(NamedTuple):
    """One primitive. Whatever is not said is evaluated, never guessed.

    Attributes:
        keeps: what it does to undone products among its operands, as values; None, or a result None, if it cannot say.
        makes: the undone product that it makes of arrays; None, or a result None, if it makes none.
        operands: which operands may be undone products, or maps that all examples share.
        keeps_zero: whether zeros in all of these give zeros.
        linear: the operands in which it is linear, all together, with the others fixed; None for `operands`.
        bilinear: whether it is linear in one of `operands` with the others fixed, and not in all together.
        identity: whether each result is its operand.
    """

    keeps: Keeps | None = None
    makes: Makes | None = None
    operands: Operands = first
    keeps_zero: bool = True
    linear: Operands | None = None
    bilinear: bool = False
    identity: bool = False

    def linear_in(self, eqn: _jax.Equation) -> Sequence[int]:
        """The operands in which it is linear."""
        return (self.linear or self.operands)(eqn)


def each(
    eqn: _jax.Equation, value: Undone, function: Callable[[Term], Any], out: int = 0, on_windows: bool = False
) -> Undone | None:
    """Every term of a value through a function, as the equation's result number `out`."""
    aval = eqn.outvars[out].aval
    return mapped(value, aval.shape, aval.dtype, function, on_windows)


def on_first(function: Callable[[_jax.Equation, Term], Any], on_windows: bool = False) -> Keeps:
    """Of a primitive with one result, that moves about its first operand."""

    def keeps(eqn: _jax.Equation, values: Sequence[Value]) -> Sequence[Value] | None:
        if not isinstance(values[0], Undone):
            return None
        result = each(eqn, values[0], lambda term: function(eqn, term), on_windows=on_windows)
        return None if result is None else [result]

    return keeps


def axes_of(eqn: _jax.Equation, name: str) -> list[int]:
    """Axes in the params; NumPy's integers are allowed there."""
    return [int(k) for k in eqn.params[name]]
