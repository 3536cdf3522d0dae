"""Norms taken where a gradient is complete: inside the loop that computes it, so that no layer's products leave it.

The walk measures nothing by itself. `transform` says how with `measuring`; then a scan measures what it stacks, step by
step, and the measure stays with the value as long as only its axes are moved about.
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
    """What is measured of one example's gradient with respect to one parameter; with an axis of steps, of each layer's.

    Attributes:
        norm: its norm.
        magnitude: the magnitude of the terms that may cancel in it, 0 if there is one term.
    """

    norm: Array
    magnitude: Array


class How(NamedTuple):
    """How to measure.

    Attributes:
        one: (value, shape, dtype) → the `Measure` of a gradient of one example.
        of_all_steps: the `Measure` of a stack of gradients, from one with an axis of steps.
    """

    one: Callable[[Value, tuple[int, ...], Any], Measure]
    of_all_steps: Callable[[Measure], Measure]


_HOW: ContextVar[How | None] = ContextVar("how", default=None)
_PRESERVING = (lax.transpose_p, lax.reshape_p, lax.squeeze_p, lax.rev_p, *_jax.IDENTITIES)


@contextmanager
def measuring(how: How) -> Iterator[None]:
    """Inside, the walk measures gradients where they are complete and does not materialize a matrix's."""
    token = _HOW.set(how)
    try:
        yield
    finally:
        _HOW.reset(token)


def how_to_measure() -> How | None:
    """The innermost `measuring`; None outside of it."""
    return _HOW.get()


def stays_factored() -> bool:
    """Whether gradients are held as factors even where these are larger: measured, they show what cancels in them."""
    return _HOW.get() is not None


def total_over_positions(eqn: _jax.Equation, values: Sequence[Value], jaxpr: _jax.Jaxpr) -> list[Value] | None:
    """A gradient that is a sum over positions, as a bias's is: a product with ones, which shows what cancels in it."""
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
    """Whether a variable is a result of the program, or becomes one by moves of its axes, casts and further sums."""
    while not any(v is result for result in jaxpr.outvars):
        uses = [eqn for eqn in jaxpr.eqns if any(v is operand for operand in eqn.invars)]
        if len(uses) != 1 or uses[0].primitive not in (lax.convert_element_type_p, lax.reduce_sum_p, *_PRESERVING):
            return False
        v = uses[0].outvars[0]
    return True


def measure_of(value: Value) -> Measure | None:
    """The measure that a value carries, if it does."""
    return value.measure if isinstance(value, Undone | Plain) else None


def with_measure(value: Value, measure: Measure | None) -> Value:
    """The value, carrying a measure."""
    if measure is None:
        return value
    if isinstance(value, Undone | Plain):
        return dataclasses.replace(value, measure=measure)
    return Plain(value, FORMED, measure)


def remeasured(eqn: _jax.Equation, values: Sequence[Value], results: Sequence[Value]) -> Sequence[Value]:
    """The results of an equation; one that only moves the entries about, or widens them, keeps the measure."""
    measure = measure_of(values[0]) if values else None
    if measure is None or len(results) != 1 or measure_of(results[0]) is not None or not _preserves(eqn):
        return results
    return [with_measure(results[0], measure)] if isinstance(results[0], Undone | Plain) else results


def _preserves(eqn: _jax.Equation) -> bool:
    if eqn.primitive is lax.convert_element_type_p:
        before, after = (v.aval.dtype for v in (eqn.invars[0], eqn.outvars[0]))
        floating = jnp.issubdtype(before, jnp.floating) and jnp.issubdtype(after, jnp.floating)
        return floating and jnp.finfo(after).maxexp >= jnp.finfo(before).maxexp
    return eqn.primitive in _PRESERVING
