"""How results are sharded on a mesh.

On explicit meshes, JAX requires a sharding for the result of every sum over a sharded axis, here over the examples. On
automatic meshes the compiler chooses, so `replicated` returns None and `gathered` returns its argument. There the
compiler gets only three constraints: a Gram matrix needs every example on every device, a block of examples takes some
examples from each device, and a clipped sum is sharded as the parameters are.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxgrad import _jax

P = ParamSpec("P")
T = TypeVar("T")


def is_explicit(a: Array) -> bool:
    """Whether the array's mesh has explicit axes, so that the program states how arrays are sharded."""
    mesh = jax.typeof(a).sharding.mesh
    return not mesh.empty and AxisType.Explicit in mesh.axis_types


def replicated(a: Array) -> NamedSharding | None:
    """Return the `out_sharding=` that replicates a result on the array's mesh; None if no axis of it is explicit."""
    return NamedSharding(jax.typeof(a).sharding.mesh, PartitionSpec()) if is_explicit(a) else None


def kept(mask: Array, a: Array) -> Array:
    """Set the examples (axis 0) whose mask is False to exactly zero.

    On an explicit mesh the result is sharded as `a` is; if the examples of `a` are not sharded, as those of the mask.
    """
    mask = jnp.broadcast_to(mask.reshape(-1, *[1] * (a.ndim - 1)), a.shape)
    explicit = replicated(a) or replicated(mask)
    if explicit is not None:  # a select needs operands with equal shardings
        (examples, *other_axes), (mask_examples, *_) = _spec(a), _spec(mask)
        sharding = NamedSharding(explicit.mesh, PartitionSpec(examples or mask_examples, *other_axes))
        mask, a = jax.sharding.reshard(mask, sharding), jax.sharding.reshard(a, sharding)
    return jnp.where(mask, a, jnp.zeros_like(a))


def divisible(a: Array, n: int) -> Array:
    """Make axis 0 divisible into n parts.

    On an explicit mesh, the array is gathered if its number of shards does not divide n.
    """
    if replicated(a) is None or a.shape[0] == 0:
        return a
    shards = a.shape[0] // jax.typeof(a).sharding.shard_shape(a.shape)[0]
    return a if n % shards == 0 else gathered(a)


def with_automatic_axes(
    by_example: bool = False, specs: Callable[..., Any] | None = None
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorate a function of gradients: inside it the compiler chooses the shardings, on explicit meshes too.

    Args:
        by_example: True shards the results as the examples are, along their leading axis; False replicates them.
        specs: a function of the arguments → the `PartitionSpec`s of the results, in place of these two.
    """

    def decorated(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def laid_out(*args: P.args, **kwargs: P.kwargs) -> T:
            explicit = [a for a in jax.tree.leaves((args, kwargs)) if isinstance(a, jax.Array) and replicated(a)]
            if not explicit:
                return function(*args, **kwargs)
            mesh = jax.typeof(explicit[0]).sharding.mesh
            examples = next((_spec(a)[0] for a in explicit if a.ndim and _spec(a)[0] is not None), None)
            spec = PartitionSpec(examples) if by_example else PartitionSpec()
            tree = spec if specs is None else specs(*args, **kwargs)
            shardings = jax.tree.map(lambda spec: NamedSharding(mesh, _explicit_part(spec, mesh)), tree)
            return automatic_over(None, function, shardings, *args, **kwargs)

        return laid_out

    return decorated


def _explicit_part(spec: PartitionSpec, mesh: Any) -> PartitionSpec:
    """The spec without the axes that the mesh does not have, or that the compiler shards over."""
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    is_explicit = [all(kinds.get(name) == AxisType.Explicit for name in _names(entry)) for entry in spec]
    return PartitionSpec(*(entry if explicit else None for entry, explicit in zip(spec, is_explicit, strict=True)))


def sharded_as(expected: Any, a: Array) -> Array:
    """Shard an array on an explicit mesh as a type, of the same shape, says."""
    sharding = expected.sharding
    explicit = isinstance(sharding, NamedSharding) and AxisType.Explicit in sharding.mesh.axis_types
    return jax.sharding.reshard(a, sharding) if explicit else a


def automatic_over(
    axes: tuple[str, ...] | None, function: Callable[..., T], out_sharding: Any, *args: Any, **kwargs: Any
) -> T:
    """Call a function in which the compiler chooses the shardings over these axes of an explicit mesh.

    Args:
        axes: the names of the axes; None for all.
        function: a function of the other arguments.
        out_sharding: the shardings of its results, or a tree prefix of them.
        args, kwargs: its arguments; leaves that are not arrays stay as they are.
    """
    treedef: Any
    leaves, treedef = jax.tree.flatten((args, kwargs))
    arrays = {k: a for k, a in enumerate(leaves) if isinstance(a, jax.Array)}

    def call(arrays: dict[int, Array]) -> T:
        args, kwargs = treedef.unflatten([arrays.get(k, leaf) for k, leaf in enumerate(leaves)])
        return function(*args, **kwargs)

    return jax.sharding.auto_axes(call, axes=axes, out_sharding=out_sharding)(arrays)


def in_both(
    batch: Sequence[Any], axes: Sequence[int], whole: Sequence[Any]
) -> tuple[tuple[str, ...], NamedSharding | None]:
    """The axes of an explicit mesh over which examples and other arrays are both sharded, as with FSDP.

    JAX maps no function over such examples (`jax.vmap` raises an error), unless the compiler chooses their shardings.
    An axis that shards a dimension together with one of these is counted among them.

    Args:
        batch, axes: arrays, and the example axis of each.
        whole: the parameters, and what else all examples share.

    Returns:
        The names of these axes, and the sharding of results that have the example axis in front.
    """
    over = [(a, on) for a, k in zip(batch, axes, strict=True) if (on := _entries(a)[k : k + 1]) not in ([], [None])]
    if not over:
        return (), None
    names = {name for _, on in over for name in _names(on[0])}
    others = [_names(on) for a in whole for on in _entries(a)]
    both = {name for on in others if names & set(on) for name in on}
    a, on = over[0]
    return tuple(sorted(both)), NamedSharding(jax.typeof(a).sharding.mesh, PartitionSpec(*on))


def _entries(a: Any) -> list[Any]:
    return spread_over(a) if isinstance(a, jax.Array) else []


def _names(entry: Any) -> tuple[str, ...]:
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def laid_out_as(total: Array, parameter: Any) -> Array:
    """Shard a sum of gradients as the parameter is sharded, so that no device needs to hold all of it."""
    mesh = jax.typeof(parameter).sharding.mesh
    if isinstance(parameter, np.ndarray) or mesh.empty or AxisType.Manual in mesh.axis_types:
        return total
    total = sharded_as(jax.typeof(parameter), total)
    if AxisType.Auto in mesh.axis_types:  # the compiler may still reshard the parameter, but not this copy of it
        total = _jax.sharded_alike(total, parameter)
    return total


def merged(a: Array, *runs: int) -> Array:
    """Merge consecutive runs of axes, of these lengths, into one axis each.

    The first axis of a run stays sharded; the others are gathered.
    """
    starts = [sum(runs[:k]) for k in range(len(runs))]
    shape = [math.prod(a.shape[start : start + n]) for start, n in zip(starts, runs, strict=True)]
    spec = spread_over(a)
    if not any(spec):
        return a.reshape(shape)
    mesh = jax.typeof(a).sharding.mesh
    a = jax.sharding.reshard(
        a, NamedSharding(mesh, PartitionSpec(*(s if k in starts else None for k, s in enumerate(spec))))
    )
    merged_spec = PartitionSpec(*(spec[start] if n else None for start, n in zip(starts, runs, strict=True)))
    return jnp.reshape(a, shape, out_sharding=NamedSharding(mesh, merged_spec))


def spread_over(a: Any) -> list[Any]:
    """Return, for each axis of the array, the axes of an explicit mesh that it is sharded over; None if it is not."""
    return _spec(a) if isinstance(a, jax.Array) and replicated(a) is not None else [None] * a.ndim


def _spec(a: Array) -> list[Any]:
    """Do as `spread_over`, for an array that is known to have a sharding."""
    return [*jax.typeof(a).sharding.spec, *[None] * a.ndim][: a.ndim]


def gathered(tree: T) -> T:
    """Replicate the tree's arrays on an explicit mesh; on other meshes return them unchanged."""

    def gather(a: Array) -> Array:
        target = replicated(a)
        return a if target is None else jax.sharding.reshard(a, target)

    return jax.tree.map(gather, tree)


def every_example(tree: T) -> T:
    """Put all examples (axis 0) of the tree's arrays on every device, before anything larger is computed from them."""

    def constrain(a: Array) -> Array:
        mesh = jax.typeof(a).sharding.mesh
        if mesh.empty or any(kind != AxisType.Auto for kind in mesh.axis_types):
            return a
        other_axes = [PartitionSpec.UNCONSTRAINED] * (a.ndim - 1)
        return jax.lax.with_sharding_constraint(a, NamedSharding(mesh, PartitionSpec(None, *other_axes)))

    return jax.tree.map(constrain, gathered(tree))


def devices(tree: object) -> int:
    """Return how many devices the compiler may have sharded the examples over; 1 if no mesh axis is automatic."""
    meshes = [jax.typeof(a).sharding.mesh for a in jax.tree.leaves(tree)]
    return max(
        math.prod(n for n, kind in zip(mesh.axis_sizes, mesh.axis_types, strict=True) if kind == AxisType.Auto)
        for mesh in meshes
    )
