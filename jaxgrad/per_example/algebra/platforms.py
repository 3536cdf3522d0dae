"""The implementation that is the better one on a processor, and the one for accelerators."""

import functools
from typing import Any

import jax
from jax import lax


@functools.lru_cache
def by_platform(processor: Any, accelerator: Any, *options: Any) -> Any:
    """A function of the arrays that chooses the implementation where it is compiled; of the other nothing is left."""
    ways = {"cpu": processor, "default": accelerator}
    return jax.jit(
        lambda *arrays: lax.platform_dependent(
            *arrays, **{name: lambda *a, way=way: way(*a, *options) for name, way in ways.items()}
        )
    )
