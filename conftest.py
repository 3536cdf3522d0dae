"""float64 on, and JAX as strict as it gets: no implicit promotion of dtypes or ranks."""

import os
import zlib

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # of JAX's Cholesky on CPU; beside other tests its threads stall

import jax
import pytest
from beartype import beartype
from hypothesis import HealthCheck, settings

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The same seeded examples in every run; JAXGRAD_FUZZ=30 in the environment runs thirty times as many.
FUZZ = int(os.environ.get("JAXGRAD_FUZZ", "1"))
settings.register_profile(
    "default", deadline=None, derandomize=True, max_examples=6 * FUZZ, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("default")


def type_checked(function):
    """For jaxtyping: as beartype; functions inside functions, which would be made anew at every call, as they are."""
    return function if "<locals>" in function.__qualname__ else beartype(function)


# What is marked slow runs where it is asked for: `pytest -m slow`, and `.ci/run`. Of a test marked every(k) each k-th
# case runs always and the others are slow; JAXGRAD_SLICE=3 leaves of these a third, JAXGRAD_SEED says which.
SLICE, SEED = int(os.environ.get("JAXGRAD_SLICE", "1")), os.environ.get("JAXGRAD_SEED", "0")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Sort the cases of the tests that are marked every(k)."""
    seen: dict[str, int] = {}
    kept, left_out = [], []
    for item in items:
        mark = item.get_closest_marker("every")
        name = item.nodeid.partition("[")[0]
        seen[name] = seen.get(name, -1) + 1
        if mark is None or seen[name] % mark.args[0] == 0:
            kept.append(item)
            continue
        item.add_marker(pytest.mark.slow)
        (left_out if zlib.crc32(f"{SEED} {item.nodeid}".encode()) % SLICE else kept).append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


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
