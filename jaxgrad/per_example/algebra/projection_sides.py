"""Sides: the two matrices that one parameter's gradient is multiplied by, and the axes that each of them has."""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxgrad.errors import caller

Axes = tuple[int, ...]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("rows", "columns", "weights"),
    meta_fields=("row_axes", "column_axes", "stacked", "scale"),
)
@dataclass(frozen=True)
class Sides:
    """How the gradient g of one parameter is projected: P g Qᵀ if it is a matrix.

    Formula: for any number of axes, scale · Σ rows[i, …] columns[j, …] weights[…] g[…], summed over the axes that a
    matrix has and that are not in `stacked`. The other axes are kept: the result is [*kept axes, k, l], without k or l
    where the matrix is None.

    Attributes:
        rows: P, [k, *sizes along row_axes]; None if it is not used.
        columns: Q, [l, *sizes along column_axes]; None if it is not used.
        row_axes, column_axes: axes of the parameter, in increasing order. Only axes in `stacked` may be in both.
        stacked: axes that are kept although a matrix varies along them: those of stacked layers.
        scale: a number that the result is multiplied by.
        weights: an array by which the gradient is multiplied, entry by entry, before it is projected; its sizes are the
            parameter's, or 1. None stands for 1. Weights that vary along an axis that is summed over are expensive: the
            gradients are then materialized, a few examples at a time.

    Example:
        >>> g = jg.per_example_grad(lambda W, x: jnp.tanh(W @ x).sum())(jnp.ones((30, 20)), jnp.ones((4, 20)))
        >>> U, _, Vt = jnp.linalg.svd(g.mean(), full_matrices=False)
        >>> jg.attribution.project(g, Sides(U[:, :3].T, Vt[:2])).shape                # onto principal directions
        (4, 6)
    """

    rows: Any = None
    columns: Any = None
    row_axes: Axes = (0,)
    column_axes: Axes = (1,)
    stacked: Axes = ()
    scale: float = 1.0
    weights: Any = None

    @property
    def matrices(self) -> list[tuple[Any, Axes]]:
        """(matrix, its axes) for each matrix that is used."""
        both = ((self.rows, self.row_axes), (self.columns, self.column_axes))
        return [(matrix, axes) for matrix, axes in both if matrix is not None]

    @property
    def summed(self) -> frozenset[int]:
        """The axes that are summed over."""
        return frozenset(axis for _, axes in self.matrices for axis in axes) - frozenset(self.stacked)

    def kept(self, ndim: int) -> Axes:
        """The axes that are kept, of a parameter with `ndim` axes."""
        return tuple(axis for axis in range(ndim) if axis not in self.summed)

    def result(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of one example's projection, for a parameter of this shape."""
        return (*(shape[axis] for axis in self.kept(len(shape))), *(matrix.shape[0] for matrix, _ in self.matrices))

    @property
    def materializes(self) -> bool:
        """Whether the weights vary along an axis that is summed over."""
        return self.weights is not None and any(self.weights.shape[axis] != 1 for axis in self.summed)

    def replace(self, **changes: Any) -> "Sides":
        """The same sides with these fields changed."""
        return dataclasses.replace(self, **changes)

    def check(self, shape: Sequence[int], path: str) -> None:
        """Raise ValueError unless these are sides for a parameter of this shape."""
        place = f" at {path}" if path else ""
        for name, matrix, axes in (("rows", self.rows, self.row_axes), ("columns", self.columns, self.column_axes)):
            if matrix is None:
                continue
            if list(axes) != sorted(set(axes)) or not set(axes) <= set(range(len(shape))):
                raise ValueError(
                    f"{caller()}: expected axes of {list(shape)} in increasing order as Sides.{name[:-1]}_axes{place}, "
                    f"got {axes}."
                )
            expected = [shape[axis] for axis in axes]
            if list(matrix.shape[1:]) != expected:
                raise ValueError(
                    f"{caller()}: expected Sides.{name}{place} of shape {['k', *expected]} for a parameter of shape "
                    f"{list(shape)}, got {list(matrix.shape)}. Each row of it is one direction."
                )
        if len(self.matrices) == 2 and set(self.row_axes) & set(self.column_axes) - set(self.stacked):
            raise ValueError(
                f"{caller()}: expected Sides{place} whose matrices share only stacked axes, got row_axes "
                f"{self.row_axes}, column_axes {self.column_axes} and stacked {self.stacked}."
            )
        weights = None if self.weights is None else self.weights.shape
        if weights is not None and (
            len(weights) != len(shape) or any(n not in (1, m) for n, m in zip(weights, shape, strict=True))
        ):
            raise ValueError(
                f"{caller()}: expected Sides.weights{place} with the sizes {list(shape)}, or 1, got {list(weights)}."
            )


def is_sides(node: Any) -> bool:
    """Test for `Sides`, for JAX's `is_leaf`."""
    return isinstance(node, Sides)


def exact(matrix: Array) -> Array:
    """The matrix in a dtype for products: integers become bfloat16, which holds signs exactly."""
    return matrix if jnp.issubdtype(matrix.dtype, jnp.floating) else matrix.astype(jnp.bfloat16)
