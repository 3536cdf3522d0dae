"""An equation's results as the program computes them, for values that turn out not to be held as products."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Array

from jaxgrad import _jax
from jaxgrad.per_example.interpreter.cost_model import worth_holding
from jaxgrad.per_example.interpreter.measuring import stays_factored
from jaxgrad.per_example.interpreter.reasons import FORMED
from jaxgrad.per_example.interpreter.rules import bind
from jaxgrad.per_example.interpreter.values import Plain, Unevaluated, Value, array_of, is_zero


class AsWritten:
    """An equation's results as the program computes them, evaluated when they are first needed."""

    def __init__(self, eqn: _jax.Equation, values: Sequence[Value]):
        self.eqn, self.values = eqn, values
        self.results: list[Any] | None = None

    def evaluated(self) -> list[Any]:
        """The results. Their operands are evaluated first, in a loop and not by recursion, as the chain may be long."""
        waiting = [self]
        while waiting:
            written = waiting[-1]
            before = [
                v.as_written.source for v in written.values if isinstance(v, Unevaluated) and v.as_written is not None
            ]
            before = [other for other in before if other.results is None]
            if written.results is None and before:
                waiting += before
                continue
            if written.results is None:
                with _jax.context(written.eqn):
                    written.results = bind(written.eqn, [array_of(value) for value in written.values])
            waiting.pop()
        assert self.results is not None
        return self.results


@dataclass(frozen=True)
class OneOf:
    """One result of a `AsWritten` equation."""

    source: AsWritten
    index: int

    def __call__(self) -> Array:
        """The array."""
        return self.source.evaluated()[self.index]


def with_as_written(results: Sequence[Value], as_written: AsWritten) -> list[Value]:
    """An equation's results, where each product can also be evaluated as written, or is if that is smaller."""
    return [_materialized_if_smaller(result, OneOf(as_written, k)) for k, result in enumerate(results)]


def _materialized_if_smaller(value: Value, as_written: Callable[[], Array]) -> Value:
    """Materialize a sum that is smaller than its operands, as the program computes it; `lower` decides convolutions."""
    if not isinstance(value, Unevaluated):
        return value
    value = dataclasses.replace(value, as_written=as_written)
    if is_zero(value) or value.has_windows or stays_factored() or worth_holding(value.held, value.size):
        return value
    return Plain(array_of(value), value.reason or FORMED)
