"""Projections inside the loop that computes a gradient: a measurer whose targets are `Sides`, pulled back to a step."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jaxgrad import _jax
from jaxgrad.per_example.algebra.one_example import for_one_example
from jaxgrad.per_example.algebra.projected import projected
from jaxgrad.per_example.algebra.projection_sides import Axes, Sides
from jaxgrad.per_example.interpreter.measuring import Measurer, measure_of
from jaxgrad.per_example.interpreter.values import Value
from jaxgrad.per_example.lower import factors_of
from jaxgrad.sharding import with_automatic_axes


class Placed(NamedTuple):
    """How a variable that becomes a parameter's gradient is projected.

    Attributes:
        sides: the sides for the variable's own axes.
        order: the axes that are kept, in the order that they have in the projection.
    """

    sides: Sides
    order: Axes

    @staticmethod
    def of_parameter(sides: Sides, ndim: int) -> "Placed":
        """For the parameter's gradient itself."""
        return Placed(sides, sides.kept(ndim))


_project = for_one_example(with_automatic_axes(by_example=True)(projected))


def _one(value: Value, shape: tuple[int, ...], dtype: Any, placed: Placed) -> Array:
    """The numbers of one example's gradient, with the axes that are kept in the target's order."""
    measure: Array | None = measure_of(value)
    if measure is not None:
        return measure
    numbers: Array = _project(factors_of(value, shape, dtype), placed.sides)
    kept = placed.sides.kept(len(shape))
    return numbers.transpose(*(kept.index(axis) for axis in placed.order), *range(len(kept), numbers.ndim))


def _of_all_steps(numbers: Array, placed: Placed) -> Array:
    """Stacked along axis 0 of the variable: that axis is kept, or summed over."""
    return jnp.moveaxis(numbers, 0, placed.order.index(0)) if 0 in placed.order else numbers.sum(0)


def _of_a_step(placed: Placed) -> tuple[Any, Callable[[Any], Placed]]:
    """The sides of one step's slice of the variable, from slices of those of the whole."""
    sides = placed.sides
    axes = {"rows": sides.row_axes, "columns": sides.column_axes}
    sliced = {
        name: jnp.moveaxis(getattr(sides, name), 1, 0)
        for name, on in axes.items()
        if getattr(sides, name) is not None and on[:1] == (0,)
    }
    weights = sides.weights
    if weights is not None and weights.shape[0] != 1:
        sliced["weights"], weights = weights, None

    def lowered(axes: Axes) -> Axes:
        return tuple(axis - 1 for axis in axes if axis)

    def step(slices: dict[str, Array]) -> Placed:
        changes: dict[str, Any] = {"weights": None if weights is None else weights[0]}
        changes |= {"row_axes": lowered(sides.row_axes), "column_axes": lowered(sides.column_axes)}
        return Placed(sides.replace(**changes | slices, stacked=lowered(sides.stacked)), lowered(placed.order))

    return sliced, step


def _before(eqn: _jax.Equation, placed: Placed) -> Placed | None:
    """The target of the operand of an equation that moves entries about; None if it mixes axes of different use."""
    shape, shape_ = (tuple(v.aval.shape) for v in (eqn.invars[0], eqn.outvars[0]))
    if eqn.primitive is lax.transpose_p:
        return _permuted(placed, [int(axis) for axis in eqn.params["permutation"]])
    if eqn.primitive is lax.rev_p:
        return _reversed(placed, [int(axis) for axis in eqn.params["dimensions"]], shape)
    if eqn.primitive is lax.reshape_p and eqn.params["dimensions"] is not None:
        return None
    return placed if shape == shape_ else _reshaped(placed, shape, shape_)


def _permuted(placed: Placed, axes: Sequence[int]) -> Placed:
    """The variable's axis axes[i] becomes axis i."""
    sides = placed.sides

    def moved(matrix: Any, old: Axes) -> tuple[Any, Axes]:
        new = [axes[axis] for axis in old]
        order = np.argsort(new)
        return None if matrix is None else matrix.transpose(0, *(1 + k for k in order)), tuple(sorted(new))

    (rows, row_axes), (columns, column_axes) = (
        moved(sides.rows, sides.row_axes if sides.rows is not None else ()),
        moved(sides.columns, sides.column_axes if sides.columns is not None else ()),
    )
    weights = None if sides.weights is None else sides.weights.transpose(np.argsort(axes))
    stacked = tuple(sorted(axes[axis] for axis in sides.stacked))
    sides = Sides(rows, columns, row_axes, column_axes, stacked, sides.scale, weights)
    return Placed(sides, tuple(axes[axis] for axis in placed.order))


def _reversed(placed: Placed, axes: Sequence[int], shape: Sequence[int]) -> Placed | None:
    sides = placed.sides
    if any(axis in placed.order and shape[axis] != 1 for axis in axes):
        return None
    rows, columns = (
        None if matrix is None else jnp.flip(matrix, [1 + k for k, axis in enumerate(on) if axis in axes])
        for matrix, on in ((sides.rows, sides.row_axes), (sides.columns, sides.column_axes))
    )
    weights = None if sides.weights is None else jnp.flip(sides.weights, axes)
    return placed._replace(sides=sides.replace(rows=rows, columns=columns, weights=weights))


def _reshaped(placed: Placed, shape: Sequence[int], shape_: Sequence[int]) -> Placed | None:
    """Reshaped from `shape` to `shape_`, the shape that the target is for."""
    sides = placed.sides
    chunks = _chunks(shape, shape_)
    if chunks is None or sides.weights is not None:
        return None
    uses: dict[int, int] = {}  # for each axis of the variable, an axis of the result that is used as it is
    order: list[int] = []
    for before, after in chunks:
        if len({_use(sides, axis) for axis in after}) != 1:
            return None
        uses |= dict.fromkeys(before, after[0])
        positions = [placed.order.index(axis) for axis in after if axis in placed.order]
        if positions != list(range(positions[0], positions[0] + len(positions))) if positions else False:
            return None
    for axis in placed.order:
        order += [before for before, after in uses.items() if after == axis]
    order += [axis for axis, n in enumerate(shape) if n == 1]

    def moved(matrix: Any, old: Axes) -> tuple[Any, Axes]:
        new = tuple(axis for axis, after in uses.items() if after in old)
        return None if matrix is None else matrix.reshape(matrix.shape[0], *(shape[axis] for axis in new)), new

    (rows, row_axes), (columns, column_axes) = (
        moved(sides.rows, sides.row_axes),
        moved(sides.columns, sides.column_axes),
    )
    stacked = tuple(axis for axis, after in uses.items() if after in sides.stacked)
    return Placed(Sides(rows, columns, row_axes, column_axes, stacked, sides.scale), tuple(order))


def _use(sides: Sides, axis: int) -> tuple[bool, ...]:
    """Which matrices have an axis, and whether it is kept."""
    return (*(axis in axes for _, axes in sides.matrices), axis in sides.summed)


def _chunks(shape: Sequence[int], shape_: Sequence[int]) -> list[tuple[list[int], list[int]]] | None:
    """The shortest runs of axes, without those of size 1, that have as many entries before as after a reshape."""
    if 0 in (*shape, *shape_):
        return None
    before = [axis for axis, n in enumerate(shape) if n != 1]
    after = [axis for axis, n in enumerate(shape_) if n != 1]
    found: list[tuple[list[int], list[int]]] = []
    while before:
        first, second = [before.pop(0)], [after.pop(0)]
        sizes = [shape[first[0]], shape_[second[0]]]
        while sizes[0] != sizes[1]:
            if sizes[0] < sizes[1]:
                first.append(before.pop(0))
                sizes[0] *= shape[first[-1]]
            else:
                second.append(after.pop(0))
                sizes[1] *= shape_[second[-1]]
        found.append((first, second))
    return found


PROJECTOR = Measurer(_one, _of_all_steps, _before, _of_a_step, adds_up=True)
