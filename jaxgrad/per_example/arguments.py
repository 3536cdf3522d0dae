"""The arguments of a loss over a batch: parameters, what carries examples and along which axis, what all share."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad import _jax


@dataclass(frozen=True)
class Arguments:
    """A call, taken apart.

    Attributes:
        params: the leaves of the differentiated arguments.
        paths: their paths, as `jax.tree_util.keystr` writes them.
        params_tree: the structure of the differentiated argument, or of the tuple of several.
        batch: the leaves that carry examples.
        axes: their example axes.
        example: what one example of each looks like.
        batch_size: B.
        put_back: (params, examples) → (args, kwargs) of the loss of one example.
    """

    params: list[Any]
    paths: list[str]
    params_tree: Any
    batch: list[Any]
    axes: list[int]
    example: list[Any]
    batch_size: int
    put_back: Any


def arguments_of(call: str, args: tuple[Any, ...], kwargs: dict[str, Any], argnums: Any, in_axes: Any) -> Arguments:
    """Takes a call apart; errors name `call`."""
    numbers, several = _numbers(call, argnums, len(args))
    chosen = tuple(args[k] for k in numbers) if several else args[numbers[0]]
    with_paths, params_tree = jax.tree_util.tree_flatten_with_path(chosen)
    paths = [jax.tree_util.keystr(path) for path, _ in with_paths]
    params = [_parameter(call, path, leaf) for path, (_, leaf) in zip(paths, with_paths, strict=True)]
    if not params:
        raise ValueError(f"{call}: expected parameters in argument {argnums}, got a tree without leaves.")
    others = [k for k in range(len(args)) if k not in numbers]
    axes = (
        [*_axes(call, in_axes, [args[k] for k in others]), 0]
        if kwargs
        else _axes(call, in_axes, [args[k] for k in others])
    )
    rest = [args[k] for k in others] + ([kwargs] if kwargs else [])
    flat_axes = [_broadcast(call, axis, tree) for axis, tree in zip(axes, rest, strict=True)]
    flat = [jax.tree_util.tree_flatten_with_path(tree) for tree in rest]
    leaves = [(k, path, leaf) for k, (part, _) in enumerate(flat) for path, leaf in part]
    along = [axis for part in flat_axes for axis in part]
    batched = [i for i, axis in enumerate(along) if axis is not None]
    names = [_name(others, k, path, bool(kwargs)) for k, path, _ in leaves]
    batch = [_array(call, names[i], leaves[i][2], along[i]) for i in batched]
    taken = [int(along[i] or 0) % batch[j].ndim for j, i in enumerate(batched)]
    sizes = {names[i]: batch[j].shape[taken[j]] for j, i in enumerate(batched)}
    if not sizes:
        raise ValueError(f"{call}: expected at least one batched argument beside the parameters, got none.")
    if len(set(sizes.values())) != 1:
        shown = ", ".join(f"{n} in {name}" for name, n in sizes.items())
        raise ValueError(f"{call}: expected one batch size in all batched arguments, got {shown}.")
    example = [_jax.one_example(a, axis) for a, axis in zip(batch, taken, strict=True)]
    mesh_axes = frozenset(name for a in batch for name in _jax.varying(a))
    params = [_jax.made_varying(p, mesh_axes) for p in params]

    def put_back(new_params: Sequence[Any], examples: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        whole = [leaf for _, _, leaf in leaves]
        for i, x in zip(batched, examples, strict=True):
            whole[i] = x
        filled, start = [], 0
        for part, treedef in flat:
            filled.append(jax.tree.unflatten(treedef, whole[start : start + len(part)]))
            start += len(part)
        new_kwargs = filled.pop() if kwargs else {}
        tree = jax.tree.unflatten(params_tree, new_params)
        mine = dict(zip(numbers, tree if several else (tree,), strict=True)) | dict(zip(others, filled, strict=True))
        return tuple(mine[k] for k in range(len(args))), new_kwargs

    return Arguments(params, paths, params_tree, batch, taken, example, next(iter(sizes.values())), put_back)


def checked_batch(call: str, name: str, batch: Any) -> Any:
    """A tuple or a list of a loss's arguments, as it is; TypeError for anything else, which * would take apart."""
    if not isinstance(batch, tuple | list):
        shape = f" of shape {batch.shape}" if hasattr(batch, "shape") else ""
        raise TypeError(
            f"{call}: expected a tuple of the loss's arguments beside the parameters as {name}, got "
            f"{type(batch).__name__}{shape}. For a loss of one, that is a tuple of one: (x,)."
        )
    return batch


def checked_scalar(call: str, value: Any) -> Any:
    """The loss of one example, which is a real scalar."""
    shape: Any
    dtype: Any
    try:
        shape, dtype = np.shape(value) if isinstance(value, int | float) else value.shape, jnp.result_type(value)
    except (AttributeError, TypeError):
        shape, dtype = None, type(value).__name__
    if shape != () or not jnp.issubdtype(dtype, jnp.floating):
        got = dtype if shape is None else f"{dtype} of shape {shape}"
        raise TypeError(
            f"{call}: expected a loss that returns a real scalar for one example, got {got}. "
            f"A loss that is already a mean over a batch is to be given for one example; with auxiliary results set "
            f"has_aux=True."
        )
    return value


def _numbers(call: str, argnums: Any, count: int) -> tuple[list[int], bool]:
    several = not isinstance(argnums, int | np.integer)
    try:
        numbers = [operator.index(k) for k in (argnums if several else [argnums])]
    except (TypeError, ValueError):
        raise TypeError(f"{call}: expected a whole number or a sequence of them as argnums, got {argnums!r}.") from None
    if not numbers or any(not -count <= k < count for k in numbers):
        raise ValueError(f"{call}: expected argnums among the {count} positional arguments, got {argnums!r}.")
    numbers = [k % count for k in numbers]
    if len(set(numbers)) != len(numbers):
        raise ValueError(f"{call}: expected each argument once in argnums, got {argnums!r}.")
    return numbers, several


def _parameter(call: str, path: str, leaf: Any) -> Any:
    try:
        dtype = jnp.result_type(leaf)
    except TypeError:
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        what = type(leaf).__name__ if dtype is None else dtype
        raise TypeError(
            f"{call}: expected parameters of a real floating dtype, got {what} at {path or 'the parameter'}. "
            f"Leave what is not trained out of the differentiated argument, and pass it as another with in_axes None."
        )
    return leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf)


def _axes(call: str, in_axes: Any, others: list[Any]) -> list[Any]:
    if in_axes is None or isinstance(in_axes, int | np.integer):
        return [0 if in_axes is None else int(in_axes)] * len(others)
    if not isinstance(in_axes, tuple | list) or len(in_axes) != len(others):
        raise ValueError(
            f"{call}: expected in_axes to be a number or a sequence with an entry for each of the {len(others)} "
            f"arguments that are not differentiated, got {in_axes!r}."
        )
    return list(in_axes)


def _broadcast(call: str, axis: Any, tree: Any) -> list[int | None]:
    """The example axis of every leaf, from a tree prefix."""
    none = lambda node: node is None  # noqa: E731
    try:
        structure: Any
        prefixes, structure = jax.tree.flatten(axis, is_leaf=none)
        parts = structure.flatten_up_to(tree)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{call}: expected in_axes to be a tree prefix of the arguments, got {axis!r}.") from error
    axes = [prefix for prefix, part in zip(prefixes, parts, strict=True) for _ in jax.tree.leaves(part)]
    if any(a is not None and not isinstance(a, int | np.integer) for a in axes):
        raise ValueError(f"{call}: expected numbers or None in in_axes, got {axis!r}.")
    return axes


def _name(others: list[int], k: int, path: Any, kwargs: bool) -> str:
    where = jax.tree_util.keystr(path)
    return f"argument {others[k]}{where}" if k < len(others) else f"keyword arguments{where}"


def _array(call: str, name: str, leaf: Any, axis: Any) -> Any:
    if not hasattr(leaf, "dtype") or not hasattr(leaf, "ndim"):
        try:
            leaf = jnp.asarray(leaf)
        except TypeError:
            raise TypeError(
                f"{call}: expected an array with an example axis in {name}, got {type(leaf).__name__}. "
                f"Something all examples share has None in in_axes."
            ) from None
    if not -leaf.ndim <= axis < leaf.ndim:
        raise ValueError(f"{call}: expected an example axis {axis} in {name}, got shape {leaf.shape}.")
    return leaf
