"""What accelerators do and CPUs do not, for tests on a CPU."""

import contextlib

import jax.numpy as jnp
import pytest
from jax import lax

from jaxgrad.per_example.algebra.platforms import by_platform


@contextlib.contextmanager
def compiled_for(platform):
    """Use the implementation for a platform ("cuda", "tpu") where there is a choice."""

    def chosen(*arrays, default=None, **ways):
        return ways.get(platform, default)(*arrays)

    by_platform.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lax, "platform_dependent", chosen)
        yield
    by_platform.cache_clear()


@contextlib.contextmanager
def operands_rounded_to(dtype):
    """Round the float32 operands of `jnp.einsum`, which computes the products of norms and sums, to fewer bits."""
    bits = jnp.finfo(dtype)
    einsum = jnp.einsum

    def rounded(a):
        return lax.reduce_precision(a, 8, bits.nmant) if a.dtype == jnp.float32 else a

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jnp, "einsum", lambda spec, *arrays, **options: einsum(spec, *map(rounded, arrays), **options))
        yield
