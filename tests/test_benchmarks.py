"""The harness of benchmarks/: a tiny workload from end to end, functions that are wrong or skipped, and the tables."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import card, models, report, roofline
from benchmarks.__main__ import main
from benchmarks.functions import factored, materialized, optax, plain
from benchmarks.measure import measure
from benchmarks.workload import Settings, Theme, Workload

ROOT = Path(__file__).parents[1]

# The command runs with JAX's own defaults, without the stricter settings of conftest.py.
pytestmark = pytest.mark.usefixtures("plain_types")


@pytest.fixture(autouse=True)
def jax_defaults():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def tiny(**changes) -> Workload:
    model = models.mlp((5, 4, 3), 6)
    functions = {"plain": plain(model), "jaxgrad": factored(model, 0.5), "vmap(grad)": materialized(model, 0.5)}
    return dataclasses.replace(
        Workload(
            "tiny", functions | {"other": "not installed"}, (model.params, *model.batch), ("jaxgrad", "vmap(grad)")
        ),
        **changes,
    )


def theme(*workloads: Workload) -> Theme:
    columns = (report.milliseconds("plain"), report.ratio("jaxgrad"), report.ratio("other"), report.memory("jaxgrad"))
    return Theme("tiny", "Tiny", "What it is.", columns, lambda settings: workloads)


def wrong(params, *batch):
    value, total = factored(models.mlp((5, 4, 3), 6), 0.5)(params, *batch)
    return value, jax.tree.map(lambda a: a * 1.01, total)


def test_a_table_from_end_to_end(tmp_path, capsys):
    argv = ["--seconds", "0", "--write", str(tmp_path)]
    (row,) = main(argv, [theme(tiny())])
    assert set(row.seconds) == set(row.bytes) == set(row.compiling) == {"plain", "jaxgrad", "vmap(grad)"}
    assert all(t > 0 for t in row.seconds.values())
    text = (tmp_path / "tiny.md").read_text()
    assert "not installed" in text
    assert f"jax {jax.__version__}" in text
    assert "| tiny |" in text
    assert "| tiny |" in capsys.readouterr().out
    saved = json.loads((tmp_path / report.RESULTS).read_text())["tiny"]
    assert saved["rows"][0]["seconds"] == row.seconds
    assert saved["rows"][0]["shapes"].startswith("float")


@pytest.mark.every(0)
def test_writing_a_theme_keeps_the_results_of_the_others(tmp_path):
    for name in ("first", "second"):
        main(["--seconds", "0", "--write", str(tmp_path)], [dataclasses.replace(theme(tiny()), name=name)])
    assert set(json.loads((tmp_path / report.RESULTS).read_text())) == {"first", "second"}


def test_a_wrong_function_is_not_timed():
    functions = dict(tiny().functions) | {"jaxgrad": wrong}
    with pytest.raises(AssertionError, match="tiny: jaxgrad and vmap\\(grad\\) disagree"):
        measure(tiny(functions=functions), Settings(seconds=0))


@pytest.mark.every(0)
def test_columns_that_do_not_fit_are_compared_on_a_sample():
    model = models.mlp((5, 4, 3), 6)
    large = {"sample": model.first(2), "materialized_bytes": {"vmap(grad)": 2**40}}
    (row,) = measure(tiny(**large), Settings(seconds=0))
    assert row.skipped["vmap(grad)"] == "does not fit"
    assert set(row.seconds) == {"plain", "jaxgrad"}
    functions = dict(tiny().functions) | {"jaxgrad": wrong}
    with pytest.raises(AssertionError, match="disagree"):
        measure(tiny(functions=functions, **large), Settings(seconds=0))


def test_functions_after_the_deadline_are_skipped():
    (row,) = measure(tiny(), Settings(seconds=0, deadline=0.0))
    assert set(row.skipped.values()) == {"out of time", "not installed"}
    assert not row.seconds


def test_the_theme_for_gpus_prepares_nothing_after_the_deadline():
    rows = [row for w in card.workloads(Settings(small=True, deadline=0.0)) for row in measure(w, Settings(seconds=0))]
    assert {reason for row in rows for reason in row.skipped.values()} == {"out of time"}
    assert not any(row.seconds for row in rows)
    assert len(rows) == 3 + 2 * (6 + 4)


def test_the_theme_for_gpus_compares_by_norm():
    compare = card.by_norm(0.01)
    a = {"w": jnp.ones((3, 4)), "b": jnp.zeros(2)}
    compare(a, {"w": a["w"] * 1.009, "b": a["b"] + 1e-6})
    for other in ({"w": a["w"] * 1.011, "b": a["b"]}, {"w": a["w"] * jnp.nan, "b": a["b"]}, {**a, "b": a["b"] + 1}):
        with pytest.raises(AssertionError, match="off by"):
            compare(a, other)


def test_operations_count_products_and_the_steps_of_loops():
    a, b = jnp.ones((3, 4)), jnp.ones((4, 5))
    assert roofline.product_operations(lambda a, b: a @ b, a, b) == 2 * 3 * 4 * 5

    def loop(a, b):
        return jax.lax.scan(lambda c, _: (c + jnp.sum(a @ b), None), 0.0, None, length=7)[0]

    assert roofline.product_operations(jax.jit(loop), a, b) == 7 * 2 * 3 * 4 * 5
    image, kernel = jnp.ones((2, 6, 8, 8)), jnp.ones((5, 6, 3, 3))
    conv = lambda x, k: jax.lax.conv(x, k, (1, 1), "VALID")  # noqa: E731
    assert roofline.product_operations(conv, image, kernel) == 2 * (2 * 5 * 6 * 6) * (6 * 3 * 3)


@pytest.mark.every(0)
def test_optax_and_factors_agree():
    model = models.mlp((5, 4, 3), 6)
    arguments = (model.params, *model.batch)
    from_factors, from_optax = factored(model, 0.5)(*arguments), optax(model, 0.5)(*arguments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), from_factors, from_optax)


# The script runs in a process of its own because the theme `compiled` sets environment variables for compilers.
def test_the_committed_tables_follow_from_the_committed_results():
    environment = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT))
    script = ROOT / "tests" / "support" / "tables.py"
    process = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, check=False)
    assert process.returncode == 0, process.stderr
    assert process.stdout == ""
