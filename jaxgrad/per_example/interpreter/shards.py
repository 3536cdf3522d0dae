"""A shard_map in a gradient's program: its products leave it unevaluated, with each operand sharded as inside."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from jaxgrad import _jax
from jaxgrad.per_example.algebra.place import Axis, Labels, Place
from jaxgrad.per_example.algebra.product import Product, squeezed
from jaxgrad.per_example.interpreter.as_map import Evaluate
from jaxgrad.per_example.interpreter.cost_model import worth_holding
from jaxgrad.per_example.interpreter.reasons import FORMED
from jaxgrad.per_example.interpreter.values import Plain, Shared, Unevaluated, Value, array_of, is_shared, is_zero, zero

Names = tuple[str, ...]


class Leaving(NamedTuple):
    """How one product leaves a shard_map.

    Attributes:
        left, right: the labels of its sides, with new leading axes; each of these has size 1 on a device.
        place: where the product is outside.
        names: for each label, the mesh axes over which it is sharded.
    """

    left: Labels
    right: Labels
    place: Place
    names: dict[int, Names]

    def specs(self, p: Product) -> tuple[PartitionSpec, PartitionSpec]:
        """The partition specs of the two sides."""
        left, right = (
            PartitionSpec(*(self.names.get(x) or None for x in labels)) for labels in (self.left, self.right)
        )
        return left, right

    def held(self, p: Product, mesh: Any) -> int:
        """The number of entries of the two sides on all devices."""
        sides = ((p.left, self.left), (p.right, self.right))
        return sum(a.size * math.prod(mesh.shape[n] for x in of for n in self.names.get(x, ())) for a, of in sides)

    def sides(self, p: Product) -> tuple[Array, Array]:
        """The two sides as they leave, with the new axes."""
        left, right = (
            a.reshape(*[1] * (len(labels) - a.ndim), *a.shape)
            for a, labels in ((p.left, self.left), (p.right, self.right))
        )
        return left, right

    def outside(self, p: Product, left: Any, right: Any) -> Product:
        """The product outside the shard_map, from its sides there."""
        known = dict(zip((*self.left, *self.right), (*left.shape, *right.shape), strict=True))
        sizes = tuple(known.get(x, n) for x, n in enumerate((*p.sizes, *[1] * (len(known) + 2))))
        changes: dict[str, Any] = {"place": self.place, "sizes": sizes, "over": ()}
        return squeezed(
            dataclasses.replace(p, left=left, right=right, left_labels=self.left, right_labels=self.right, **changes)
        )


def leaving(p: Product, spec: PartitionSpec, shape: Sequence[int]) -> Leaving | None:
    """How a product leaves whose result of this shape is sharded by `spec`; None if no product can represent that."""
    if p.windows:
        return None
    differs = [_jax.varying(p.left), _jax.varying(p.right)]
    sides = [p.left_labels, p.right_labels]
    added: list[list[int]] = [[], []]
    names: dict[int, Names] = {}
    place = list(p.place)
    fresh = itertools.count(len(p.sizes))

    def new(axes: Names, on: Sequence[bool]) -> int:
        label = next(fresh)
        names[label] = axes
        for side, also in zip(added, on, strict=True):
            side += [label] * also
        return label

    for k, axes in enumerate(map(_names, [*spec, *[None] * (len(place) - len(spec))])):
        if not axes:
            continue
        axis = place[k]
        if not axis.is_whole(p.sizes) or p.row in axis.labels:
            return None
        on = [axis.labels[:1] != () and axis.labels[0] in side for side in sides]
        others = [bool(set(axes) & along) for own, along in zip(on, differs, strict=True) if not own]
        if any(on) and not any(others):
            names[axis.labels[0]] = axes
            place[k] = axis._replace(size=shape[k])
        elif p.row is not None:
            return None
        else:  # both sides differ between devices: a group; or one does, on which it has one entry
            either = [bool(set(axes) & along) for along in differs]
            on = either if not any(on) and sum(either) == 1 else [True, True]
            place[k] = Axis(shape[k], 0, ((new(axes, on), axis.size), *axis.steps))
    if p.over:
        positions = [x for x in sides[0] if x in sides[1] and x not in p.out]
        if positions and p.row is None:
            names[positions[0]] = p.over
        else:
            new(p.over, [True, True])
    labels = [(*more, *side) for more, side in zip(added, sides, strict=True)]
    for side, along in zip(labels, differs, strict=True):
        if along - {name for x in side for name in names.get(x, ())}:
            return None
    return Leaving(labels[0], labels[1], tuple(place), names)


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
            if wanted[k] and isinstance(value, Unevaluated) and not value.maps:
                terms = [leaving(term, parts.out_specs[k], eqn.outvars[k].aval.shape) for term in value.terms]
                plan = [term for term in terms if term is not None]
                held = sum(p.held(term, parts.mesh) for p, term in zip(plan, value.terms, strict=False))
                if len(plan) == len(terms) and worth_holding(held, max(eqn.outvars[k].aval.size, 1)):
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
            terms = [p.outside(term, left, right) for p, term, (left, right) in triples]
            results.append(Unevaluated(tuple(terms), tuple(aval.shape), aval.dtype))
        elif wanted[k]:
            results.append(Plain(result, value.reason if isinstance(value, Plain) else FORMED))
        else:
            results.append(result)
    return results
