"""Measuring gradients inside the loop that computes them, so that the factors of a layer need not leave the loop.

A measure is what is asked of a gradient: its norm, or its projection. Inside `measuring`, a scan measures each gradient
that it stacks, step by step. The measure stays attached to the stacked value through reshapes, transposes and casts;
any other operation drops it, and the gradient is then measured at the end.

A target says what is to be measured of a variable: it belongs to a parameter and is pulled back, by `targets_of`, to
the variables that become the parameter's gradient through such operations alone.
"""

import dataclasses
import functools
import operator
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxgrad import _jax
from jaxgrad.per_example.interpreter import views
from jaxgrad.per_example.interpreter.products import product
from jaxgrad.per_example.interpreter.reasons import FORMED
from jaxgrad.per_example.interpreter.values import (
    Broadcast,
    Plain,
    Unevaluated,
    Value,
    array_of,
    is_shared,
    is_zero,
    nonempty,
)
from jaxgrad.sharding import is_explicit

Measure = Any
"""A tree of arrays that describes one example's gradient; inside a scan, with an axis of steps."""

Target = Any
"""What is measured of a variable; None if it does not become a gradient by operations that preserve a measure."""


Item = tuple[Value, tuple[int, ...], Any, Target]
"""A gradient that is to be measured: its value, shape and dtype, and the target."""


class CrossTerms(NamedTuple):
    """How the sum of a product's gradient and of lookups' gradients is measured.

    Attributes:
        rows: (the product, lookups of the same rows) → the product's rows [T, K]; None if it has another form.
        total: (the product's measure, its rows, the lookups) → the measure of their sum, None as for `rows`.
    """

    rows: Callable[[Value, Value], Any]
    total: Callable[[Measure, Any, Value], Measure | None]


class Measurer(NamedTuple):
    """The functions that measure.

    Attributes:
        one: (value, shape, dtype, target) → the measure of one example's gradient.
        of_all_steps: (measures with an axis of steps, target) → the measure of the stacked gradient.
        before: (equation, target of its result) → target of its operand.
        of_a_step: target of a stacked value → (arrays to scan over, a function that turns their slice into the target
            of one step), or None if the steps are not to be measured.
        adds_up: whether the measure of a sum is the sum of the measures. A loop that only adds to a gradient then
            measures what each step adds.
        has_layout: whether what is measured depends on where the entries are, as the moments of a product's sides do.
            Then no operation that moves entries preserves it.
        together: [(value, shape, dtype, target), …] → their measures, in place of `one`, if what is measured of one
            gradient depends on the others. A measure that needs a gradient that is not there is None.
        of_sides: whether what is measured depends on which arrays a product's two sides are. Then products are not
            multiplied by an example's other arrays before they are measured, and `views` says which arrays are one.
        kept: how a sum of a product and lookups is measured (`tied`), if it is before the lookups are there.
    """

    one: Callable[[Value, tuple[int, ...], Any, Target], Measure]
    of_all_steps: Callable[[Measure, Target], Measure]
    before: Callable[[_jax.Equation, Target], Target] = lambda eqn, target: target
    of_a_step: Callable[[Target], tuple[Any, Callable[[Any], Target]] | None] = lambda target: ((), lambda _: target)
    adds_up: bool = False
    has_layout: bool = False
    together: Callable[[Sequence[Item]], list[Measure | None]] | None = None
    of_sides: bool = False
    kept: "CrossTerms | None" = None

    def all(self, items: Sequence[Item]) -> list[Measure | None]:
        """The measures of several gradients that are complete at the same place."""
        return [self.one(*item) for item in items] if self.together is None else self.together(items)


_MEASURER: ContextVar[Measurer | None] = ContextVar("measurer", default=None)
_PRESERVING = (lax.transpose_p, lax.reshape_p, lax.squeeze_p, lax.rev_p, *_jax.IDENTITIES)


@contextmanager
def measuring(measurer: Measurer) -> Iterator[None]:
    """A context in which loops measure the gradients that they stack, and gradients stay factored until then."""
    token = _MEASURER.set(measurer)
    try:
        with views.recording(measurer.of_sides):
            yield
    finally:
        _MEASURER.reset(token)


def measurer() -> Measurer | None:
    """The innermost `measuring`; None outside of it."""
    return _MEASURER.get()


def stays_factored() -> bool:
    """Whether gradients stay factored even if the factors are larger: only factors show which terms cancel."""
    return _MEASURER.get() is not None


def keeps_sides() -> bool:
    """Whether a product's two sides stay as the program has them."""
    current = _MEASURER.get()
    return current is not None and current.of_sides


def targets_of(jaxpr: _jax.Jaxpr, of_results: Sequence[Target], zeros: Collection[Any] = ()) -> dict[Any, Target]:
    """The targets of a program's variables, from those of its results.

    Args:
        jaxpr: the program.
        of_results: the targets of its results.
        zeros: operands that are known to be zero, such as gradients that the steps of a loop add to.
    """
    measurer = _MEASURER.get()
    found: dict[Any, Target] = {}
    if measurer is None or all(target is None for target in of_results):
        return found
    uses = Counter(v for eqn in jaxpr.eqns for v in eqn.invars if not isinstance(v, _jax.Literal))
    uses.update(v for v in jaxpr.outvars if not isinstance(v, _jax.Literal))

    def pull_back(v: Any, target: Target) -> None:
        if target is not None and not isinstance(v, _jax.Literal) and uses[v] == 1:
            found[v] = target

    for v, target in zip(jaxpr.outvars, of_results, strict=True):
        pull_back(v, target)
    for eqn in reversed(jaxpr.eqns):
        targets = [found.get(v) for v in eqn.outvars]
        if all(target is None for target in targets):
            continue
        if eqn.primitive in (_jax.jit_p, _jax.remat_p):
            inner = _jax.body(eqn).jaxpr
            inside = targets_of(inner, targets)
            for v, w in zip(eqn.invars, inner.invars, strict=True):
                pull_back(v, inside.get(w))
        elif len(targets) == 1 and _preserves(eqn):
            pull_back(eqn.invars[0], measurer.before(eqn, targets[0]))
        elif eqn.primitive is _jax.add_any_p and any(v in zeros for v in eqn.invars if not isinstance(v, _jax.Literal)):
            for v in eqn.invars:
                pull_back(v, targets[0])
    return found


def total_over_positions(eqn: _jax.Equation, values: Sequence[Value], jaxpr: _jax.Jaxpr) -> list[Value] | None:
    """Hold a gradient that is a sum over positions, such as a bias's, as a product with ones: its terms may cancel."""
    if not stays_factored() or eqn.primitive is not lax.reduce_sum_p:
        return None
    (value,), (result,) = values, eqn.outvars
    if keeps_sides() and _is_bias_from_products(value, result):
        value = array_of(value)
    if isinstance(value, Unevaluated | Broadcast) or is_shared(value) or not _is_result(result, jaxpr):
        return None
    if not jnp.issubdtype(result.aval.dtype, jnp.floating):
        return None
    a, axes = jnp.asarray(array_of(value)), [int(axis) for axis in eqn.params["axes"]]
    ones = jnp.ones([a.shape[axis] for axis in axes], a.dtype)
    term = product(a, ones, list(zip(axes, range(len(axes)), strict=True)), [])
    views.note_ones(term.right)
    return [Unevaluated(nonempty([term]), tuple(result.aval.shape), result.aval.dtype)]


def sums_over_positions(value: Value) -> bool:
    """Whether a gradient is a sum of arrays over positions, held as their products with ones."""
    terms = value.terms if isinstance(value, Unevaluated) else ()
    return bool(terms) and all(views.is_ones(term.right) for term in terms)


def _is_bias_from_products(value: Value, total: Any) -> bool:
    """Whether the cotangents that are summed to a bias's gradient are unevaluated products, not sums over others."""
    few = sum(n != 1 for n in total.aval.shape) < 2
    return few and isinstance(value, Unevaluated) and bool(value.terms) and not sums_over_positions(value)


def _is_result(v: Any, jaxpr: _jax.Jaxpr) -> bool:
    """Whether a variable is a result of the program, or becomes one through reshapes, transposes, casts and sums over
    axes; and, where the sides of products stay, through sums of several uses."""
    while not any(v is result for result in jaxpr.outvars):
        uses = [eqn for eqn in jaxpr.eqns if any(v is operand for operand in eqn.invars)]
        passed = (lax.convert_element_type_p, lax.reduce_sum_p, *_PRESERVING)
        if len(uses) != 1 or uses[0].primitive not in ((*passed, _jax.add_any_p) if keeps_sides() else passed):
            return False
        v = uses[0].outvars[0]
    return True


def measure_of(value: Value) -> Measure | None:
    """The measure attached to a value; None if there is none."""
    return value.measure if isinstance(value, Unevaluated | Plain) else None


def with_measure(value: Value, measure: Measure | None) -> Value:
    """Attach a measure to a value."""
    if measure is None:
        return value
    if isinstance(value, Unevaluated | Plain):
        return dataclasses.replace(value, measure=measure)
    return Plain(value, FORMED, measure)


def measured_where_complete(results: Sequence[Value], avals: Sequence[Any], targets: Sequence[Target]) -> list[Value]:
    """The results of an equation, where each that is a whole gradient has its measure attached.

    What a gradient was measured from need not be held until the program ends. A gradient that is measured together with
    others that are not there yet is measured at the end, and so are all if the sides of products stay as they are.
    """
    current = measurer()
    if current is None or current.of_sides:
        return list(results)

    def one(value: Value, aval: Any, target: Target) -> Value:
        found = isinstance(value, Unevaluated | Plain) and not is_zero(value) and measure_of(value) is None
        if not found or target is None:
            return value
        return with_measure(value, current.all([(value, tuple(aval.shape), aval.dtype, target)])[0])

    return list(map(one, results, avals, targets))


def begun_after(
    complete: list[Any], known: dict[Any, Value], operands: Sequence[Value], parts: _jax.ScanParts
) -> list[Value]:
    """The operands of a scan, which depend on the measures of the gradients that are complete; `complete` is emptied.

    A compiler is otherwise free to run the loop first, and to hold what is measured until then. No measure is below
    -∞, so the operands do not change; an optimization barrier would be gone before the compiler orders the operations.
    """
    measures = [measure_of(known[v]) for v in complete]  # None if it is not measured yet
    complete.clear()
    ends = [a.ravel()[0] for a in jax.tree.leaves(measures) if a.size and jnp.issubdtype(a.dtype, jnp.floating)]
    below = functools.reduce(operator.or_, (end < -jnp.inf for end in ends), np.False_)

    def dependent(k: int, value: Value) -> Value:
        array = value.array if isinstance(value, Plain) else value
        carried = parts.consts <= k < parts.consts + parts.carry
        if not (carried and isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jnp.inexact)):
            return value
        if is_explicit(array):  # the program states its sharding
            return value
        array = jnp.where(below, jnp.zeros_like(array), array)
        return dataclasses.replace(value, array=array) if isinstance(value, Plain) else array

    return [dependent(k, value) for k, value in enumerate(operands)] if ends else list(operands)


def remeasured(eqn: _jax.Equation, values: Sequence[Value], results: Sequence[Value]) -> Sequence[Value]:
    """Return an equation's results, with a measure attached if the equation preserves that of its operand."""
    rest = [v for v in values if not is_zero(v)] if eqn.primitive is _jax.add_any_p else values
    measure = measure_of(rest[0]) if rest else None
    preserves = len(rest) == 1 if eqn.primitive is _jax.add_any_p else _preserves(eqn)
    if measure is None or len(results) != 1 or measure_of(results[0]) is not None or not preserves:
        return results
    return [with_measure(results[0], measure)] if isinstance(results[0], Unevaluated | Plain) else results


def _preserves(eqn: _jax.Equation) -> bool:
    if eqn.primitive is lax.convert_element_type_p:
        before, after = (v.aval.dtype for v in (eqn.invars[0], eqn.outvars[0]))
        floating = jnp.issubdtype(before, jnp.floating) and jnp.issubdtype(after, jnp.floating)
        return floating and jnp.finfo(after).maxexp >= jnp.finfo(before).maxexp
    current = measurer()
    moves = current is not None and current.has_layout
    return eqn.primitive in (_jax.IDENTITIES if moves else _PRESERVING)
