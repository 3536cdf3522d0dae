"""Where a result lies on a mesh whose axes are explicit.

Under an explicit mesh JAX asks how a sum over a sharded axis (here the examples) is to lie; otherwise the compiler
decides, and these functions return what leaves it to it.
"""

from typing import TypeVar

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array

T = TypeVar("T")


def replicated(like: Array) -> NamedSharding | None:
    """On every device of the mesh that `like` lies on, for an `out_sharding=` argument."""
    mesh = jax.typeof(like).sharding.mesh
    explicit = not mesh.empty and AxisType.Explicit in mesh.axis_types
    return NamedSharding(mesh, PartitionSpec()) if explicit else None


def gathered(tree: T) -> T:
    """The tree's arrays, each on every device; under other meshes as it is."""

    def one(a: Array) -> Array:
        target = replicated(a)
        return a if target is None else jax.sharding.reshard(a, target)

    return jax.tree.map(one, tree)
