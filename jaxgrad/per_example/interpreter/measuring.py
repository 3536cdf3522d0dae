"""Measuring gradients inside the loop that computes them, so that the factors of a layer need not leave the loop.

Inside `measuring`, a scan measures each gradient that it stacks, step by step. The measure stays attached to the
stacked value through reshapes, transposes and casts; any other operation drops it, and the gradient is then measured at
the end.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxgrad import _jax
from jaxgrad.per_example.interpreter.undone import product
from jaxgrad.per_example.interpreter.values import (
    FORMED,
    Broadcast,
    Plain,
    Undone,
    Value,
    array_of,
    is_shared,
    nonempty,
)


class Measure(NamedTuple):
    """Numbers that describe one example's gradient of one parameter; inside a scan, with an axis of steps.

    Attributes:
        norm: its norm.
        magnitude: the magnitude of the terms that may cancel in it, 0 if there is one term.
    """

    norm: Array
    magnitude: Array


class Measurer(NamedTuple):
    """The functions that measure.

    Attributes:
        one: (value, shape, dtype) → the `Measure` of one example's gradient.
        of_all_steps: a `Measure` with an axis of steps → the `Measure` of the stacked gradient.
        has_layout: whether what is measured depends on where the entries are, so that no operation preserves it that
            moves them. Then it may be anything, such as the moments of a product's sides.
    """

    one: Callable[[Value, tuple[int, ...], Any], Any]
    of_all_steps: Callable[[Any], Any]
    has_layout: bool = False


_MEASURER: ContextVar[Measurer | None] = ContextVar("measurer", default=None)
_PRESERVING = (lax.transpose_p, lax.reshape_p, lax.squeeze_p, lax.rev_p, *_jax.IDENTITIES)


@contextmanager
def measuring(measurer: Measurer) -> Iterator[None]:
    """A context in which loops measure the gradients that they stack, and gradients stay factored until then."""
    token = _MEASURER.set(measurer)
    try:
        yield
    finally:
        _MEASURER.reset(token)


def measurer() -> Measurer | None:
    """The innermost `measuring`; None outside of it."""
    return _MEASURER.get()


def stays_factored() -> bool:
    """Whether gradients stay factored even if the factors are larger: only factors show which terms cancel."""
    return _MEASURER.get() is not None


def total_over_positions(eqn: _jax.Equation, values: Sequence[Value], jaxpr: _jax.Jaxpr) -> list[Value] | None:
    """Hold a gradient that is a sum over positions, such as a bias's, as a product with ones: its terms may cancel."""
    if not stays_factored() or eqn.primitive is not lax.reduce_sum_p:
        return None
    (value,), (result,) = values, eqn.outvars
    if isinstance(value, Undone | Broadcast) or is_shared(value) or not _is_result(result, jaxpr):
        return None
    if not jnp.issubdtype(result.aval.dtype, jnp.floating):
        return None
    a, axes = jnp.asarray(array_of(value)), [int(axis) for axis in eqn.params["axes"]]
    ones = jnp.ones([a.shape[axis] for axis in axes], a.dtype)
    term = product(a, ones, list(zip(axes, range(len(axes)), strict=True)), [])
    return [Undone(nonempty([term]), tuple(result.aval.shape), result.aval.dtype)]


def _is_result(v: Any, jaxpr: _jax.Jaxpr) -> bool:
    """Whether a variable is a result of the program, or becomes one through reshapes, transposes, casts and sums."""
    while not any(v is result for result in jaxpr.outvars):
        uses = [eqn for eqn in jaxpr.eqns if any(v is operand for operand in eqn.invars)]
        if len(uses) != 1 or uses[0].primitive not in (lax.convert_element_type_p, lax.reduce_sum_p, *_PRESERVING):
            return False
        v = uses[0].outvars[0]
    return True


def measure_of(value: Value) -> Measure | None:
    """The measure attached to a value; None if there is none."""
    return value.measure if isinstance(value, Undone | Plain) else None


def with_measure(value: Value, measure: Measure | None) -> Value:
    """Attach a measure to a value."""
    if measure is None:
        return value
    if isinstance(value, Undone | Plain):
        return dataclasses.replace(value, measure=measure)
    return Plain(value, FORMED, measure)


def remeasured(eqn: _jax.Equation, values: Sequence[Value], results: Sequence[Value]) -> Sequence[Value]:
    """Return an equation's results, with the operand's measure attached if the equation preserves norms."""
    measure = measure_of(values[0]) if values else None
    if measure is None or len(results) != 1 or measure_of(results[0]) is not None or not _preserves(eqn):
        return results
    return [with_measure(results[0], measure)] if isinstance(results[0], Undone | Plain) else results


def _preserves(eqn: _jax.Equation) -> bool:
    if eqn.primitive is lax.convert_element_type_p:
        before, after = (v.aval.dtype for v in (eqn.invars[0], eqn.outvars[0]))
        floating = jnp.issubdtype(before, jnp.floating) and jnp.issubdtype(after, jnp.floating)
        return floating and jnp.finfo(after).maxexp >= jnp.finfo(before).maxexp
    current = measurer()
    moves = current is not None and current.has_layout
    return eqn.primitive in (_jax.IDENTITIES if moves else _PRESERVING)
