"""Runs over many batches: the files on disk are those of one pass, even after an interruption at any moment."""

import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxgrad as jg
from jaxgrad import network, streams

N, D, H = 50, 12, 9
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(N, D)), np.sign(RNG.normal(size=N))
PARAMS = network.init_params(jax.random.key(0), D, H, jnp.float64)


def whole():
    return jg.per_example_value_and_grad(network.loss)(PARAMS, X, Y)


def test_norms_from_memory_mapped_arrays(tmp_path):
    np.save(tmp_path / "X.npy", X)
    batches = streams.Batches(np.load(tmp_path / "X.npy", mmap_mode="r"), Y, size=8)
    results = streams.run(streams.norms(network.loss))(PARAMS, batches, tmp_path / "out")
    values, g = whole()
    np.testing.assert_allclose(results.rows["norms"], g.norms(), rtol=1e-12)
    np.testing.assert_allclose(results.rows["values"], values, rtol=1e-12)
    assert isinstance(results.rows["norms"], np.memmap)
    assert (results.batches, results.examples) == (7, N)


def test_second_moments_and_sums(tmp_path):
    each = streams.second_moments(network.loss)
    results = streams.run(each, every=3)(PARAMS, streams.Batches(X, Y, size=8), tmp_path)
    _, g = whole()
    for name, tree, scale in (("sum", g.sum(), 1), ("squares", g.second_moment(), N)):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            np.testing.assert_allclose(results.sums[name + jax.tree_util.keystr(path)], leaf * scale, rtol=1e-10)


def test_inner_products_with_a_fixed_set(tmp_path):
    fixed = jg.per_example_grad(network.loss)(PARAMS, X[:5], Y[:5])
    generator = ((X[k : k + 20], Y[k : k + 20]) for k in range(0, N, 20))
    results = streams.run(streams.inner_products(network.loss, fixed))(PARAMS, generator, tmp_path)
    np.testing.assert_allclose(results.rows["products"], whole()[1].gram(fixed), rtol=1e-10, atol=1e-12)


def test_what_is_done_is_neither_read_nor_written_again(tmp_path):
    norms, sizes = streams.norms(network.loss), []

    def function(params, *batch):
        sizes.append(len(batch[0]))
        return norms(params, *batch)

    batches = streams.Batches(X, Y, size=8)
    run = streams.run(function, jit=False)
    first = run(PARAMS, batches, tmp_path)
    repeated = run(PARAMS, iter(list(batches)), tmp_path)
    assert sizes == [8] * 6 + [2]
    np.testing.assert_array_equal(first.rows["norms"], repeated.rows["norms"])
    longer = streams.Batches(np.concatenate([X, X[:8]]), np.concatenate([Y, Y[:8]]), size=8)
    assert run(PARAMS, longer, tmp_path).batches == 8  # continues with the new batch


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith(".new")}


@pytest.mark.parametrize("failure", range(7))
@pytest.mark.parametrize("every", [1, 3])
def test_a_run_restarted_after_an_error_ends_with_the_same_files(tmp_path, failure, every):
    def function(_, x, y):
        return streams.Part({"x": x, "two": np.stack([y, 2 * y], 1)}, {"sum": x.sum(0) / 3})

    def failing(_, x, y):
        failing.count += 1
        if failing.count == failure + 1:
            raise RuntimeError
        return function(None, x, y)

    failing.count, batches = 0, streams.Batches(X, Y, size=8)
    streams.run(function, every=every, jit=False)(None, batches, tmp_path / "unbroken")
    with pytest.raises(RuntimeError):
        streams.run(failing, every=every, jit=False)(None, batches, tmp_path / "broken")
    for path in (tmp_path / "broken").glob("*.rows"):  # as after a kill between writing rows and writing the state
        path.write_bytes(path.read_bytes() + b"half a row")
    streams.run(function, every=every, jit=False)(None, batches, tmp_path / "broken")
    assert contents(tmp_path / "broken") == contents(tmp_path / "unbroken")


PROGRAM = """
import sys, time
import numpy as np
from jaxgrad import streams

rng = np.random.default_rng(0)
X = rng.normal(size=(400, 1000))

def function(_, x):
    time.sleep(0.01)
    return streams.Part({"norms": np.linalg.norm(x, axis=1), "x": x}, {"sum": x.sum(0)})

print("ready", flush=True)
streams.run(function, jit=False)(None, streams.Batches(X, size=4), sys.argv[1])
print("done", flush=True)
"""


def start(folder):
    return subprocess.Popen([sys.executable, "-c", PROGRAM, folder], stdout=subprocess.PIPE, text=True)


def finished(folder):
    with start(folder) as process:
        return process.communicate(timeout=120)[0].split() == ["ready", "done"]


@pytest.mark.slow
def test_a_killed_run_continues_and_ends_with_the_files_of_an_unbroken_one(tmp_path):
    assert finished(tmp_path / "unbroken")
    for wait in (0.15, 0.4, 0.3):
        with start(tmp_path / "broken") as process:
            assert process.stdout.readline() == "ready\n"
            time.sleep(wait)
            process.send_signal(signal.SIGKILL)
            assert process.wait(60) == -signal.SIGKILL
    assert finished(tmp_path / "broken")
    assert contents(tmp_path / "broken") == contents(tmp_path / "unbroken")


def test_half_precision_and_a_progress_bar(tmp_path, capsys):
    values = jnp.asarray(X[:10, 0], jnp.bfloat16)
    results = streams.run(lambda _, v: streams.Part({"v": v}, {}), progress=True)(
        None, [(values[:5],), (values[5:],)], tmp_path
    )
    np.testing.assert_array_equal(results.rows["v"], np.float32(values))
    assert "100%" in capsys.readouterr().out


def test_errors_name_the_call(tmp_path):
    rows = lambda **rows: lambda _, x: streams.Part({k: f(x) for k, f in rows.items()}, {})  # noqa: E731
    batches = streams.Batches(X, size=25)
    streams.run(rows(a=lambda x: x))(None, batches, tmp_path / "a")
    with pytest.raises(ValueError, match=r"expected rows .* Another run's results"):
        streams.run(rows(b=lambda x: x))(None, [*batches, (X,)], tmp_path / "a")
    with pytest.raises(ValueError, match="rows of one length"):
        streams.run(rows(a=lambda x: x, b=lambda x: x[:1]))(None, batches, tmp_path / "b")
    with pytest.raises(ValueError, match="names of files"):
        streams.run(rows(**{"a/b": lambda x: x}))(None, batches, tmp_path / "c")
    with pytest.raises(ValueError, match="commit every 1 or more"):
        streams.run(rows(a=lambda x: x), every=0)
    with pytest.raises(ValueError, match="arrays of one length"):
        streams.Batches(X, Y[:3], size=2)
    with pytest.raises(IndexError, match=r"streams\.Batches"):
        batches[2]


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("size", [10.0, 2.0**-13])
def test_second_moments_of_half_precision_are_float32(tmp_path, dtype, size):
    """Squares of 10 add up to more than the largest float16, and squares of 2⁻¹³ are below the smallest."""
    x = jnp.full((1024, 3), size, dtype)
    moments = streams.second_moments(lambda w, x: (w * x).sum())
    sums = streams.run(moments)(jnp.zeros(3, dtype), streams.Batches(x, size=100), tmp_path).sums
    assert sums["squares"].dtype == sums["sum"].dtype == np.float64  # sums on disk
    np.testing.assert_allclose(sums["squares"], 1024 * size**2, rtol=1e-5)
    np.testing.assert_allclose(sums["sum"], 1024 * size, rtol=1e-5)
