"""Checks of the arguments of PerExampleGrads' methods other than gradients: masks, indices, numbers, bounds."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxgrad.errors import caller


def checked_numbers(c: Any, count: int) -> Array:
    """Return `c` as a floating array [count]; raise ValueError for anything else."""
    c = jnp.asarray(c)
    if c.shape != (count,) or not jnp.issubdtype(c.dtype, jnp.floating):
        raise ValueError(
            f"{caller()}: expected one floating number per example, shape {(count,)}, got {c.dtype} of shape {c.shape}."
        )
    return c


def checked_mask(mask: Any, count: int) -> Array:
    """Return `mask` as a boolean array [count]; raise ValueError for anything else."""
    mask = jnp.asarray(mask)
    if mask.dtype != bool or mask.shape != (count,):
        raise ValueError(
            f"{caller()}: expected a boolean mask of shape {(count,)}, got {mask.dtype} of shape {mask.shape}."
        )
    return mask


def checked_index(index: Any) -> Array:
    """Return `index` as a one-dimensional array of integers or booleans; raise TypeError for anything else."""
    try:
        chosen = jnp.asarray(index)
    except TypeError:
        chosen = None
    if chosen is not None and chosen.shape == (0,):  # an empty selection; an empty list has no dtype of its own
        chosen = chosen.astype(int)
    if chosen is None or chosen.ndim != 1 or not (chosen.dtype == bool or jnp.issubdtype(chosen.dtype, jnp.integer)):
        raise TypeError(
            f"{caller()}: expected a slice or a one-dimensional array of integers or booleans, got {index!r}. For one "
            f"example take g[i : i + 1]; for one parameter take g.factors or g.materialize()."
        )
    return chosen


def checked_bound(bound: Any, by_layer: bool = False) -> None:
    """Raise ValueError if `bound` is known not to be a positive number or, if `by_layer`, an array [L] of them."""
    try:
        real = any(jnp.issubdtype(jnp.result_type(bound), kind) for kind in (jnp.integer, jnp.floating))
        wrong = not real or jnp.ndim(bound) > by_layer or not jnp.all(jnp.asarray(bound) > 0)
    except jax.errors.TracerBoolConversionError:  # known only at run time, where a bound that is not positive gives NaN
        wrong = False
    except TypeError:
        wrong = True
    if wrong:
        raise ValueError(
            f"{caller()}: expected positive numbers as bounds, got {bound!r}. One number bounds all parameters "
            f"together; to bound groups of them, pass a tree prefix of numbers."
            + by_layer
            * " An array [L] bounds each layer of parameters that are stacked along axis 0."
        )


def checked_groups(prefix: PyTree, params_tree: Any, by_layer: bool = False) -> tuple[list[Any], list[list[int]]]:
    """Check a tree prefix of positive numbers; return the numbers and, for each, the indices of its leaves.

    Args:
        prefix: the numbers.
        params_tree: the structure of the parameters.
        by_layer: whether arrays of numbers are allowed.

    Raises:
        ValueError: a number is not positive, or the tree is not a prefix of the parameters.
    """
    bounds, groups = below_prefix(prefix, params_tree)
    for bound in bounds:
        checked_bound(bound, by_layer)
    return bounds, groups


def below_prefix(prefix: PyTree, params_tree: Any) -> tuple[list[Any], list[list[int]]]:
    """The leaves of a tree prefix of the parameters and, for each, the indices of the parameters below it.

    Raises:
        ValueError: the tree is not a prefix of the parameters.
    """
    treedef: Any
    leaves, treedef = jax.tree.flatten(prefix)
    try:
        groups = treedef.flatten_up_to(params_tree.unflatten(range(params_tree.num_leaves)))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{caller()}: expected a number or a tree prefix of the parameters, {params_tree}, got {treedef}."
        ) from error
    return leaves, [jax.tree.leaves(group) for group in groups]
