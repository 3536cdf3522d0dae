"""Where a result lies on a mesh.

Where axes are explicit JAX asks how a sum over a sharded axis (here the examples) is to lie; otherwise the compiler
decides, and `replicated` and `gathered` return what leaves it to it. It is told only that a Gram matrix needs every
example everywhere, and that a block of examples has some of each device's.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array

P = ParamSpec("P")
T = TypeVar("T")


def replicated(like: Array) -> NamedSharding | None:
    """On every device of the mesh that `like` lies on, for an `out_sharding=` argument."""
    mesh = jax.typeof(like).sharding.mesh
    explicit = not mesh.empty and AxisType.Explicit in mesh.axis_types
    return NamedSharding(mesh, PartitionSpec()) if explicit else None


def kept(mask: Array, a: Array) -> Array:
    """The examples (axis 0) whose mask is True, exactly zero elsewhere; spread over the devices as either is."""
    mask = jnp.broadcast_to(mask.reshape(-1, *[1] * (a.ndim - 1)), a.shape)
    on = replicated(a) or replicated(mask)
    if on is not None:  # a select takes operands that lie alike
        (examples, *others), (masked, *_) = _spec(a), _spec(mask)
        lies = NamedSharding(on.mesh, PartitionSpec(examples or masked, *others))
        mask, a = jax.sharding.reshard(mask, lies), jax.sharding.reshard(a, lies)
    return jnp.where(mask, a, jnp.zeros_like(a))


def divisible(a: Array, n: int) -> Array:
    """An array whose axis 0 can be cut into n parts: gathered where an explicit mesh has cut it into others."""
    if replicated(a) is None or a.shape[0] == 0:
        return a
    parts = a.shape[0] // jax.typeof(a).sharding.shard_shape(a.shape)[0]
    return a if n % parts == 0 else gathered(a)


def automatic(by_example: bool) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A function of gradients that the compiler lays out as it sees fit, though the mesh's axes are explicit.

    Args:
        by_example: whether results have the examples in front, and lie as those do; otherwise they are on every device.
    """

    def decorated(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def laid_out(*args: P.args, **kwargs: P.kwargs) -> T:
            treedef: Any
            leaves, treedef = jax.tree.flatten((args, kwargs))
            given = {k: a for k, a in enumerate(leaves) if isinstance(a, jax.Array)}
            spread = [a for a in given.values() if replicated(a) is not None]
            if not spread:
                return function(*args, **kwargs)

            def of_arrays(arrays: dict[int, Array]) -> T:
                args, kwargs = treedef.unflatten([arrays.get(k, leaf) for k, leaf in enumerate(leaves)])
                return function(*args, **kwargs)

            examples = next((_spec(a)[0] for a in spread if a.ndim and _spec(a)[0] is not None), None)
            lies = PartitionSpec(examples) if by_example else PartitionSpec()
            on = NamedSharding(jax.typeof(spread[0]).sharding.mesh, lies)
            return jax.sharding.auto_axes(of_arrays, out_sharding=on)(given)

        return laid_out

    return decorated


def merged(a: Array, *runs: int) -> Array:
    """Each run of so many axes as one. A device keeps its part of a run's first axis; the others are gathered there."""
    starts = [sum(runs[:k]) for k in range(len(runs))]
    shape = [math.prod(a.shape[start : start + n]) for start, n in zip(starts, runs, strict=True)]
    spec = spread_over(a)
    if not any(spec):
        return a.reshape(shape)
    mesh = jax.typeof(a).sharding.mesh
    a = jax.sharding.reshard(
        a, NamedSharding(mesh, PartitionSpec(*(s if k in starts else None for k, s in enumerate(spec))))
    )
    lies = PartitionSpec(*(spec[start] if n else None for start, n in zip(starts, runs, strict=True)))
    return jnp.reshape(a, shape, out_sharding=NamedSharding(mesh, lies))


def spread_over(a: Array) -> list[Any]:
    """The axes of an explicit mesh that each axis is spread over, None where it is not."""
    return [None] * a.ndim if replicated(a) is None else _spec(a)


def _spec(a: Array) -> list[Any]:
    """The mesh axes that each axis is spread over, None where it is not."""
    return [*jax.typeof(a).sharding.spec, *[None] * a.ndim][: a.ndim]


def gathered(tree: T) -> T:
    """The tree's arrays, each on every device; under other meshes as it is."""

    def one(a: Array) -> Array:
        target = replicated(a)
        return a if target is None else jax.sharding.reshard(a, target)

    return jax.tree.map(one, tree)


def every_example(tree: T) -> T:
    """The tree's arrays with all examples (axis 0) on every device, before anything larger is made of them."""

    def one(a: Array) -> Array:
        mesh = jax.typeof(a).sharding.mesh
        if mesh.empty or any(kind != AxisType.Auto for kind in mesh.axis_types):
            return a
        others = [PartitionSpec.UNCONSTRAINED] * (a.ndim - 1)
        return jax.lax.with_sharding_constraint(a, NamedSharding(mesh, PartitionSpec(None, *others)))

    return jax.tree.map(one, gathered(tree))


def devices(tree: object) -> int:
    """How many devices the compiler may have spread the examples over; 1 where it does not decide."""
    meshes = [jax.typeof(a).sharding.mesh for a in jax.tree.leaves(tree)]
    return max(
        math.prod(n for n, kind in zip(mesh.axis_sizes, mesh.axis_types, strict=True) if kind == AxisType.Auto)
        for mesh in meshes
    )
