"""Functions of one batch, for `run`."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jaxtyping import PyTree

from jaxgrad.attribution.positions import per_position_projection
from jaxgrad.attribution.projection import per_example_projection
from jaxgrad.per_example.gradients import PerExampleGrads
from jaxgrad.per_example.measure import per_example_norms
from jaxgrad.per_example.transform import per_example_grad
from jaxgrad.streams.run import Part


def norms(
    loss: Callable[..., Any], *, argnums: int | Sequence[int] = 0, in_axes: Any = 0, spmd_axis_name: Any = None
) -> Callable[..., Part]:
    """Return a function for `run` that computes the losses, as "values", and the norms of their gradients, as "norms".

    Args:
        loss: loss of one example, as in `per_example_grad`.
        argnums, in_axes, spmd_axis_name: as in `per_example_grad`.

    Returns:
        A function of (params, *batch) that returns a `Part`. For a batch of b examples, both of its rows are [b].

    Raises:
        TypeError, ValueError: as in `per_example_grad`, when the returned function is called.

    Example:
        >>> each = norms(lambda w, x: jnp.sin(w @ x))
        >>> {name: rows.shape for name, rows in each(jnp.ones(3), jnp.eye(3)).rows.items()}
        {'values': (3,), 'norms': (3,)}
    """
    measured = per_example_norms(loss, argnums, in_axes=in_axes, spmd_axis_name=spmd_axis_name)

    def part(params: PyTree, *batch: Any) -> Part:
        values, lengths = measured(params, *batch)
        return Part({"values": values, "norms": lengths}, {})

    return part


def second_moments(
    loss: Callable[..., Any], *, argnums: int | Sequence[int] = 0, in_axes: Any = 0, spmd_axis_name: Any = None
) -> Callable[..., Part]:
    """Return a function for `run` that sums the gradients and their squares, entry by entry.

    The name of a sum is "sum" or "squares", followed by the parameter's path. Within a batch both are summed in float32
    or wider, whatever the parameters' dtype.

    Args:
        loss, argnums, in_axes, spmd_axis_name: as in `norms`.

    Returns:
        A function of (params, *batch) that returns a `Part` without rows.

    Example:
        >>> each = second_moments(lambda p, x: jnp.sin(p["w"] @ x))
        >>> {path: total.shape for path, total in each({"w": jnp.ones(3)}, jnp.eye(3)).sums.items()}
        {"squares['w']": (3,), "sum['w']": (3,)}
    """
    gradients = per_example_grad(loss, argnums, in_axes=in_axes, spmd_axis_name=spmd_axis_name)

    def part(params: PyTree, *batch: Any) -> Part:
        g = gradients(params, *batch)
        squares = jax.tree.map(lambda a: a * g.batch_size, g.second_moment())
        sums = {"sum": g.sum(jax.eval_shape(g.norms).dtype), "squares": squares}
        leaves = jax.tree_util.tree_leaves_with_path(sums)
        return Part({}, {path[0].key + jax.tree_util.keystr(path[1:]): leaf for path, leaf in leaves})

    return part


def projections(
    loss: Callable[..., Any],
    sides: PyTree,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    argnums: int | Sequence[int] = 0,
    in_axes: Any = 0,
    spmd_axis_name: Any = None,
) -> Callable[..., Part]:
    """Return a function for `run` that gives the rows "values", the losses, and "projections", of their gradients.

    The rows are an index of the examples: `search` finds those whose gradients are most like those of queries.

    Args:
        loss, argnums, in_axes, spmd_axis_name: as in `norms`.
        sides: as in `jg.attribution.per_example_projection`.
        dtype: of the projections: None for the one they are computed in. float16 holds numbers up to 65,504; bfloat16
            those of float32, to two or three digits.

    Returns:
        A function of (params, *batch); rows are [b] and [b, S].

    Example:
        >>> loss, W = lambda W, x: jnp.tanh(W @ x).sum(), jnp.ones((30, 20))
        >>> sides = jg.attribution.random_sides(W, jax.random.key(0), 4)
        >>> each = projections(loss, sides, dtype=jnp.bfloat16)
        >>> each(W, jnp.ones((5, 20))).rows["projections"].shape
        (5, 16)
    """

    def part(sides: PyTree, params: PyTree, *batch: Any) -> Part:
        projected = per_example_projection(loss, sides, argnums, in_axes=in_axes, spmd_axis_name=spmd_axis_name)
        values, numbers = projected(params, *batch)
        return Part({"values": values, "projections": numbers.astype(dtype or numbers.dtype)}, {})

    return jax.tree_util.Partial(part, sides)


def position_projections(
    losses: Callable[..., Any],
    sides: PyTree,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    argnums: int | Sequence[int] = 0,
    in_axes: Any = 0,
    block_size: int = 1,
    spmd_axis_name: Any = None,
) -> Callable[..., Part]:
    """Return a function for `run` that gives a row for each position of each sequence, to search for single tokens.

    The rows are "values", the loss terms, and "projections", of the gradient of each term alone. The name of a row is
    the pair (example, position), its index in the array of rows; `search` returns such pairs. All batches must have the
    same T, so pad the sequences, and pass the mask of the positions that count as `where` to `search`.

    Cost: T times that of `projections` at the most, in the memory of `block_size` of its backward passes and of the
    b × T × S numbers.

    Args:
        losses: losses(params, *example) → the terms [T] of one example's loss, as in
            `jg.attribution.per_position_projection`.
        argnums, in_axes, spmd_axis_name: as in `norms`.
        sides, dtype: as in `projections`.
        block_size: number of positions whose backward passes run at once.

    Returns:
        A function of (params, *batch); rows are [b, T] and [b, T, S].

    Raises:
        TypeError, ValueError: as in `jg.attribution.per_position_projection`.

    Example:
        >>> losses, W = lambda W, x: jnp.tanh(x @ W).sum(1), jnp.ones((30, 20))
        >>> sides = jg.attribution.random_sides(W, jax.random.key(0), 4)
        >>> each = position_projections(losses, sides, dtype=jnp.bfloat16)
        >>> each(W, jnp.ones((5, 7, 30))).rows["projections"].shape
        (5, 7, 16)
    """
    options: Any = {"in_axes": in_axes, "block_size": block_size, "spmd_axis_name": spmd_axis_name}
    per_position_projection(losses, sides, argnums, **options)

    def part(sides: PyTree, params: PyTree, *batch: Any) -> Part:
        values, numbers = per_position_projection(losses, sides, argnums, **options)(params, *batch)
        return Part({"values": values, "projections": numbers.astype(dtype or numbers.dtype)}, {})

    return jax.tree_util.Partial(part, sides)


def inner_products(
    loss: Callable[..., Any],
    fixed: PerExampleGrads,
    *,
    argnums: int | Sequence[int] = 0,
    in_axes: Any = 0,
    spmd_axis_name: Any = None,
) -> Callable[..., Part]:
    """Return a function for `run` that computes inner products of gradients with fixed gradients, as "products".

    Args:
        loss, argnums, in_axes, spmd_axis_name: as in `norms`.
        fixed: gradients of M examples with respect to the same parameters.

    Returns:
        A function of (params, *batch) that returns a `Part`. For a batch of b examples, its rows are [b, M].

    Example:
        >>> loss, w = lambda w, x: jnp.sin(w @ x), jnp.ones(3)
        >>> each = inner_products(loss, jg.per_example_grad(loss)(w, jnp.eye(3)))
        >>> each(w, jnp.ones((5, 3))).rows["products"].shape
        (5, 3)
    """
    gradients = per_example_grad(loss, argnums, in_axes=in_axes, spmd_axis_name=spmd_axis_name)

    def part(fixed: PerExampleGrads, params: PyTree, *batch: Any) -> Part:
        return Part({"products": gradients(params, *batch).gram(fixed)}, {})

    return jax.tree_util.Partial(part, fixed)
