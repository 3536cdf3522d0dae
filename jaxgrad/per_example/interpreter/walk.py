"""Evaluate a gradient's program for one example, leaving its last products unevaluated.

`tail` walks backwards from the gradients and finds the variables that reach a gradient only through transposes,
reshapes, scalings and the like. `evaluate` walks forwards: a product in the tail is held as its operands, the
operations that follow are applied to it by rule, and an equation without a rule is evaluated as it stands. Programs
within the program (jit, remat, scan, cond) are walked too.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxgrad import _jax
from jaxgrad.per_example.interpreter import (
    as_map,
    control,
    dependence,
    loop_constants,
    reasons,
    registered,
    shards,
    through,
    tied,
    views,
)
from jaxgrad.per_example.interpreter.as_written import AsWritten, with_as_written
from jaxgrad.per_example.interpreter.measuring import (
    Target,
    begun_after,
    keeps_sides,
    measured_where_complete,
    remeasured,
    targets_of,
    total_over_positions,
)
from jaxgrad.per_example.interpreter.reasons import FORMED, Reason, reason_at
from jaxgrad.per_example.interpreter.rules import made_product, record_of
from jaxgrad.per_example.interpreter.values import (
    Broadcast,
    Plain,
    Shared,
    Unevaluated,
    Value,
    array_of,
    as_broadcast,
    is_shared,
    is_zero,
    literal,
    numbers,
    own_array,
    zero,
)


class Tail(NamedTuple):
    """The tail of a program: its last variables, which rules may leave unevaluated.

    Attributes:
        variables: the variables that are used only to reach a gradient, through operations that have a rule.
        live: for each equation, whether it is evaluated at all.
        used: the variables that are used at all.
    """

    variables: frozenset[Any]
    live: tuple[bool, ...]
    used: frozenset[Any]

    def of(self, eqn: _jax.Equation) -> list[bool]:
        """Whether each result of the equation is in the tail."""
        return [v in self.variables for v in eqn.outvars]


def tail(jaxpr: _jax.Jaxpr, wanted: Sequence[bool], used: Sequence[bool]) -> Tail:
    """Find the tail of a program, walking backwards.

    Args:
        wanted: for each result, whether it is a gradient, or leads to one only through operations that have a rule.
        used: for each result, whether it is used at all.
    """
    return _tail(jaxpr, tuple(wanted), tuple(used), registered.rules())


@functools.lru_cache(512)  # a nested program is analyzed once, not once for each program that contains it
def _tail(jaxpr: _jax.Jaxpr, wanted: tuple[bool, ...], used: tuple[bool, ...], rules: Any) -> Tail:
    good: dict[Any, bool] = {}

    def use(v: Any, as_gradient: bool) -> None:
        if not isinstance(v, _jax.Literal):
            good[v] = good.get(v, True) and as_gradient

    for v, want, use_ in zip(jaxpr.outvars, wanted, used, strict=True):
        if use_:
            use(v, want)
    live = [False] * len(jaxpr.eqns)
    for i in reversed(range(len(jaxpr.eqns))):
        eqn = jaxpr.eqns[i]
        live[i] = bool(eqn.effects) or any(v in good for v in eqn.outvars)
        if not live[i]:
            continue
        outs = [good.get(v, False) for v in eqn.outvars]
        if any(outs) and eqn.primitive in (_jax.jit_p, _jax.remat_p, _jax.cond_p):
            is_cond = eqn.primitive is _jax.cond_p
            for program in _jax.branches(eqn) if is_cond else [_jax.body(eqn)]:
                inner = tail(program.jaxpr, outs, [v in good for v in eqn.outvars])
                for v, w in zip(eqn.invars[is_cond:], program.jaxpr.invars, strict=True):
                    if w in inner.used or is_cond:
                        use(v, w in inner.variables or w not in inner.used)
            if is_cond:
                use(eqn.invars[0], False)
            continue
        if any(outs) and _jax.kind(eqn) in (_jax.scan_p, "shard_map"):
            # A carry is used by the next step, whether or not its final value is used.
            inner = tail(_jax.body(eqn).jaxpr, [good.get(v, True) for v in eqn.outvars], [True] * len(outs))
            for v, w in zip(eqn.invars, _jax.body(eqn).jaxpr.invars, strict=True):
                use(v, w in inner.variables)
            continue
        reference = registered.reference_of(eqn) if any(outs) else None
        if reference is not None:
            taken = _taken(reference, outs, [v in good for v in eqn.outvars])
        else:
            taken = record_of(eqn).operands(eqn) if all(outs) else ()
        for k, v in enumerate(eqn.invars):
            use(v, k in taken)
    return Tail(frozenset(v for v, ok in good.items() if ok), tuple(live), frozenset(good))


def _taken(reference: registered.Reference, wanted: Sequence[bool], used: Sequence[bool]) -> Sequence[int]:
    """The operands of an equation with a registered rule that may be unevaluated products."""
    if any(
        use and not (want and k in reference.results) for k, (want, use) in enumerate(zip(wanted, used, strict=True))
    ):
        return ()  # the primitive itself computes a result, from arrays
    inner = tail(reference.program.jaxpr, [wanted[k] for k in reference.results], [used[k] for k in reference.results])
    return [k for k, v in enumerate(reference.program.jaxpr.invars) if v in inner.variables]


def evaluate(
    program: _jax.Program,
    values: Sequence[Value],
    wanted: Sequence[bool],
    used: Sequence[bool],
    targets: Sequence[Target] = (),
) -> list[Value]:
    """Evaluate the program; the results in `wanted` may be unevaluated products.

    Args:
        program: the program for one example.
        values: the values of its operands.
        wanted, used: as in `tail`.
        targets: what loops are to measure of each result (`measuring`); () for nothing.

    Returns:
        The program's results; None for those that are not used.
    """
    jaxpr = program.jaxpr
    found = tail(jaxpr, wanted, used)
    zeros = {v for v, value in zip(jaxpr.invars, values, strict=True) if is_zero(value)}
    measured = targets_of(jaxpr, targets or [None] * len(jaxpr.outvars), zeros)
    sums = tied.sums(jaxpr, measured)
    known: dict[Any, Value] = dict(zip(jaxpr.constvars, map(Shared, program.consts), strict=True))
    known |= dict(zip(jaxpr.invars, values, strict=True))

    complete: list[Any] = []  # variables that are gradients, and measured

    def read(v: Any) -> Value:
        # A variable without a value is an operand that an inner program does not use.
        return literal(v.val, v.aval.dtype) if isinstance(v, _jax.Literal) else known.get(v)

    for eqn, live in zip(jaxpr.eqns, found.live, strict=True):
        if live:
            results_used = [v in found.used for v in eqn.outvars]
            with _jax.context(eqn):
                operands = [read(v) for v in eqn.invars]
                if eqn.primitive is _jax.scan_p:
                    operands = begun_after(complete, known, operands, _jax.scan_parts(eqn))
                wants = found.of(eqn)
                total = total_over_positions(eqn, operands, jaxpr) if all(wants) else None
                of_results = [measured.get(v) for v in eqn.outvars]
                results = total or remeasured(eqn, operands, _step(eqn, operands, wants, results_used, of_results))
                if views.noting() and len(results) == 1:
                    arrays = [own_array(v) for v in operands if not is_zero(v)]
                    views.note_equation(eqn, arrays, own_array(results[0]))
                if sums:
                    results = tied.measured(eqn, results, sums, known)
                results = measured_where_complete(results, [v.aval for v in eqn.outvars], of_results)
            known |= dict(zip(eqn.outvars, results, strict=True))
            complete += [v for v in eqn.outvars if v in measured or v in sums]
    return [read(v) if use else None for v, use in zip(jaxpr.outvars, used, strict=True)]


def _step(
    eqn: _jax.Equation, values: list[Value], wanted: list[bool], used: list[bool], targets: list[Target]
) -> Sequence[Value]:
    shared = not eqn.effects and all(is_shared(value) for value in values)
    if any(wanted) and not (shared and eqn.primitive in (_jax.scan_p, _jax.cond_p)):
        if eqn.primitive is _jax.jit_p:
            return evaluate(_jax.body(eqn), values, wanted, used, targets)
        if eqn.primitive is _jax.remat_p:
            return evaluate(_jax.body(eqn), _behind_barrier(eqn, values), wanted, used, targets)
        if eqn.primitive in (_jax.scan_p, _jax.cond_p):
            is_scan = eqn.primitive is _jax.scan_p
            never_a_map = eqn.effects or registered.is_inside(eqn)
            whole = None if never_a_map else (as_map.scan if is_scan else as_map.cond)(evaluate, eqn, values, used)
            if whole is not None:
                return with_as_written(whole, AsWritten(eqn, values))
            if is_scan:
                kept = control.scan(evaluate, eqn, values, wanted, used, targets)
            else:
                kept = control.cond(evaluate, eqn, values, wanted, used)
            return _marked_shared(eqn, values, kept)
        if _jax.kind(eqn) == "shard_map":
            whole = shards.shard_map(evaluate, eqn, values, wanted, used)
            if whole is not None:
                return with_as_written(whole, AsWritten(eqn, values))
        reference = None if shared else registered.reference_of(eqn)
        if reference is not None:
            return _by_reference(eqn, reference, values, wanted, used)
    if not eqn.outvars:  # it has an effect but no result
        _jax.bind(eqn, [array_of(value) for value in values])
        return []
    record = record_of(eqn)
    taken = record.operands(eqn)
    if taken and record.keeps is not None and record.keeps_zero and all(is_zero(values[k]) for k in taken):
        return [zero(v.aval.shape, v.aval.dtype) for v in eqn.outvars]

    as_written = AsWritten(eqn, values)
    others = [value for value in values if not isinstance(value, Unevaluated)]
    if len(others) < len(values) and not (record.bilinear and keeps_sides() and not all(map(is_shared, others))):
        results = through.behind(eqn, values)
        if results is not None:
            return with_as_written(results, as_written)
    if all(wanted) and not shared:
        product = made_product(
            eqn, [Plain(array_of(v), _refused(eqn, v)) if isinstance(v, Unevaluated) else v for v in values]
        )
        if product is not None:
            return with_as_written([product], as_written)
    repeated = _repeated(eqn, values)
    if repeated is not None:
        return [repeated]
    if all(wanted) and not shared:
        results = through.scaled(eqn, values)
        if results is not None:
            return with_as_written(results, as_written)
    if shared and loop_constants.only_broadcasts(eqn):
        return evaluate(_jax.body(eqn), values, wanted, used)
    if shared:
        return [Shared(a) for a in as_written.evaluated()]
    if eqn.primitive is _jax.scan_p and not any(wanted):
        arrays = loop_constants.scan(eqn, values)
        if arrays is not None:
            return _marked_shared(eqn, values, arrays)
    reason = _inherited(eqn, values, taken) if any(wanted) else FORMED
    arrays = [Plain(a, reason) if want else a for a, want in zip(as_written.evaluated(), wanted, strict=True)]
    return _marked_shared(eqn, values, arrays)


def _by_reference(
    eqn: _jax.Equation,
    reference: registered.Reference,
    values: Sequence[Value],
    wanted: Sequence[bool],
    used: Sequence[bool],
) -> list[Value]:
    """Find the products in an equation with a registered rule; the primitive itself computes all other results."""
    as_written = AsWritten(eqn, values)
    found = evaluate(
        reference.program,
        values,
        [wanted[k] for k in reference.results],
        [wanted[k] and used[k] for k in reference.results],
    )
    results: list[Value] = []
    for k, v in enumerate(eqn.outvars):
        result = found[reference.results.index(k)] if k in reference.results else None
        if not used[k] or isinstance(result, Unevaluated):
            results.append(result)
        elif is_zero(result):
            results.append(zero(v.aval.shape, v.aval.dtype))
        else:
            array = as_written.evaluated()[k]
            results.append(Plain(array, _no_product(eqn, result)) if wanted[k] else array)
    return with_as_written(results, as_written)


def _no_product(eqn: _jax.Equation, result: Value) -> Reason:
    if isinstance(result, Plain) and result.reason == FORMED:
        return FORMED
    if isinstance(result, Plain):
        return reasons.registered_makes_none(eqn, result.reason)
    return reason_at(eqn, reasons.REGISTERED_HAS_NONE)


def _marked_shared(eqn: _jax.Equation, values: Sequence[Value], results: Sequence[Value]) -> list[Value]:
    """For an equation with inner programs, mark the result arrays that depend on no example as shared."""
    if eqn.effects or eqn.primitive not in (_jax.jit_p, _jax.remat_p, _jax.scan_p, _jax.cond_p):
        return list(results)
    differing = [k for k, v in enumerate(values) if not is_shared(v)]
    depends = dependence.results_depending(eqn, differing)
    return [
        Shared(array_of(r)) if isinstance(r, jax.Array | Plain) and not differs else r
        for r, differs in zip(results, depends, strict=True)
    ]


def _refused(eqn: _jax.Equation, value: Unevaluated) -> Reason:
    return value.reason or reason_at(eqn, reasons.NOT_APPLICABLE)


def _inherited(eqn: _jax.Equation, values: Sequence[Value], taken: Sequence[int]) -> Reason:
    """Why a result in the tail is not a product: an operand was not one, its product was lost here, or there was none.

    A result that is no larger than some other array of the same example, such as an activation, needs no product.
    """
    size = max(v.aval.size for v in eqn.outvars)
    for value in (values[k] for k in taken):
        if isinstance(value, Plain) and value.array.size >= size:
            return value.reason
        if isinstance(value, Unevaluated):
            return _refused(eqn, value)
    if eqn.primitive is lax.while_p:
        return reason_at(eqn, reasons.UNKNOWN_STEPS)
    largest = max((numbers(value) for value in values if not is_shared(value)), default=0)
    foreign = _jax.is_foreign(eqn)  # it may have taken a product of its result's size
    if largest > size or (largest == size and not foreign):
        return FORMED
    if foreign:
        return reasons.unknown_primitive(eqn)
    if not jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.inexact):
        return reason_at(eqn, reasons.INTEGERS)
    return reason_at(eqn, reasons.NO_PRODUCT)


def _repeated(eqn: _jax.Equation, values: Sequence[Value]) -> Broadcast | None:
    """Leave a broadcast unevaluated, also through neg, dtype conversion and multiplication by one number."""
    out = eqn.outvars[0].aval
    if eqn.primitive is lax.broadcast_in_dim_p and len(values) == 1:
        dims, value = [int(d) for d in eqn.params["broadcast_dimensions"]], values[0]
        if isinstance(value, Broadcast):
            dims = [dims[d] for d in value.dims]
            return dataclasses.replace(value, dims=tuple(dims), shape=tuple(out.shape))
        return Broadcast(array_of(value), tuple(dims), tuple(out.shape), is_zero(value), is_shared(value))
    if eqn.primitive in (lax.neg_p, lax.convert_element_type_p) and isinstance(values[0], Broadcast):
        value = values[0]
        # Do not bind the equation itself: on an explicit mesh it states the sharding of the whole array, not of source.
        source = (
            lax.neg(value.source) if eqn.primitive is lax.neg_p else lax.convert_element_type(value.source, out.dtype)
        )
        return dataclasses.replace(value, source=source)
    if eqn.primitive is lax.mul_p and any(isinstance(value, Broadcast) for value in values):
        for value, other in (values, values[::-1]):
            value, scale = as_broadcast(value), as_broadcast(other)
            if value is None or scale is None or scale.varies or len(value.shape) != len(out.shape):
                continue
            if jnp.size(value.source) < out.size and not value.zero and not scale.zero:
                source = value.source * jnp.reshape(scale.source, ())
                shared = all(is_shared(v) for v in values)
                return Broadcast(source, value.dims, tuple(out.shape), shared=shared)
    return None


def _behind_barrier(eqn: _jax.Equation, values: list[Value]) -> list[Value]:
    """Put a barrier before values that remat recomputes, so that the compiler does not merge the two computations."""
    if not eqn.params.get("prevent_cse", True):
        return values
    at = [k for k, v in enumerate(values) if not (v is None or is_zero(v) or isinstance(v, Unevaluated))]
    arrays = lax.optimization_barrier(tuple(jnp.asarray(array_of(values[k])) for k in at))
    values = list(values)
    for k, array in zip(at, arrays, strict=True):
        values[k] = Shared(array) if is_shared(values[k]) else array
    return values
