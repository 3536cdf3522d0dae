"""How results are sharded on a mesh.

On explicit meshes JAX asks how the result of a sum over a sharded axis (here the examples) is sharded. On automatic
meshes the compiler chooses, so `replicated` returns None and `gathered` its argument. It gets only two constraints: a
Gram matrix needs every example on every device, and a block of examples has some examples of each device.
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
    """Return the `out_sharding=` that replicates a result on the mesh of `like`; None if no axis is explicit."""
    mesh = jax.typeof(like).sharding.mesh
    explicit = not mesh.empty and AxisType.Explicit in mesh.axis_types
    return NamedSharding(mesh, PartitionSpec()) if explicit else None


def kept(mask: Array, a: Array) -> Array:
    """Set the examples (axis 0) whose mask is False to exactly zero; the result is sharded as `a` or the mask is."""
    mask = jnp.broadcast_to(mask.reshape(-1, *[1] * (a.ndim - 1)), a.shape)
    on = replicated(a) or replicated(mask)
    if on is not None:  # a select needs operands with equal shardings
        (examples, *others), (masked, *_) = _spec(a), _spec(mask)
        lies = NamedSharding(on.mesh, PartitionSpec(examples or masked, *others))
        mask, a = jax.sharding.reshard(mask, lies), jax.sharding.reshard(a, lies)
    return jnp.where(mask, a, jnp.zeros_like(a))


def divisible(a: Array, n: int) -> Array:
    """Make axis 0 divisible into n parts: gather the array if its shards on an explicit mesh do not divide n."""
    if replicated(a) is None or a.shape[0] == 0:
        return a
    parts = a.shape[0] // jax.typeof(a).sharding.shard_shape(a.shape)[0]
    return a if n % parts == 0 else gathered(a)


def automatic(by_example: bool) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Let the compiler choose the shardings inside a function of gradients even if the mesh's axes are explicit.

    Args:
        by_example: True if results have a leading example axis and are sharded as the examples are; otherwise they are
            replicated.
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
    """Merge each run of axes, given by length, into one. A run's first axis stays sharded; the rest are gathered."""
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
    """Return the axes of an explicit mesh that each axis is sharded over, None where it is not sharded."""
    return [None] * a.ndim if replicated(a) is None else _spec(a)


def _spec(a: Array) -> list[Any]:
    """Return the mesh axes that each axis is sharded over, None where it is not sharded."""
    return [*jax.typeof(a).sharding.spec, *[None] * a.ndim][: a.ndim]


def gathered(tree: T) -> T:
    """Replicate the tree's arrays on an explicit mesh; on other meshes return them unchanged."""

    def one(a: Array) -> Array:
        target = replicated(a)
        return a if target is None else jax.sharding.reshard(a, target)

    return jax.tree.map(one, tree)


def every_example(tree: T) -> T:
    """Put all examples (axis 0) of the tree's arrays on every device, before anything larger is computed from them."""

    def one(a: Array) -> Array:
        mesh = jax.typeof(a).sharding.mesh
        if mesh.empty or any(kind != AxisType.Auto for kind in mesh.axis_types):
            return a
        others = [PartitionSpec.UNCONSTRAINED] * (a.ndim - 1)
        return jax.lax.with_sharding_constraint(a, NamedSharding(mesh, PartitionSpec(None, *others)))

    return jax.tree.map(one, gathered(tree))


def devices(tree: object) -> int:
    """Return how many devices the compiler may have sharded the examples over; 1 if it does not choose."""
    meshes = [jax.typeof(a).sharding.mesh for a in jax.tree.leaves(tree)]
    return max(
        math.prod(n for n, kind in zip(mesh.axis_sizes, mesh.axis_types, strict=True) if kind == AxisType.Auto)
        for mesh in meshes
    )
