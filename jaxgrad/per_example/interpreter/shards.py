"""A shard_map in a gradient's program: its products leave it unevaluated, with each operand sharded as inside."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from jaxgrad import _jax
from jaxgrad.per_example.interpreter import undone
from jaxgrad.per_example.interpreter.as_map import Evaluate
from jaxgrad.per_example.interpreter.undone import Labels, Term
from jaxgrad.per_example.interpreter.values import (
    FORMED,
    Plain,
    Shared,
    Undone,
    Value,
    array_of,
    is_shared,
    is_zero,
    zero,
)

Names = tuple[str, ...]


class Leaving(NamedTuple):
    """How one term leaves a shard_map.

    Attributes:
        added: labels of new leading axes of both operands; each has size 1 on a device.
        dims: the term's dims, with the new labels.
        names: for each label, the mesh axes over which it is sharded.
    """

    added: Labels
    dims: tuple[Labels, ...]
    names: dict[int, Names]

    def specs(self, term: Term) -> tuple[PartitionSpec, PartitionSpec]:
        """The partition specs of the two operands."""
        left, right = (
            PartitionSpec(*(self.names.get(label) or None for label in (*self.added, *labels)))
            for labels in (term.left_labels, term.right_labels)
        )
        return left, right

    def held(self, term: Term, mesh: Any) -> int:
        """The number of entries of the two operands on all devices."""
        pairs = ((term.left, term.left_labels), (term.right, term.right_labels))
        names = [[n for label in (*self.added, *labels) for n in self.names.get(label, ())] for _, labels in pairs]
        return sum(a.size * math.prod(mesh.shape[n] for n in of) for (a, _), of in zip(pairs, names, strict=True))

    def sides(self, term: Term) -> tuple[Array, Array]:
        """The two operands as they leave, with the new axes."""
        ones = [1] * len(self.added)
        return term.left.reshape([*ones, *term.left.shape]), term.right.reshape([*ones, *term.right.shape])

    def outside(self, term: Term, left: Any, right: Any, shape: Sequence[int]) -> Term:
        """The term outside the shard_map, from its operands there."""
        box = (
            None
            if term.box is None
            else tuple(
                (start, stride, n if term.whole(k) else full)
                for k, ((start, stride, full), n) in enumerate(zip(term.box, shape, strict=True))
            )
        )
        changes: dict[str, Any] = {"box": box, "dims": self.dims, "over": ()}
        labels = {"left_labels": (*self.added, *term.left_labels), "right_labels": (*self.added, *term.right_labels)}
        return undone.replace(term, left=left, right=right, **labels, **changes)


def leaving(term: Term, spec: PartitionSpec) -> Leaving | None:
    """How a term leaves whose result is sharded by `spec`; None if no product can represent that."""
    if term.windows:
        return None
    differs = [_jax.varying(term.left), _jax.varying(term.right)]
    sides = [term.left_labels, term.right_labels]
    added: list[int] = []
    names: dict[int, Names] = {}
    dims = list(term.dims)

    def new() -> int:
        added.append(term.fresh() + len(added))
        return added[-1]

    for k, axes in enumerate(map(_names, [*spec, *[None] * (len(dims) - len(spec))])):
        if not axes:
            continue
        labels, on_row = dims[k], term.row is not None and term.row[0] in dims[k]
        if not term.whole(k) or on_row:
            return None
        mine = [bool(labels) and labels[0] in side for side in sides]
        others = [bool(set(axes) & axes_) for own, axes_ in zip(mine, differs, strict=True) if not own]
        if any(mine) and not any(others):
            names[labels[0]] = axes
        elif term.row is not None:
            return None
        else:  # both operands differ between devices: a group
            dims[k] = (new(), *labels)
            names[added[-1]] = axes
    if term.over:
        positions = [label for label in sides[0] if label in sides[1] and label not in term.out]
        names[positions[0] if positions and term.row is None else new()] = term.over
    for side, along in zip(sides, differs, strict=True):
        if along - {name for label in (*added, *side) for name in names.get(label, ())}:
            return None
    return Leaving(tuple(added), tuple(dims), names)


def _names(entry: Any) -> Names:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def shard_map(
    evaluate: Evaluate, eqn: _jax.Equation, values: Sequence[Value], wanted: Sequence[bool], used: Sequence[bool]
) -> list[Value] | None:
    """Evaluate the equation and keep its products factored; None if there is none to keep."""
    parts = _jax.shard_map_parts(eqn)
    if parts is None or eqn.effects:
        return None
    program = _jax.body(eqn)
    zeros = {k: zero(v.aval.shape, v.aval.dtype) for k, v in enumerate(program.jaxpr.invars) if is_zero(values[k])}
    given = [k for k, v in enumerate(values) if v is not None and k not in zeros]
    shared = [is_shared(values[k]) for k in given]

    def inside(*arrays: Any) -> list[Value]:
        of_all = [Shared(a) if same else a for a, same in zip(arrays, shared, strict=True)]
        known = zeros | dict(zip(given, of_all, strict=True))
        return evaluate(program, [known.get(k) for k in range(len(values))], wanted, used)

    def mapped(function: Any, out_specs: Any) -> Any:
        in_specs = tuple(parts.in_specs[k] for k in given)
        axes = parts.axis_names
        return jax.shard_map(function, mesh=parts.mesh, in_specs=in_specs, out_specs=out_specs, axis_names=axes)

    # The body is traced once to find how its products leave.
    found: list[Value] = []
    plans: list[list[Leaving] | None] = []

    def look(*arrays: Any) -> tuple[()]:
        found.extend(inside(*arrays))
        for k, value in enumerate(found):
            plans.append(None)
            if wanted[k] and isinstance(value, Undone) and not value.maps:
                terms = [leaving(term, parts.out_specs[k]) for term in value.terms]
                plan = [term for term in terms if term is not None]
                held = sum(p.held(term, parts.mesh) for p, term in zip(plan, value.terms, strict=False))
                if len(plan) == len(terms) and held < max(eqn.outvars[k].aval.size, 1):
                    plans[k] = plan
        return ()

    arrays = _jax.placed([jnp.asarray(array_of(values[k])) for k in given], [eqn.invars[k] for k in given])
    jax.eval_shape(mapped(look, ()), *arrays)
    if not any(plans):
        return None

    def of_terms(k: int, value: Value, function: Any, otherwise: Any) -> Any:
        if not used[k]:
            return None
        plan = plans[k]
        return otherwise if plan is None else [function(*pair) for pair in zip(plan, value.terms, strict=True)]

    def run(*arrays: Any) -> list[Any]:
        results = enumerate(inside(*arrays))
        return [of_terms(k, v, Leaving.sides, array_of(v) if plans[k] is None else None) for k, v in results]

    out_specs = [of_terms(k, v, Leaving.specs, parts.out_specs[k]) for k, v in enumerate(found)]
    results: list[Value] = []
    for k, result in enumerate(mapped(run, out_specs)(*arrays)):
        aval, value, plan = eqn.outvars[k].aval, found[k], plans[k]
        if plan is not None:
            triples = zip(plan, value.terms, result, strict=True)
            terms = [p.outside(term, left, right, aval.shape) for p, term, (left, right) in triples]
            results.append(Undone(tuple(terms), tuple(aval.shape), aval.dtype))
        elif wanted[k]:
            results.append(Plain(result, value.reason if isinstance(value, Plain) else FORMED))
        else:
            results.append(result)
    return results
