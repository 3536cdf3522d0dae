"""The arguments of a loss over a batch: parameters, batched arguments with their example axes, shared arguments."""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad import _jax
from jaxgrad.errors import caller
from jaxgrad.per_example.algebra import complexes
from jaxgrad.per_example.frameworks import advice


@dataclass(frozen=True)
class Arguments:
    """A call, split into parameters, batched arguments and shared arguments.

    Attributes:
        params: the leaves of the differentiated arguments.
        paths: their paths, as `jax.tree_util.keystr` writes them.
        params_tree: the structure of the differentiated argument, or of the tuple of them if there are several, with a
            pair in place of every complex parameter.
        batch: the leaves that have an example axis.
        axes: the example axis of each, counted from 0.
        example: one example of each, to trace with (`_jax.example_for_tracing`).
        batch_size: B.
        shared: the leaves shared by all examples, arrays or not.
        rebuild: (params, examples, shared) → (args, kwargs) of the loss of one example.
    """

    params: list[Any]
    paths: list[str]
    params_tree: Any
    batch: list[Any]
    axes: list[int]
    example: list[Any]
    batch_size: int
    shared: list[Any]
    rebuild: Callable[[Sequence[Any], Sequence[Any], Sequence[Any]], tuple[tuple[Any, ...], dict[str, Any]]]

    @property
    def examples_first(self) -> list[Any]:
        """The batched leaves with their example axis in front."""
        return [jnp.moveaxis(a, axis, 0) for a, axis in zip(self.batch, self.axes, strict=True)]

    def loss_arguments(self, params: Sequence[Any], example: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) of the loss of one example, from the leaves of the parameters and of that example."""
        return self.rebuild(params, example, self.shared)


def arguments_of(args: tuple[Any, ...], kwargs: dict[str, Any], argnums: Any, in_axes: Any) -> Arguments:
    """Split a call. The role of a leaf depends on its position in the call: one array may be passed in two roles.

    Args:
        args, kwargs: the call's arguments.
        argnums, in_axes: as in `per_example_grad`.

    Raises:
        TypeError, ValueError: as in `per_example_grad`.
    """
    numbers, is_sequence = _numbers(argnums, len(args))
    args = tuple(complexes.parts(arg) if k in numbers else arg for k, arg in enumerate(args))
    entries = _entries(in_axes, numbers, len(args))
    chosen = tuple(args[k] for k in numbers) if is_sequence else args[numbers[0]]
    with_paths, params_tree = jax.tree_util.tree_flatten_with_path(chosen)
    paths = [jax.tree_util.keystr(path) for path, _ in with_paths]
    params = [_parameter(path, leaf, chosen) for path, (_, leaf) in zip(paths, with_paths, strict=True)]
    if not params:
        raise ValueError(f"{caller()}: expected parameters in argument {argnums}, got a tree without leaves.")
    start = {k: sum(len(jax.tree.leaves(args[j])) for j in numbers[:i]) for i, k in enumerate(numbers)}
    places, batch, shared = _split((*args, kwargs), entries, start)
    arrays, axes = [a for _, a, _ in batch], [axis for _, _, axis in batch]
    batch_size = _batch_size({name: a.shape[axis] for name, a, axis in batch}, _other_parameters(args, numbers))
    example = [_jax.example_for_tracing(a, axis) for _, a, axis in batch]
    mesh_axes = frozenset(name for a in arrays for name in _jax.varying(a))
    params = [_jax.made_varying(p, mesh_axes) for p in params]
    structures = [jax.tree.structure(tree) for tree in (*args, kwargs)]

    def rebuild(params: Sequence[Any], examples: Sequence[Any], shared: Sequence[Any]) -> Any:
        source = {"params": params, "batch": examples, "shared": shared}
        *filled, keywords = (
            jax.tree.unflatten(structure, [source[kind][i] for kind, i in place])
            for structure, place in zip(structures, places, strict=True)
        )
        joined = (complexes.joined(arg, complexes.number) if k in numbers else arg for k, arg in enumerate(filled))
        return tuple(joined), keywords

    return Arguments(params, paths, params_tree, arrays, axes, example, batch_size, shared, rebuild)


def _split(trees: Sequence[Any], entries: Sequence[Any], start: dict[int, int]) -> tuple[Any, Any, Any]:
    """Assign a role to each leaf: (place of each leaf, (name, array, axis) of each batched leaf, the shared leaves).

    A place is a role, "params", "batch" or "shared", and an index into the leaves of that role.

    Args:
        trees: the positional arguments, then the keyword arguments.
        entries: the entry of in_axes for each positional argument.
        start: for each differentiated argument, the index of its first parameter.
    """
    places: list[list[tuple[str, int]]] = []
    batch: list[tuple[str, Any, int]] = []
    shared: list[Any] = []
    for k, tree in enumerate(trees):
        leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
        places.append([("params", start[k] + i) for i in range(len(leaves))] if k in start else [])
        if k in start:
            continue
        sparse = [path for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_sparse) if _sparse(node)]
        positional = k < len(entries)
        axes = _broadcast(entries[k], tree) if positional else [_keyword_axis(leaf) for _, leaf in leaves]
        for axis, (path, leaf) in zip(axes, leaves, strict=True):
            if axis is None:
                places[k].append(("shared", len(shared)))
                shared.append(leaf)
            else:
                name = f"{f'argument {k}' if positional else 'keyword arguments'}{jax.tree_util.keystr(path)}"
                if any(path[: len(parent)] == parent for parent in sparse):
                    raise TypeError(
                        f"{caller()}: expected dense arrays of examples, got a sparse one with an example axis in "
                        f"{name}. Pass its parts (data and indices of every example) as arguments and assemble them "
                        f"inside the loss, or pass x.todense()."
                    )
                array = _array(name, leaf, axis)
                places[k].append(("batch", len(batch)))
                batch.append((name, array, axis % array.ndim))
    return places, batch, shared


def checked_batch(name: str, batch: Any) -> Any:
    """Return `batch`; raise TypeError unless it is a tuple or list, because * would unpack an array into its rows."""
    if not isinstance(batch, tuple | list):
        shape = f" of shape {batch.shape}" if hasattr(batch, "shape") else ""
        raise TypeError(
            f"{caller()}: expected a tuple of the loss's arguments other than the parameters as {name}, got "
            f"{type(batch).__name__}{shape}. If the loss has one such argument, pass a tuple of one: (x,)."
        )
    return batch


def checked_scalar(value: Any) -> Any:
    """Return the loss of one example; raise TypeError if it is not a real scalar."""
    shape: Any
    dtype: Any
    try:
        shape, dtype = np.shape(value) if isinstance(value, int | float) else value.shape, jnp.result_type(value)
    except (AttributeError, TypeError):
        shape, dtype = None, type(value).__name__
    if shape != () or not jnp.issubdtype(dtype, jnp.floating):
        got = dtype if shape is None else f"{dtype} of shape {shape}"
        raise TypeError(
            f"{caller()}: expected a loss that returns a real scalar for one example, got {got}. "
            f"Pass the loss of a single example, not a batch mean; if the loss also returns auxiliary results, set "
            f"has_aux=True."
        )
    return value


def _numbers(argnums: Any, count: int) -> tuple[list[int], bool]:
    """(the differentiated arguments, counted from 0; whether argnums is a sequence)."""
    is_sequence = not isinstance(argnums, int | np.integer)
    try:
        numbers = [operator.index(k) for k in (argnums if is_sequence else [argnums])]
    except (TypeError, ValueError):
        raise TypeError(
            f"{caller()}: expected a whole number or a sequence of them as argnums, got {argnums!r}."
        ) from None
    if not numbers or any(not -count <= k < count for k in numbers):
        raise ValueError(f"{caller()}: expected argnums among the {count} positional arguments, got {argnums!r}.")
    numbers = [k % count for k in numbers]
    if len(set(numbers)) != len(numbers):
        raise ValueError(f"{caller()}: expected each argument once in argnums, got {argnums!r}.")
    return numbers, is_sequence


def _parameter(path: str, leaf: Any, tree: Any) -> Any:
    """Return a parameter as an array; raise TypeError unless its dtype is floating."""
    try:
        dtype = jnp.result_type(leaf)
    except TypeError:
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        what = type(leaf).__name__ if dtype is None else dtype
        raise TypeError(
            f"{caller()}: expected parameters of a floating dtype, got {what} at {path or 'the parameter'}. "
            + (
                advice(tree)
                or "Move leaves that are not trained out of the differentiated argument and into another, "
                "with None in in_axes."
            )
        )
    return leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf)


def _entries(in_axes: Any, numbers: Sequence[int], count: int) -> list[Any]:
    """The entry of in_axes for each positional argument, None for the differentiated ones."""
    if not isinstance(in_axes, tuple | list):
        _broadcast(in_axes, 0)
        return [None if k in numbers else in_axes for k in range(count)]
    other_count = count - len(numbers)
    if len(in_axes) == count:
        other_axes = [axis for k, axis in enumerate(in_axes) if k not in numbers]
    else:
        other_axes = list(in_axes) if len(in_axes) == other_count else [0] * other_count
    suggestion = tuple(None if k in numbers else other_axes.pop(0) for k in range(count))
    if len(in_axes) != count:
        raise ValueError(
            f"{caller()}: expected in_axes as jax.vmap takes it, a number or a sequence with an entry for each of the "
            f"{count} positional arguments, got {in_axes!r}. Write in_axes={suggestion!r}, with None for the "
            f"differentiated arguments and for arguments shared by all examples."
        )
    for k in numbers:
        if jax.tree.leaves(in_axes[k]):
            raise ValueError(
                f"{caller()}: expected None in in_axes at the differentiated argument {k}, which is shared by all "
                f"examples, got {in_axes[k]!r}. {_advice(in_axes, numbers, suggestion)}"
            )
    return list(in_axes)


def _advice(in_axes: Sequence[Any], numbers: Sequence[int], suggestion: tuple[Any, ...]) -> str:
    """How to correct in_axes, or argnums if in_axes is right for another argument."""
    shared = [k for k, axis in enumerate(in_axes) if axis is None and k not in numbers]
    if len(numbers) == 1 and len(shared) == 1:
        return f"If the parameters are argument {shared[0]}, pass argnums={shared[0]}; else in_axes={suggestion!r}."
    return f"Write in_axes={suggestion!r}."


def _broadcast(axis: Any, tree: Any) -> list[int | None]:
    """The example axis of every leaf, from a tree prefix."""
    none = lambda node: node is None  # noqa: E731
    try:
        structure: Any
        prefixes, structure = jax.tree.flatten(axis, is_leaf=none)
        parts = structure.flatten_up_to(tree)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{caller()}: expected in_axes to be a tree prefix of the arguments, got {axis!r}.") from error
    axes = [prefix for prefix, part in zip(prefixes, parts, strict=True) for _ in jax.tree.leaves(part)]
    try:
        if any(isinstance(prefix, bool) for prefix in prefixes):
            raise TypeError
        return [None if a is None else operator.index(a) for a in axes]
    except TypeError:
        raise TypeError(f"{caller()}: expected whole numbers or None in in_axes, got {axis!r}.") from None


def _sparse(node: Any) -> bool:
    return type(node).__module__.startswith("jax.experimental.sparse")


def _keyword_axis(leaf: Any) -> int | None:
    return 0 if getattr(leaf, "ndim", 0) >= 1 and hasattr(leaf, "dtype") else None


def _other_parameters(args: Sequence[Any], numbers: Sequence[int]) -> str:
    """Advice if another argument looks like the parameters: it is a tree, and the differentiated one is an array."""
    trees = [k for k, arg in enumerate(args) if k not in numbers and len(jax.tree.leaves(arg)) > 1]
    if len(trees) != 1 or len(numbers) != 1 or len(jax.tree.leaves(args[numbers[0]])) != 1:
        return ""
    return f" If the parameters are argument {trees[0]}, pass argnums={trees[0]}."


def _batch_size(sizes: dict[str, int], advice: str) -> int:
    if not sizes:
        raise ValueError(
            f"{caller()}: expected at least one batched argument besides the parameters, got none. Pass the examples "
            f"in another argument, with their axis in in_axes; the default axis is 0."
        )
    if len(set(sizes.values())) != 1:
        got = ", ".join(f"{n} in {name}" for name, n in sizes.items())
        raise ValueError(
            f"{caller()}: expected one batch size in all batched arguments, got {got}. Pass arrays shared by all "
            f"examples by position, with None in in_axes; arrays in keyword arguments are batched.{advice}"
        )
    return next(iter(sizes.values()))


def _array(name: str, leaf: Any, axis: Any) -> Any:
    """Return a batched leaf as an array; raise an error unless it has the example axis."""
    hint = "For arguments shared by all examples, put None in in_axes; for one example, pass x[None]."
    try:
        if isinstance(leaf, np.ndarray):
            jnp.result_type(leaf)
        elif not hasattr(leaf, "ndim"):
            leaf = jnp.asarray(leaf)
    except TypeError:
        got = leaf.dtype if isinstance(leaf, np.ndarray) else type(leaf).__name__
        raise TypeError(f"{caller()}: expected an array with an example axis in {name}, got {got}. {hint}") from None
    if not -leaf.ndim <= axis < leaf.ndim:
        raise ValueError(f"{caller()}: expected an example axis {axis} in {name}, got shape {leaf.shape}. {hint}")
    return leaf
