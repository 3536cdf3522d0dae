"""The example in `notebooks/private_language_model.py`: its gradients, LoRA, and runs that are killed and continued."""

import argparse
import functools
import importlib.util
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "notebooks" / "private_language_model.py"
OPTIONS = argparse.Namespace(max_norm=0.5, microbatch=2)
SMALL = {"layers": 2, "width": 8, "heads": 2, "length": 6, "vocabulary": 11}
RUN = {"seed": 7, "windows": 400, "public-steps": 12, "steps": 6, "batch": 12, "microbatch": 4, "every": 2}


@pytest.fixture(scope="module")
def example():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("private_language_model", SCRIPT)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(autouse=True)
def jax_defaults():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"), jax.enable_x64(False):
        yield


def small(example, rank=0):
    """(loss, trained, frozen, windows [5, T + 1], state, optimizer)."""
    sizes = example.Sizes(**SMALL)
    key, optimizer = jnp.array([3, 4], jnp.uint32), optax.sgd(1.0)
    trained, frozen = example.new_params(jax.random.key(0), sizes), None
    if rank:
        trained, frozen = example.new_adapters(jax.random.key(1), sizes, rank), trained
    windows = jax.random.randint(jax.random.key(2), (5, 7), 0, 11)
    fun = functools.partial(example.loss, sizes=sizes)
    return fun, trained, frozen, windows, example.new_state(trained, optimizer, key), optimizer


@pytest.mark.every(2)
@pytest.mark.parametrize("rank", [3, 0])
def test_a_step_without_noise_takes_the_sum_of_the_clipped_gradients_of_the_unmasked_windows(example, rank):
    fun, trained, frozen, windows, state, optimizer = small(example, rank)
    mask = jnp.array([True, True, False, True, True])
    step = jax.jit(example.private_step(example.clipped(OPTIONS, fun), optimizer, 0.0, 4.0))
    after, info = step(state, frozen, windows, mask)
    each = jax.vmap(jax.grad(fun), (None, None, 0))(trained, frozen, windows)
    norms = jnp.sqrt(sum((a * a).reshape(5, -1).sum(1) for a in jax.tree.leaves(each)))
    c = jnp.where(mask, jnp.minimum(1.0, 0.5 / norms), 0.0)
    assert float(info.clipped_fraction) > 0, norms
    np.testing.assert_allclose(info.norms, jnp.where(mask, norms, 0.0), rtol=1e-5)
    expected = jax.tree.map(lambda p, g: p - jnp.einsum("b,b...->...", c, g) / 4.0, trained, each)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), after.trained, expected)
    assert int(after.step) == 1


@pytest.mark.slow
def test_the_noise_of_a_step_depends_on_the_step_and_on_nothing_else(example):
    fun, trained, frozen, windows, state, optimizer = small(example)
    step = jax.jit(example.private_step(example.clipped(OPTIONS, fun), optimizer, 3.0, 4.0))
    empty = jnp.zeros(5, bool)
    first, _ = step(state, frozen, windows, empty)
    again, _ = step(state, frozen, windows[::-1], empty)
    later, _ = step(state._replace(step=state.step + 1), frozen, windows, empty)
    noise, same, other = (
        jax.flatten_util.ravel_pytree(jax.tree.map(jnp.subtract, s.trained, trained))[0] for s in (first, again, later)
    )
    np.testing.assert_array_equal(noise, same)
    assert abs(float(jnp.corrcoef(noise, other)[0, 1])) < 0.1
    np.testing.assert_allclose(float(noise.std()), 3.0 / 4.0, rtol=0.1)


def test_the_noise_of_the_first_step_is_not_what_the_parameters_were_drawn_with(example):
    fun, _, frozen, windows, state, optimizer = small(example)
    params = example.new_params(example.stream(state.key, example.Use.PARAMETERS), example.Sizes(**SMALL))
    step = jax.jit(example.private_step(example.clipped(OPTIONS, fun), optimizer, 1.0, 1.0))
    after, _ = step(state, frozen, windows, jnp.zeros(5, bool))
    noise = jax.tree.map(jnp.subtract, after.trained, state.trained)
    for drawn, added in itertools.product(jax.tree.leaves(params), jax.tree.leaves(noise)):
        n = min(drawn.size, added.size)
        if n > 40 and float(drawn.std()) > 0:
            assert abs(np.corrcoef(drawn.ravel()[:n], added.ravel()[:n])[0, 1]) < 0.6


@pytest.mark.slow
def test_new_adapters_do_not_change_the_loss_and_trained_ones_do(example):
    fun, trained, frozen, windows, state, optimizer = small(example, rank=3)
    np.testing.assert_allclose(fun(trained, frozen, windows[0]), fun(frozen, None, windows[0]), rtol=1e-6)
    step = jax.jit(example.private_step(example.clipped(OPTIONS, fun), optimizer, 0.0, 4.0))
    after, _ = step(state, frozen, windows, jnp.ones(5, bool))
    assert float(fun(after.trained, frozen, windows[0])) < float(fun(trained, frozen, windows[0]))
    assert {"A", "B"} == set(after.trained["qkv"])
    assert set(after.trained) == {"qkv", "out", "up", "down"}  # a state has no other parameters


def test_windows_do_not_overlap_and_are_cut_from_the_text(example):
    windows = example.cut("abcdefghé0", 2)
    assert windows.tolist() == [[97, 98, 99], [100, 101, 102], [103, 104, ord("?")]]
    assert next(text for _, text in example.docstrings("jaxgrad")).startswith("Per-example gradients in JAX")


def test_poisson_samples_have_the_expected_size_and_are_padded(example):
    pytest.importorskip("jax_privacy")
    sizes = [len(example.poisson_sample(1000, 0.1, np.random.default_rng(k))) for k in range(50)]
    assert 90 < np.mean(sizes) < 110
    assert np.std(sizes) > 4
    assert example.pad(np.array([5, 3]), 4).tolist() == [5, 3, -1, -1]
    assert example.pad(np.array([], int), 4).tolist() == [-1] * 4


# In a process of its own because `benchmarks.compiled` sets environment variables for compilers.
EIGHT_DEVICES = """
import jax
jax.config.update("jax_num_cpu_devices", 8)
from benchmarks.compiled.private_step import command_line, compare
sizes = {"layers": 2, "width": 16, "heads": 2, "length": 6, "vocabulary": 16}
compare(command_line().parse_args(["v5e:4x2", "--lora", "2"]), jax.devices(), sizes)
"""


@pytest.mark.slow
def test_a_plain_and_a_private_step_are_compiled_for_eight_devices():
    environment = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT))
    command = [sys.executable, "-c", EIGHT_DEVICES]
    process = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert lines[0].startswith("8 chips, 32 windows of 6 ids")
    assert [line.split()[0] for line in lines[1:]] == ["plain", "private", "private"]
    assert all(0.5 < float(number) < 5 for number in lines[3].split()[-2:])


def start(folder, *options):
    environment = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT))
    small = [text for name, value in RUN.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, "-u", str(SCRIPT), "--folder", str(folder), *small, *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def run(folder, *options):
    output, _ = start(folder, *options).communicate(timeout=600)
    return output


def kill_after(beginning, folder, *options):
    """Run until a line with this beginning is printed, and kill the process."""
    process = start(folder, *options)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(beginning):
            process.send_signal(signal.SIGKILL)
            break
    process.stdout.close()
    assert process.wait(60) == -signal.SIGKILL, "".join(lines)


def restored(folder, step):
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(folder, item_handlers=ocp.StandardCheckpointHandler()) as manager:
        assert manager.latest_step() == step
        return jax.tree.map(np.asarray, manager.restore(step))


def numbers(output):
    """The lines of the private steps, without the time."""
    return {line.rpartition("epsilon")[0] for line in output.splitlines() if line.startswith("private ")}


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # orbax says that it restores without shardings
@pytest.mark.parametrize(
    "options", [pytest.param((), id="full"), pytest.param(("--lora", "2"), id="lora", marks=pytest.mark.every(0))]
)
def test_a_run_that_is_killed_twice_and_continued_equals_an_unbroken_one(tmp_path, options):
    for package in ("orbax.checkpoint", "jax_privacy", "dp_accounting"):
        pytest.importorskip(package)
    unbroken = run(tmp_path / "unbroken", *options)
    kill_after("public    10", tmp_path / "broken", *options)
    kill_after("private    2", tmp_path / "broken", *options)
    rest = run(tmp_path / "broken", *options)
    assert "private: continues after step 2" in rest, rest
    assert numbers(rest)
    assert numbers(rest) < numbers(unbroken)
    for phase, step in (("public", 12), ("private", 6)):
        states = [restored(tmp_path / name / phase, step) for name in ("unbroken", "broken")]
        jax.tree.map(np.testing.assert_array_equal, *states)
    start_of_private = restored(tmp_path / "broken" / "private", 6)
    if options:
        assert set(start_of_private["trained"]) == {"qkv", "out", "up", "down"}
    assert "Use the same settings" in run(tmp_path / "broken", *options, "--epsilon", "2.0")
