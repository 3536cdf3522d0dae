"""Test configuration: float64 is enabled, and implicit promotion of dtypes and ranks is an error."""

import contextlib
import os
import zlib

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # JAX's Cholesky on CPU: threads stall while other tests run

import jax
import pytest
from beartype import beartype
from hypothesis import HealthCheck, settings

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Every run draws the same examples; JAXGRAD_FUZZ=30 in the environment draws thirty times as many.
FUZZ = int(os.environ.get("JAXGRAD_FUZZ", "1"))
settings.register_profile(
    "default", deadline=None, derandomize=True, max_examples=6 * FUZZ, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("default")


def type_checked(function):
    """The type checker for jaxtyping: beartype, except on nested functions, which each call would check anew."""
    return function if "<locals>" in function.__qualname__ else beartype(function)


# Tests marked slow run only with `pytest -m slow` and in `.ci/run`. In a test marked every(k), each k-th case always
# runs (for k = 0 none does) and the others are slow; JAXGRAD_SLICE=3 keeps a third of these others, and JAXGRAD_SEED
# selects which third.
SLICE, SEED = int(os.environ.get("JAXGRAD_SLICE", "1")), os.environ.get("JAXGRAD_SEED", "0")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark cases of tests marked every(k) as slow, and deselect those outside the slice."""
    seen: dict[str, int] = {}
    kept, left_out = [], []
    for item in items:
        mark = item.get_closest_marker("every")
        name = item.nodeid.partition("[")[0]
        seen[name] = seen.get(name, -1) + 1
        if mark is None or (mark.args[0] and seen[name] % mark.args[0] == 0):
            kept.append(item)
            continue
        item.add_marker(pytest.mark.slow)
        (left_out if zlib.crc32(f"{SEED} {item.nodeid}".encode()) % SLICE else kept).append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


# Compiling takes most of the time of a small test, so LLVM's optimizations and XLA's fusion emitters are off, except
# where a test is about the compiled program itself: its digits at real sizes, its memory, or its time.
AS_USED = (
    "test_accelerators",
    "test_benchmarks",
    "test_compiled",
    "test_differential",
    "test_differential_curvature",
    "test_differential_network",
    "test_processes",
    "test_two_passes",
)


def _compile_options(*args, **kwargs):
    options = _jax_compile_options(*args, **kwargs)
    if jax.config.read("jax_disable_most_optimizations"):
        options.env_option_overrides = [*options.env_option_overrides, ("xla_cpu_use_fusion_emitters", False)]
    return options


# JAX has no public switch for this, and later versions no longer have the option; without it the tests are slower.
if jax.__version_info__ < (0, 11):
    with contextlib.suppress(ImportError, AttributeError):
        from jax._src import compiler

        _jax_compile_options = compiler.get_compile_options
        compiler.get_compile_options = _compile_options


@pytest.fixture(autouse=True)
def _optimized_where_it_matters(request: pytest.FixtureRequest):
    """Switch the compiler's optimizations on for `AS_USED` and for tests marked as_used, and off for the others."""
    used = request.node.path.stem in AS_USED or request.node.get_closest_marker("as_used") is not None
    jax.config.update("jax_disable_most_optimizations", not used)


@pytest.fixture(autouse=True)
def _doctest_environment(request: pytest.FixtureRequest, doctest_namespace: dict):
    """Define the usual names for the examples in docstrings and README.md, and use JAX's default promotion rules."""
    import jax.numpy as jnp
    import numpy as np

    import jaxgrad as jg

    doctest_namespace.update(jax=jax, jnp=jnp, np=np, jg=jg)
    if not isinstance(request.node, pytest.DoctestItem):
        yield
        return
    if request.node.name.startswith("jaxgrad.integrations.faiss."):
        pytest.importorskip("faiss")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def plain_types():
    """Switch the run-time type checks off, so that the library's own error is raised."""
    import jaxtyping

    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
