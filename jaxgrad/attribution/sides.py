"""The matrices of a two-sided projection: random ones, and ones scaled by an optimizer's second moments."""

import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxgrad.errors import caller, naming
from jaxgrad.per_example.algebra.projection_sides import Axes, Sides, is_sides
from jaxgrad.per_example.masks_and_bounds import below_prefix
from jaxgrad.precision import working_dtype


@naming("random_sides")
def random_sides(params: PyTree, key: Array, size: PyTree, *, stacked: PyTree = 0, gaussian: bool = False) -> PyTree:
    """Draw the matrices for `project`: a `Sides` for each parameter, with `size` rows in each matrix.

    The expected inner products of projections are those of the gradients. A parameter is seen as a matrix of the first
    of its axes times the others, divided where the shorter side is longest: a convolution's kernel [3, 3, in, out] as
    one of 9·in × out. That takes size² numbers. A vector is projected from one side, onto `size` numbers. A side that
    is no longer than `size` is kept as it is, so short biases are kept whole.

    The same key, sizes and parameters' shapes give the same matrices, on any device and for parameters of any dtype.
    Signs are held as int8, and Gaussian numbers as bfloat16, so that products with gradients of bfloat16 are exact.

    Args:
        params: the parameters, or their shapes.
        key: a key of `jax.random`.
        size: rows of each matrix: a number, or a tree prefix of the parameters with numbers.
        stacked: how many leading axes of a parameter number weights of their own, as those of layers that are scanned
            over; each gets its own matrices and numbers. A number, or a tree prefix of the parameters with numbers.
        gaussian: True draws Gaussian numbers; False draws signs.

    Returns:
        The parameters' tree with a `Sides`, the matrices that project one parameter's gradient, at every leaf.

    Raises:
        ValueError: a size is below 1, `stacked` is negative or more than the parameter's number of axes, or a tree is
            not a prefix of the parameters.

    Example:
        >>> params = {"layers": jnp.ones((12, 256, 512)), "bias": jnp.ones(10)}
        >>> sides = random_sides(params, jax.random.key(0), 16, stacked={"layers": 1, "bias": 0})
        >>> {name: s.result(params[name].shape) for name, s in sides.items()}
        {'bias': (10,), 'layers': (12, 16, 16)}

    Source: Choe et al. 2024 (LoGra).
    """
    treedef: Any = jax.tree.structure(params)
    shapes = [tuple(jnp.shape(p)) for p in jax.tree.leaves(params)]
    sizes, leading = (_for_each_leaf(prefix, treedef) for prefix in (size, stacked))
    drawn = []
    for i, (shape, k, n) in enumerate(zip(shapes, sizes, leading, strict=True)):
        if operator.index(k) < 1 or not 0 <= operator.index(n) <= len(shape):
            raise ValueError(
                f"{caller()}: expected a size of at least 1, and stacked axes from 0 to the parameter's number of "
                f"axes, got size {k} and {n} stacked axes for a parameter of shape {list(shape)}."
            )
        drawn.append(_drawn(shape, n, jax.random.fold_in(key, i), k, gaussian))
    return treedef.unflatten(drawn)


def _for_each_leaf(prefix: PyTree, params_tree: Any) -> list[Any]:
    """The numbers of a tree prefix, one for each leaf of the parameters."""
    numbers, groups = below_prefix(prefix, params_tree)
    return [n for n, group in zip(numbers, groups, strict=True) for _ in group]


def _drawn(shape: Sequence[int], stacked: int, key: Array, size: int, gaussian: bool) -> Sides:
    rest = range(stacked, len(shape))
    count = _rows(shape[stacked:])
    stack = tuple(range(stacked))

    def matrix(k: int, axes: Sequence[int]) -> Array | None:
        if math.prod(shape[axis] for axis in axes) <= size:
            return None
        sizes = (size, *(shape[axis] for axis in (*stack, *axes)))
        return _numbers(jax.random.fold_in(key, k), sizes, gaussian)

    rows, columns = matrix(0, rest[:count]), matrix(1, rest[count:])
    scale = float(size) ** (-0.5 * sum(side is not None for side in (rows, columns)))
    return Sides(rows, columns, (*stack, *rest[:count]), (*stack, *rest[count:]), stack, scale)


def _rows(shape: Sequence[int]) -> int:
    """How many of a parameter's axes are its rows: where the shorter of the two sides is longest."""
    if len(shape) < 2:
        return len(shape)
    return max(range(1, len(shape)), key=lambda k: min(math.prod(shape[:k]), math.prod(shape[k:])))


def _numbers(key: Array, shape: Sequence[int], gaussian: bool) -> Array:
    """Signs as int8, or Gaussian numbers as bfloat16, that do not depend on whether 64-bit numbers are enabled."""
    if gaussian:
        return jax.random.normal(key, shape, jnp.float32).astype(jnp.bfloat16)
    bits = jax.random.bits(key, shape, jnp.uint32) >> jnp.uint32(31)
    return 1 - 2 * bits.astype(jnp.int8)


@naming("normalized")
def normalized(sides: PyTree, second_moments: PyTree, eps: float = 1e-8, *, factored: bool = True) -> PyTree:
    """Divide the gradients by the roots of an optimizer's second moments before they are projected.

    Formula: g / √(v + eps²), entry by entry, for the second moments v that Adam keeps as `nu`. Dividing by a whole v
    would undo the products: each gradient would have to be materialized before it is projected, T·F·K operations and
    B × parameters numbers, a few examples at a time. If `factored`, v is therefore replaced by the product of its means
    over rows and over columns, divided by its mean, which scales the matrices and costs nothing. For vectors that is v
    itself. Stacked weights have means of their own.

    Args:
        sides: the parameters' tree with a `Sides` at every leaf.
        second_moments: a tree like the parameters, ≥ 0.
        eps: its square is added to v; about what Adam adds to the root.
        factored: False divides by v itself.

    Returns:
        New sides.

    Raises:
        ValueError: the second moments have a different tree than the sides, or shapes that do not fit them.

    Example:
        >>> params = {"W": jnp.ones((30, 20)), "b": jnp.ones(30)}
        >>> sides = random_sides(params, jax.random.key(0), 4)
        >>> loss = lambda p, x: jnp.tanh(p["W"] @ x + p["b"]).sum()
        >>> g = jg.per_example_grad(loss)(params, jnp.ones((5, 20)))
        >>> jg.attribution.project(g, normalized(sides, g.second_moment())).shape
        (5, 20)

    Source: Xia et al. 2024 (LESS) for Adam; Shazeer and Stern 2018 (Adafactor) for factored moments.
    """
    treedef: Any
    moments_tree: Any
    leaves, treedef = jax.tree.flatten(sides, is_leaf=is_sides)
    moments, moments_tree = jax.tree.flatten(second_moments)
    if moments_tree != treedef:
        raise ValueError(f"{caller()}: expected second moments like the sides, {treedef}, got {moments_tree}.")
    one = _by_factors if factored else _by_entries
    scaled = []
    for s, v in zip(leaves, moments, strict=True):
        s.check(jnp.shape(v), "")
        v = jnp.asarray(v)
        scaled.append(one(s, v.astype(working_dtype(v.dtype)) + eps**2))
    return treedef.unflatten(scaled)


def _by_entries(sides: Sides, v: Array) -> Sides:
    return sides.replace(weights=_times(sides.weights, v**-0.5))


def _by_factors(sides: Sides, v: Array) -> Sides:
    matrices = {"rows": (sides.rows, sides.row_axes), "columns": (sides.columns, sides.column_axes)}
    groups = {name: set(axes) & sides.summed for name, (matrix, axes) in matrices.items() if matrix is not None}
    others = set(sides.kept(v.ndim)) - set(sides.stacked)  # short sides, which are kept
    everything = others.union(*groups.values())
    factors = {name: _mean(v, everything - group) ** -0.5 for name, group in groups.items()}
    count = len(groups) + bool(others)
    weights = _mean(v, everything) ** ((count - 1) / 2)
    if others:
        weights = weights * _mean(v, everything - others) ** -0.5
    changes: dict[str, Any] = {"weights": _times(sides.weights, weights)}
    for name, factor in factors.items():
        matrix, axes = matrices[name]
        axes, matrix = _with_axes(matrix, axes, sides.stacked)
        factor = factor.reshape([factor.shape[axis] for axis in axes])
        changes |= {name: matrix.astype(v.dtype) * factor[None], f"{name.rstrip('s')}_axes": axes}
    return sides.replace(**changes)


def _mean(v: Array, axes: set[int]) -> Array:
    return v.mean(tuple(axes), keepdims=True)


def _times(weights: Array | None, factor: Array) -> Array:
    return factor if weights is None else weights.astype(factor.dtype) * factor


def _with_axes(matrix: Array, axes: Axes, more: Axes) -> tuple[Axes, Array]:
    """The matrix with these further axes of the parameter, of size 1 where it did not have them."""
    union = tuple(sorted({*axes, *more}))
    places = [1 + k for k, axis in enumerate(union) if axis not in axes]
    return union, jnp.expand_dims(matrix, places)
