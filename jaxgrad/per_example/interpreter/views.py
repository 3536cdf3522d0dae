"""Which arrays of a gradient's program are one array with its axes in another order, or cast.

A weight's product and the sum that is its bias's gradient take the same cotangents, but the program may transpose them
for one of the two. Inside `recording`, `walk` notes each equation that does so, and `origin` finds the array behind it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jaxgrad import _jax

Axes = tuple[int | None, ...]


class _Notes(NamedTuple):
    """What was noted, by the id of an array; the arrays are kept, because an id is only unique while they are.

    Attributes:
        views: (the array, the array that it is a view of, for each of its axes that of the latter; None for size 1).
        ones: arrays of ones that stand beside what is summed over.
    """

    views: dict[int, tuple[Array, Array, Axes]]
    ones: dict[int, Array]


_NOTES: ContextVar[_Notes | None] = ContextVar("views of arrays", default=None)


@contextmanager
def recording(active: bool = True) -> Iterator[None]:
    """A context in which views are noted, apart from those noted outside of it."""
    token = _NOTES.set(_Notes({}, {}) if active else None)
    try:
        yield
    finally:
        _NOTES.reset(token)


@contextmanager
def recording_a_step() -> Iterator[None]:
    """The same for a step of a loop, whose arrays must not be kept longer than the step is traced."""
    with recording(_NOTES.get() is not None):
        yield


def noting() -> bool:
    """Whether views are noted here."""
    return _NOTES.get() is not None


def note_equation(eqn: _jax.Equation, operands: Sequence[Any], result: Any) -> None:
    """Note the result of an equation that permutes axes, adds or removes axes of size 1, casts, or adds nothing.

    Args:
        eqn: the equation.
        operands: the arrays of its operands that are not known to be zero, None for one without.
        result: that of its result.
    """
    if len(operands) != 1 or operands[0] is None or result is None:
        return
    (before,) = operands
    if eqn.primitive is lax.transpose_p:
        _note(result, before, tuple(int(k) for k in eqn.params["permutation"]))
    elif _keeps_order(eqn, before, result):
        note_squeezed(result, before)


def _keeps_order(eqn: _jax.Equation, before: Array, after: Array) -> bool:
    """Whether the entries stay in their order, and are the same up to rounding."""
    if eqn.primitive is lax.reshape_p:
        return eqn.params["dimensions"] is None
    if eqn.primitive is lax.convert_element_type_p:
        return all(jnp.issubdtype(a.dtype, jnp.floating) for a in (before, after))
    return eqn.primitive in (lax.broadcast_in_dim_p, lax.squeeze_p, lax.add_p, _jax.add_any_p)


def note_squeezed(after: Array, before: Array) -> None:
    """Note an array with the entries of another whose axes it has, except for axes of size 1."""
    axes = [k for k, n in enumerate(before.shape) if n != 1]
    if [n for n in after.shape if n != 1] == [before.shape[k] for k in axes]:
        kept = iter(axes)
        _note(after, before, tuple(next(kept) if n != 1 else None for n in after.shape))


def note_ones(ones: Array) -> None:
    """Note an array of ones that stands beside what is summed over."""
    notes = _NOTES.get()
    if notes is not None:
        notes.ones[id(ones)] = ones


def is_ones(array: Any) -> bool:
    """Whether an array was noted as ones."""
    notes = _NOTES.get()
    return notes is not None and id(array) in notes.ones


def origin(array: Array) -> tuple[Array, Axes]:
    """(the array that this one is a view of, for each of its axes that of the former; None for size 1)."""
    notes = _NOTES.get()
    axes: Axes = tuple(k if n != 1 else None for k, n in enumerate(np.shape(array)))
    while notes is not None and id(array) in notes.views:
        _, array, inner = notes.views[id(array)]
        axes = tuple(None if k is None else inner[k] for k in axes)
    return array, axes


def _note(after: Array, before: Array, axes: Axes) -> None:
    notes = _NOTES.get()
    if notes is not None and after is not before:
        notes.views[id(after)] = after, before, axes
