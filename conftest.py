"""float64 on, and JAX as strict as it gets: no implicit promotion of dtypes or ranks."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # of JAX's Cholesky on CPU; beside other tests its threads stall

import jax
import pytest
from hypothesis import HealthCheck, settings

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The same seeded examples in every run; JAXGRAD_FUZZ=30 in the environment runs thirty times as many.
FUZZ = int(os.environ.get("JAXGRAD_FUZZ", "1"))
settings.register_profile(
    "default", deadline=None, derandomize=True, max_examples=12 * FUZZ, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def _as_a_reader_runs_it(request: pytest.FixtureRequest, doctest_namespace: dict):
    """Examples in docstrings and in README.md have the usual names, and JAX's own rules of promotion."""
    import jax.numpy as jnp
    import numpy as np

    import jaxgrad as jg

    doctest_namespace.update(jax=jax, jnp=jnp, np=np, jg=jg)
    if not isinstance(request.node, pytest.DoctestItem):
        yield
        return
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def plain_types():
    """Switch the run-time type checks off, so that what is raised is the library's own message."""
    import jaxtyping

    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
