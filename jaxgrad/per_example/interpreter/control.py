"""Loops and branches in a gradient's program; their products leave them unevaluated.

`walk` evaluates the inner programs: it passes its `evaluate` to the functions here.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxgrad import _jax
from jaxgrad.per_example.algebra.maps import Input, Map
from jaxgrad.per_example.algebra.place import Axis
from jaxgrad.per_example.algebra.product import Product, squeezed
from jaxgrad.per_example.interpreter import dependence, reasons, views
from jaxgrad.per_example.interpreter.as_map import Evaluate
from jaxgrad.per_example.interpreter.cost_model import worth_holding
from jaxgrad.per_example.interpreter.dependence import accumulates
from jaxgrad.per_example.interpreter.measuring import Target, measurer, with_measure
from jaxgrad.per_example.interpreter.reasons import FORMED, Reason, reason_at
from jaxgrad.per_example.interpreter.values import (
    Broadcast,
    Plain,
    Shared,
    Unevaluated,
    Value,
    added,
    array_of,
    is_shared,
    is_zero,
    maps_materialized,
    numbers,
    without_as_written,
    zero,
)


def scan(
    evaluate: Evaluate,
    eqn: _jax.Equation,
    values: list[Value],
    wanted: list[bool],
    used: list[bool],
    targets: list[Target],
) -> Sequence[Value]:
    """Evaluate a scan, keeping its products factored unless those emitted by all steps would exceed the gradient.

    A carry that is only added to is an accumulated gradient: its products are emitted at every step, and T grows by the
    scan's axis. A stacked result (weights scanned over) gains a group axis."""
    loop = _Loop(evaluate, eqn, values, wanted, used, targets)
    step = loop.step_that_keeps_products()
    results = _jax.bind(eqn, [array_of(value) for value in values]) if step is None else loop.run(step)
    return loop.explained(results)


class _Loop:
    """A scan equation while its products are moved out of it.

    Attributes:
        kept: for each result, whether it is kept factored, so that a step emits its products.
        behind: for a result, the maps in what a step emits, with their shared arrays.
        fixed: for a result, these shared arrays, computed once; None for one that changes from step to step.
        measured: the results that are measured in every step, with their targets: stacked ones, and carries that are
            only added to if the measure of a sum is the sum of the measures.
        reasons: for a result, why what a step emits is not a product, if it is not.
    """

    def __init__(
        self,
        evaluate: Evaluate,
        eqn: _jax.Equation,
        values: list[Value],
        wanted: list[bool],
        used: list[bool],
        targets: list[Target],
    ):
        self.evaluate, self.eqn, self.wanted = evaluate, eqn, wanted
        self.parts, self.program = _jax.scan_parts(eqn), _jax.body(eqn)
        self.consts, self.carry, self.length = self.parts.consts, self.parts.carry, self.parts.length
        end = self.consts + self.carry
        self.outside = [array_of(v) if isinstance(v, Unevaluated) else v for v in values[: self.consts]]
        self.init, self.xs = values[self.consts : end], [array_of(v) for v in values[end:]]
        self.same = [is_shared(v) for v in values[end:]]
        self.differs = _varying(values)
        self.used = [use or k < self.carry for k, use in enumerate(used)]  # the next step uses every carry
        self.kept = [want and (k >= self.carry or self._accumulates(k)) for k, want in enumerate(wanted)]
        # This is not reduced with `kept`: a result that is not emitted may be computed from one that is.
        self.unevaluated_inside = list(self.kept)
        self.behind: dict[int, tuple[Map, list[Any]]] = {}
        self.fixed: dict[int, list[Any]] = {}
        self.reasons: dict[int, Reason] = {}
        self.measurer = measurer()
        adds_up = self.measurer is not None and self.measurer.adds_up
        measured = {
            k: target
            for k, target in enumerate(targets)
            if target is not None and wanted[k] and used[k] and (k >= self.carry or (adds_up and self.kept[k]))
            if not _jax.is_offloaded(self.program.jaxpr.outvars[k])
        }
        for k in [k for k in measured if k < self.carry and not is_zero(self.init[k])]:
            if self._measures({k: measured[k]}, self.init)[k] is None:
                del measured[k]
        steps = {k: self._of_steps(k, target) for k, target in measured.items()}
        self.of_steps = {k: each for k, each in steps.items() if each is not None}
        self.measured = {k: measured[k] for k in self.of_steps}

    def _accumulates(self, k: int) -> bool:
        jaxpr = self.program.jaxpr
        return accumulates(jaxpr, jaxpr.invars[self.consts + k], jaxpr.outvars[k])

    def _of_steps(self, k: int, target: Target) -> tuple[Any, Callable[[Any], Target]] | None:
        """(arrays to scan over, a function that turns their slice into the target of one step), if it is measured."""
        assert self.measurer is not None
        return self.measurer.of_a_step(target) if k >= self.carry else ((), lambda _: target)

    def _carried(self, values: Sequence[Value]) -> list[Any]:
        """The arrays passed to the next step: the carries that are not kept factored."""
        arrays = [jnp.asarray(array_of(v)) for v, keep in zip(values, self.kept, strict=False) if not keep]
        return [_jax.made_varying(a, self.differs) for a in arrays]

    def start(self) -> tuple[list[Any], dict[int, Any]]:
        """The first carry: the arrays, and the measures of results that add up."""
        adding = {k: target for k, target in self.measured.items() if k < self.carry}
        carried, measures = self._carried(self.init), self._measures(adding, self.init)
        missing = [k for k, measure in measures.items() if measure is None]
        if missing:  # what begins at zero has no measure, but what a step adds may have one
            first = jax.tree.map(_first, self.scanned)
            added_now = jax.eval_shape(self.step, (carried, {}), first)[1][2]
            measures |= {k: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), added_now[k]) for k in missing}
        return carried, jax.tree.map(lambda a: _jax.made_varying(a, self.differs), measures)

    @views.recording_a_step()
    def step(self, carry: tuple[list[Any], dict[int, Any]], xs: tuple[list[Any], dict[int, Any]]) -> Any:
        """((the arrays carried, measures), (what it emits for kept carries, for stacked results, their measures))."""
        arrays, totals = carry
        others = iter(arrays)
        before = [None if keep else next(others) for keep in self.kept[: self.carry]]
        full = [
            zero(v.aval.shape, v.aval.dtype) if self.kept[k] or k in self.measured else before[k]
            for k, v in enumerate(self.program.jaxpr.invars[self.consts : self.consts + self.carry])
        ]
        slices = [Shared(x) if shared else x for x, shared in zip(xs[0], self.same, strict=True)]
        targets = [self.of_steps[k][1](xs[1][k]) if k in self.measured else None for k in range(len(self.wanted))]
        results = self.evaluate(
            self.program, [*self.outside, *full, *slices], self.unevaluated_inside, self.used, targets
        )
        emitted: list[Any] = []
        for k, result in enumerate(results):
            if self.kept[k]:
                self.reasons.setdefault(k, _reason(result, self.eqn))
                emitted.append(self._emitted(k, result) if self.used[k] else None)
            else:
                emitted.append(array_of(result) if self.used[k] else None)
                if k in self.measured and k < self.carry:
                    emitted[k] = before[k] + emitted[k]
        kept_carries = [v if keep else None for v, keep in zip(emitted[: self.carry], self.kept, strict=False)]
        measures = self._measures({k: targets[k] for k in self.measured}, results)
        for k in totals:
            added_now = jax.tree.map(lambda a, b: a + b.astype(a.dtype), totals[k], measures.pop(k))
            totals = totals | {k: jax.tree.map(lambda a: _jax.made_varying(a, self.differs), added_now)}
        return (self._carried(emitted[: self.carry]), totals), (kept_carries, emitted[self.carry :], measures)

    def _measures(self, targets: dict[int, Target], results: Sequence[Value]) -> dict[int, Any]:
        if self.measurer is None or not targets:
            return {}
        avals = [v.aval for v in self.program.jaxpr.outvars]
        items = [(results[k], tuple(avals[k].shape), avals[k].dtype, target) for k, target in targets.items()]
        return dict(zip(targets, self.measurer.all(items), strict=True))

    @property
    def scanned(self) -> tuple[list[Any], dict[int, Any]]:
        """What a step gets a slice of: xs, and what the targets of its results are made from."""
        return self.xs, {k: arrays for k, (arrays, _) in self.of_steps.items()}

    def _emitted(self, k: int, result: Value) -> Any:
        """An unevaluated product as it leaves a step. If it has maps, which are applied after the loop, it leaves with
        their inputs and, for a stacked result, with those of their shared arrays that change from step to step."""
        if not isinstance(result, Unevaluated):
            return array_of(result)
        if not result.maps:
            return result
        function, inputs, shared = Map.of(result.maps)
        inner = [x.value for x in inputs]
        if any(isinstance(x, Unevaluated) and x.maps for x in inner):
            return array_of(result)
        self.behind[k] = function, shared
        known = self.fixed.get(k, [None] * len(shared))
        others = [jnp.asarray(a) for a, fixed in zip(shared, known, strict=True) if fixed is None]
        return [dataclasses.replace(result, maps=(), as_written=None), inner, others if k >= self.carry else []]

    def step_that_keeps_products(self) -> Any:
        """A step as a function of (carry, xs), or None if no result is kept factored.

        One step is traced to see what it emits. If fewer results are then kept factored, it is traced again, because
        that may turn other products into arrays.
        """
        while any(self.kept) and self.length > 0:
            before = self.kept
            self.behind.clear()
            self.fixed.clear()
            operands = self.start(), jax.tree.map(_first, self.scanned)
            program, shape = jax.make_jaxpr(self.step, return_shape=True)(*operands)
            self.kept = self._worth_keeping([*shape[1][0], *shape[1][1]])
            if self.kept != before:
                continue
            if not any(self.kept[k] for k in self.behind):
                # Inside shard_map the traced program does not fit: its operands did not vary between devices.
                return self.step if self.differs or self.measured else _function(program, shape)
            self.fixed |= _of_every_step(self.step, self.behind, *operands)
            same = [k for k in range(self.carry) if all(a is not None for a in self.fixed.get(k, [None]))]
            self.kept = [
                keep and (k not in self.behind or k >= self.carry or k in same) for k, keep in enumerate(before)
            ]
            if self.kept == before:
                return self.step
        return self.step if self.measured and self.length > 0 else None

    def _worth_keeping(self, emitted: Sequence[Any]) -> list[bool]:
        return [
            keep and _worth_emitting(value, self.length if k < self.carry else 1, k >= self.carry)
            for k, (keep, value) in enumerate(zip(self.kept, emitted, strict=True))
        ]

    def run(self, step: Any) -> list[Value]:
        """The equation's results."""
        options: dict[str, Any] = {"reverse": self.parts.reverse, "unroll": self.parts.unroll}
        start = self.start()
        (final_carry, totals), (kept_carries, ys, measures) = lax.scan(
            step, start, self.scanned, length=self.length, **options
        )
        others = iter(final_carry)
        results: list[Value] = [
            added(self._of_all_steps(k, kept_carries[k]), self.init[k]) if self.kept[k] else next(others)
            for k in range(self.carry)
        ]
        results += [self._of_all_steps(self.carry + k, y) for k, y in enumerate(ys)]
        if self.measurer is not None:
            found = {k: each for k, each in measures.items() if each is not None}
            totals |= {k: self.measurer.of_all_steps(each, self.measured[k]) for k, each in found.items()}
        for k, measure in totals.items():
            results[k] = with_measure(results[k], measure)
        return results

    def _of_all_steps(self, k: int, value: Any) -> Value:
        """The value of one result, from what all steps emitted for it."""
        S, stacked = self.length, k >= self.carry
        if not isinstance(value, list):
            return _along(value, S, stacked) if isinstance(value, Unevaluated) else value
        terms, inputs, differing = value
        along = [_along(x, S, stacked) if isinstance(x, Unevaluated) else x if stacked else x.sum(0) for x in inputs]
        sources, function, fixed = list(map(Input, along)), self.behind[k][0], self.fixed[k]
        nodes = function.nodes_of_each(sources, fixed, differing) if stacked else function.nodes(sources, fixed)
        return dataclasses.replace(_along(terms, S, stacked), maps=tuple(nodes))

    def explained(self, results: Sequence[Value]) -> list[Value]:
        """The results, where each array that leads to a gradient has the reason why it is not a product."""
        S = self.length
        sizes = [numbers(v) for v in self.outside if not is_shared(v)]
        sizes += [x.size // S for x, shared in zip(self.xs, self.same, strict=True) if not shared and S]
        other = reason_at(self.eqn, reasons.CARRIED)

        def one(k: int, result: Value) -> Value:
            if not self.wanted[k] or isinstance(result, Unevaluated | Plain):
                return result
            small = max(sizes, default=0) >= self.eqn.outvars[k].aval.size // (S if k >= self.carry and S else 1)
            return Plain(result, self.reasons.get(k, FORMED if small else other))

        return [one(k, result) for k, result in enumerate(results)]


def _function(program: Any, shape: Any) -> Callable[..., Any]:
    """A program as the function that it was traced from."""
    flat, treedef = _jax.function_of(program), jax.tree.structure(shape)
    return lambda *args: jax.tree.unflatten(treedef, flat(*jax.tree.leaves(args)))


def _reason(value: Value, eqn: _jax.Equation) -> Reason:
    """The reason to give if this result of a loop's step is not kept factored, from the value alone."""
    if isinstance(value, Plain):
        return value.reason
    if isinstance(value, Unevaluated) and value.maps:
        return reason_at(eqn, reasons.MAPPED_IN_LOOP)
    return value.reason or FORMED if isinstance(value, Unevaluated) else FORMED


def _varying(values: Sequence[Value]) -> frozenset[str]:
    """The mesh axes along which any value varies inside shard_map; carries and branch results vary along them too."""
    parts = [v.source if isinstance(v, Broadcast) else v.array if isinstance(v, Plain | Shared) else v for v in values]
    return frozenset(name for a in jax.tree.leaves(parts) for name in _jax.varying(a))


def _of_every_step(step: Any, behind: dict[int, tuple[Map, list[Any]]], carry: Any, x: Any) -> dict[int, list[Any]]:
    """The shared arrays of a step's maps, computed outside the loop; None for one that changes from step to step."""

    def shared(carry: Any, x: Any) -> dict[int, list[Any]]:
        behind.clear()
        step(carry, x)
        return {k: [jnp.asarray(a) for a in arrays] for k, (_, arrays) in behind.items()}

    program, shape = jax.make_jaxpr(shared, return_shape=True)(carry, x)
    depending = [True] * len(program.out_avals) if program.effects else dependence.depending(program)
    # The arrays returned here do not depend on the operands of a step, so zeros are passed; the others are discarded.
    nothing = [jnp.zeros(a.shape, a.dtype) for a in jax.tree.leaves((carry, x))]
    values = _jax.function_of(program)(*nothing) if not all(depending) else [None] * len(depending)
    known = [None if depends else a for a, depends in zip(values, depending, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(shape), known)


def _worth_emitting(value: Value, steps: int, stacked: bool) -> bool:
    """Whether what all steps emit, products and the inputs of their maps, is smaller than the gradient."""
    if isinstance(value, list):
        direct, inputs, _ = value
        parts = [x for x in (direct, *inputs) if isinstance(x, Unevaluated)]
        if not all(_worth_emitting(part, steps, stacked) for part in parts):
            return False
        held = sum(part.held if steps == 1 else steps * _at_each_position(part) for part in parts)
        return worth_holding(held + sum(x.size for x in inputs if not isinstance(x, Unevaluated)), direct.size)
    if not isinstance(value, Unevaluated):
        return False
    if any(term.is_scaled_array or (stacked and term.row is not None) for term in value.terms):
        return False
    held = value.held if steps == 1 else steps * _at_each_position(value)
    return not value.terms or worth_holding(held, value.size)


def _at_each_position(value: Unevaluated) -> int:
    return sum(term.held_at_each_position for term in value.terms)


def _first(a: Any) -> Any:
    """What the first step takes of an operand, to trace with."""
    if _jax.is_offloaded(a):  # a ShapeDtypeStruct cannot say so
        return lax.index_in_dim(a, 0, keepdims=False)
    return jax.ShapeDtypeStruct(a.shape[1:], a.dtype)


def _along(value: Unevaluated, S: int, group: bool) -> Unevaluated:
    """Products stacked by a loop: the new first axis is a position, or else a group and an axis of the result."""

    def one(p: Product) -> Product:
        label = len(p.sizes)
        stacked = dataclasses.replace(
            p,
            left_labels=(label, *p.left_labels),
            right_labels=(label, *p.right_labels),
            sizes=(*p.sizes, S),
            place=(Axis(S, 0, ((label, 1),)), *p.place) if group else p.place,
            stepped=not group,
        )
        return squeezed(stacked)

    shape = (S, *value.shape) if group else value.shape
    return Unevaluated(tuple(one(term) for term in value.terms), shape, value.dtype)


def cond(
    evaluate: Evaluate, eqn: _jax.Equation, values: list[Value], wanted: list[bool], used: list[bool]
) -> Sequence[Value]:
    """Evaluate a cond; each branch returns its own products, and zeros in place of the products of other branches."""
    programs, (index, *rest), differs = _jax.branches(eqn), values, _varying(values)
    rest = [without_as_written(v) for v in rest]

    def branch(program: _jax.Program, wanted: Sequence[bool]) -> Any:
        def run() -> list[Value]:
            results: list[Value] = []
            for v, value in enumerate(map(maps_materialized, evaluate(program, rest, wanted, used))):
                aval = eqn.outvars[v].aval
                if not used[v]:
                    results.append(None)
                elif wanted[v] and is_zero(value):
                    results.append(Unevaluated((), tuple(aval.shape), aval.dtype))
                elif wanted[v] and isinstance(value, Unevaluated):
                    results.append(value)
                else:
                    results.append(jnp.asarray(array_of(value)))
            return results

        return run

    kept, before = list(wanted), [False]
    while kept != before:  # as for a scan: keeping fewer results may turn other products into arrays
        before, traced = kept, [jax.eval_shape(branch(program, kept)) for program in programs]
        kept = [keep and _all_products([results[k] for results in traced]) for k, keep in enumerate(kept)]
    if not any(kept):
        arrays = _jax.bind(eqn, [array_of(value) for value in values])
        reason = reason_at(eqn, reasons.BRANCHES)
        return [Plain(a, reason) if want else a for a, want in zip(arrays, wanted, strict=True)]

    def padded(i: int) -> Any:
        def run() -> Any:
            own_results = branch(programs[i], kept)()
            nothing = [[jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), v) for v in results] for results in traced]
            results = [
                [own_results[k] if j == i else nothing[j][k] for j in range(len(programs))] if keep else own_results[k]
                for k, keep in enumerate(kept)
            ]
            return jax.tree.map(lambda a: _jax.made_varying(a, differs), results)

        return run

    results = lax.switch(array_of(index), [padded(i) for i in range(len(programs))])
    return [
        Unevaluated(tuple(t for v in result for t in v.terms), result[0].shape, result[0].dtype) if keep else result
        for result, keep in zip(results, kept, strict=True)
    ]


def _all_products(values: Sequence[Value]) -> bool:
    """Whether every branch returns products, and those of all branches together are smaller than the gradient."""
    if not all(isinstance(v, Unevaluated) and not any(t.is_scaled_array for t in v.terms) for v in values):
        return False
    return worth_holding(sum(v.held for v in values), values[0].size)
