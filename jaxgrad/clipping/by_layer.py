"""Sums of clipped gradients with a bound for every layer of a stack, in one pass.

The layers of a stack, such as those that a `lax.scan` runs over, are rows of parameters with an axis in front. The
gradients of a layer are complete inside the backward loop: they are clipped and summed there, and their factors are
dropped.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxgrad.errors import caller
from jaxgrad.per_example.algebra.chunks import chunk_size, map_examples, sum_examples
from jaxgrad.per_example.algebra.constructors import Dense
from jaxgrad.per_example.algebra.factors import accumulator, written_out
from jaxgrad.per_example.algebra.one_example import for_one_example
from jaxgrad.per_example.arguments import Arguments
from jaxgrad.per_example.gradients import PerExampleGrads
from jaxgrad.per_example.interpreter.measuring import Item, Measurer, measure_of
from jaxgrad.per_example.lower import factors_of
from jaxgrad.per_example.transform import Transformed
from jaxgrad.precision import added
from jaxgrad.sharding import kept, with_automatic_axes

Multipliers = Callable[[Array, Array | None, Array, Array, Array], Array]
"""(norms [B], magnitudes [B] or None, bound, keep [B], rounding) → the numbers [B] that multiply the gradients."""


class Clipped(NamedTuple):
    """What is measured of one example's gradient of a parameter.

    Attributes:
        total: the sum of the clipped gradients of the whole batch, in float32 or wider.
        norm: the norm of the gradient of the parameter's group: a number, or [L] with a bound for every layer.
    """

    total: Array
    norm: Array


AXES = Clipped(None, 0)  # type: ignore[arg-type]
"""The axis of examples in each field; None for the sum over them."""


@dataclass(frozen=True)
class Group:
    """The target of each parameter of a group that has one bound, or one for every layer.

    Attributes:
        number: which group it is.
        members: how many parameters it has.
        bound: a number, or [L].
        keep: a boolean: False for an example that is masked.
        in_loop: whether this is the target of one layer, inside the loop over the layers.
    """

    number: int
    members: int
    bound: Array
    keep: Array
    in_loop: bool = False


def sums_by_layer(
    transformed: Transformed,
    arguments: Arguments,
    groups: Sequence[tuple[Array, Sequence[int]]],
    mask: Array,
    multipliers: Multipliers,
) -> tuple[Any, Any, list[Array], list[Array]]:
    """Return (values, aux, the leaves of the sum, the norms [B] or [B, L] of each group).

    Args:
        transformed, arguments: the loss and the call.
        groups: the bound of each group, a number or [L], and the indices of its parameters.
        mask: [B], False for the examples that are left out.
        multipliers: the weighting.
    """

    def targets(keep: Array, bounds: Sequence[Array]) -> list[Group]:
        of = {
            i: Group(number, len(members), bound, keep)
            for number, (bound, (_, members)) in enumerate(zip(bounds, groups, strict=True))
            for i in members
        }
        return [of[i] for i in range(len(of))]

    measurer, bounds = _measurer(multipliers), [bound for bound, _ in groups]
    axes = [AXES] * len(arguments.params)
    values, aux, found = transformed.measured(arguments, measurer, targets, axes, mask, bounds)
    return values, aux, [m.total for m in found], [found[members[0]].norm for _, members in groups]


def _measurer(multipliers: Multipliers) -> Measurer:
    of_group = for_one_example(functools.partial(_clipped_batch, multipliers), summed=True)
    of_layers = for_one_example(functools.partial(_clipped_layers, multipliers), summed=True)

    def together(items: Sequence[Item]) -> list[Clipped | None]:
        found: list[Clipped | None] = [measure_of(value) for value, *_ in items]
        groups: dict[int, list[int]] = {}
        for k, (*_, target) in enumerate(items):
            groups.setdefault(target.number, []).append(k)
        for members in groups.values():
            target = items[members[0]][3]
            if len(members) < target.members:  # the others are not complete here
                found = [None if k in members else measure for k, measure in enumerate(found)]
            elif any(found[k] is None for k in members):
                parts = [factors_of(*items[k][:3]) for k in members]
                function = of_layers if target.bound.ndim else of_group
                totals, norm = function((parts, target.keep), target.bound)
                for k, total in zip(members, totals, strict=True):
                    found[k] = Clipped(total, norm)
        return found

    return Measurer(_alone, lambda clipped, _: clipped, of_a_step=_of_a_step, has_layout=True, together=together)


def _alone(*_: Any) -> Any:
    raise NotImplementedError("the gradients of a group are measured together")


def _of_a_step(target: Group) -> tuple[Array, Callable[[Array], Group]] | None:
    if target.in_loop or not target.bound.ndim:
        return None
    return target.bound, lambda bound: replace(target, bound=bound, in_loop=True)


def _gradients(parts: Sequence[Any]) -> PerExampleGrads:
    return PerExampleGrads(dict(enumerate(parts)))


def _clipped_batch(
    multipliers: Multipliers, batch: tuple[Sequence[Any], Array], bound: Array
) -> tuple[list[Array], Array]:
    """(Σ_b c_b g_b of every parameter, the norms [B] of the gradients over these parameters)."""
    parts, mask = batch
    g = _gradients(parts)
    norms = g.norms()
    keep = mask & jnp.isfinite(norms)
    c = multipliers(norms, g.magnitudes(), bound.astype(norms.dtype), keep, g.rounding())
    return jax.tree.leaves(g.where(keep).scale(c).sum(norms.dtype)), norms


@with_automatic_axes(by_example=False)
def _clipped_layers(
    multipliers: Multipliers, batch: tuple[Sequence[Any], Array], bounds: Array
) -> tuple[list[Array], Array]:
    """As `_clipped_batch`, with norms [B, L], for layers that are not complete inside a loop.

    The gradients are materialized in float32 or wider, a few examples at a time.
    """
    parts, mask = batch
    g = _gradients(parts)
    size = chunk_size(2 * sum(f[0].layout.size * accumulator(*f).itemsize for f in parts), mask.shape[0])

    def materialized(parts: Sequence[Any]) -> list[Array]:
        return [added([written_out(f) for f in factors]) for factors in parts]

    def norms_of(parts: Sequence[Any]) -> Array:
        arrays = materialized(parts)
        by_layer = [a.reshape(a.shape[0] * a.shape[1], *a.shape[2:]) for a in arrays]
        rows = PerExampleGrads({k: (Dense.of(a, a.dtype),) for k, a in enumerate(by_layer)})
        return rows.norms().reshape(arrays[0].shape[:2])

    norms = map_examples(norms_of, size, parts)
    keep = mask[:, None] & jnp.isfinite(norms)
    magnitudes, rounding = g.magnitudes(), g.rounding()

    def of_layer(norms: Array, bound: Array, keep: Array) -> Array:
        return multipliers(norms, magnitudes, bound, keep, rounding)

    c = jax.vmap(of_layer, (1, 0, 1), 1)(norms, bounds.astype(norms.dtype), keep)

    def weighted(parts: Sequence[Any], c: Array, keep: Array) -> list[Array]:
        def total(a: Array) -> Array:
            flat = kept(keep.ravel(), a.reshape(keep.size, *a.shape[2:])).astype(norms.dtype)
            return (c.reshape(c.size, *[1] * (flat.ndim - 1)) * flat).reshape(a.shape).sum(0)

        return [total(a) for a in materialized(parts)]

    return sum_examples(weighted, size, parts, c, keep), norms


def checked_layers(bounds: Sequence[Any], groups: Sequence[Sequence[int]], arguments: Arguments) -> None:
    """Raise ValueError if there is an array of bounds for parameters that are not a stack of as many layers."""
    for bound, members in zip(bounds, groups, strict=True):
        for i in members if jnp.ndim(bound) else ():
            shape = jnp.shape(arguments.params[i])
            if shape[:1] != jnp.shape(bound):
                raise ValueError(
                    f"{caller()}: expected one bound for each layer of the stacked parameter at "
                    f"params{arguments.paths[i]}, of shape {shape}, got an array of shape {jnp.shape(bound)}."
                )


def is_by_layer(max_norm: PyTree) -> bool:
    """Whether any bound is an array with a number for every layer."""
    return any(jnp.ndim(bound) for bound in jax.tree.leaves(max_norm))
