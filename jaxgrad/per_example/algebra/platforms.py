"""The implementation that is the better one on a processor, and those for accelerators."""

import functools
from typing import Any

import jax
from jax import lax


@functools.lru_cache
def by_platform(processor: Any, accelerator: Any, *options: Any, tpu: Any = None) -> Any:
    """A function of the arrays that chooses the implementation where it is compiled; of the others nothing is left.

    A TPU is an accelerator like the others if it has no implementation of its own. Within another program the function
    is part of it: as a function that is called, it would keep the compiler from sharing memory.
    """
    ways = {"cpu": processor, "tpu": tpu or accelerator, "default": accelerator}
    fixed = {name: lambda *arrays, way=way: way(*arrays, *options) for name, way in ways.items()}
    return jax.jit(lambda *arrays: lax.platform_dependent(*arrays, **fixed), inline=True)
