"""Runs over many batches: the files on disk are those of one pass, even after an interruption at any moment."""

import json
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
def test_a_run_killed_ten_times_ends_with_the_files_of_an_unbroken_one(tmp_path):
    assert finished(tmp_path / "unbroken")
    for wait in np.random.default_rng().uniform(0, 0.25, 10):
        with start(tmp_path / "broken") as process:
            assert process.stdout.readline() == "ready\n"
            time.sleep(wait)
            process.send_signal(signal.SIGKILL)
            assert process.wait(60) == -signal.SIGKILL
        if (tmp_path / "broken" / "manifest.json").exists():
            streams.load(tmp_path / "broken", check=True)
    assert finished(tmp_path / "broken")
    assert contents(tmp_path / "broken") == contents(tmp_path / "unbroken")


# --- Damaged files ---------------------------------------------------------------------------------------------------


def written(folder, rows=(5, 3), dtype=np.float32, size=2):
    """A folder with rows and sums, in several commits."""
    X = np.random.default_rng(1).normal(size=rows).astype(dtype)
    part = lambda _, x: streams.Part({"x": x}, {"sum": x.astype(np.float64).sum(0)})  # noqa: E731
    streams.run(part, jit=False)(None, streams.Batches(X, size=size), folder)
    return X


def test_what_was_written_is_loaded(tmp_path):
    X = written(tmp_path)
    found = streams.load(tmp_path, check=True, progress=True)
    np.testing.assert_array_equal(found.rows["x"], X)
    np.testing.assert_allclose(found.sums["sum"], X.astype(np.float64).sum(0))
    assert (found.batches, found.examples) == (3, 5)
    assert {path.name for path in tmp_path.iterdir()} == {"manifest.json", "x.rows", "sums-3.npz"}


@pytest.mark.every(8)
@pytest.mark.parametrize("bit", range(8))
def test_every_changed_byte_of_the_manifest_and_the_sums_is_found(tmp_path, bit):
    written(tmp_path)
    for name in ("manifest.json", "sums-3.npz"):
        path = tmp_path / name
        data = path.read_bytes()
        changed = [data[:k] + bytes([data[k] ^ 1 << bit]) + data[k + 1 :] for k in range(len(data))]
        for content in (*changed, *(data[:k] for k in range(0, len(data), 50)), data + b"\n"):
            path.write_bytes(content)
            with pytest.raises(ValueError, match=r"streams.load: expected (a manifest|the sums)"):
                streams.load(tmp_path)
        path.write_bytes(data)
        streams.load(tmp_path)


def test_every_truncation_and_every_changed_byte_of_the_rows_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(streams.store, "BLOCK_BYTES", 24)  # two rows
    written(tmp_path)
    assert len(json.loads((tmp_path / "manifest.json").read_text())["contents"]["rows"]["x"]["checksums"]) == 3
    path = tmp_path / "x.rows"
    data = path.read_bytes()
    for k in range(len(data)):
        path.write_bytes(data[:k])
        with pytest.raises(ValueError, match=r"expected 60 bytes of committed rows in .*x\.rows, got"):
            streams.load(tmp_path)
        with pytest.raises(ValueError, match=r"streams.run: expected 60 bytes"):
            written(tmp_path)
        path.write_bytes(data[:k] + bytes([data[k] ^ 4]) + data[k + 1 :])
        with pytest.raises(ValueError, match=rf"expected rows {2 * (k // 24)} to .* with the checksum"):
            streams.load(tmp_path, check=True)
    path.unlink()
    with pytest.raises(ValueError, match="got 0"):
        streams.load(tmp_path)
    path.write_bytes(data + b"rows of a commit that did not finish")
    np.testing.assert_array_equal(streams.load(tmp_path, check=True).rows["x"], written(tmp_path))
    assert path.read_bytes() == data


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_the_files_do_not_depend_on_the_batches(tmp_path, monkeypatch, size):
    monkeypatch.setattr(streams.store, "BLOCK_BYTES", 30)
    written(tmp_path / "one", size=5)
    written(tmp_path / "other", size=size)
    rows = [
        json.loads((tmp_path / name / "manifest.json").read_text())["contents"]["rows"] for name in ("one", "other")
    ]
    assert rows[0] == rows[1]
    streams.load(tmp_path / "other", check=True)


def test_files_of_something_else(tmp_path):
    with pytest.raises(ValueError, match=r"streams.load: expected a folder that streams.run wrote"):
        streams.load(tmp_path)
    for content in (b"{}", b"[1]", b"", b"\xff\x00", b'{"contents": {"rows": 1}}'):
        (tmp_path / "manifest.json").write_bytes(content)
        for call in (streams.load, written):
            with pytest.raises(ValueError, match=r"expected a manifest of the format 'jaxgrad rows 1'"):
                call(tmp_path)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_rows_are_read_by_numpy_alone(tmp_path, dtype):
    X = written(tmp_path, (7, 3), jnp.dtype(dtype))
    assert streams.load(tmp_path).rows["x"].dtype == dtype
    if dtype == "bfloat16":
        raw = np.memmap(tmp_path / "x.rows", "<u2", shape=(7, 3))
        np.testing.assert_array_equal((raw.astype("<u4") << 16).view("<f4"), np.float32(X))
    else:
        np.testing.assert_array_equal(np.memmap(tmp_path / "x.rows", dtype, shape=(7, 3)), X)


# --- An index of projections -----------------------------------------------------------------------------------------


def index(folder, dtype):
    """(sides, the results of a run over X, Y)."""
    sides = jg.attribution.random_sides(PARAMS, jax.random.key(1), 3)
    each = streams.projections(network.loss, sides, dtype=dtype)
    return sides, streams.run(each)(PARAMS, streams.Batches(X, Y, size=8), folder)


@pytest.mark.every(2)
@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_searching_an_index_of_projections(tmp_path, dtype):
    sides, results = index(tmp_path, dtype)
    values, g = whole()
    expected = np.asarray(jg.attribution.project(g, sides))
    rows = results.rows["projections"]
    assert (rows.dtype, rows.shape) == (dtype, expected.shape)
    np.testing.assert_allclose(results.rows["values"], values, rtol=1e-12)
    tolerance = {"float64": 1e-12, "float16": 2e-3, "bfloat16": 2e-2}[dtype]
    np.testing.assert_allclose(np.float64(rows), expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())
    queries = expected[:3] if dtype == "float64" else np.float32(expected[:3])
    dense = queries @ np.asarray(rows).astype(queries.dtype).T
    np.testing.assert_allclose(streams.scores(size=7)(queries, rows), dense, rtol=1e-4, atol=1e-5)
    found = streams.search(4, size=7, progress=True)(queries, rows)
    np.testing.assert_array_equal(found.indices, np.argsort(-dense, 1, stable=True)[:, :4])


def test_blocks_of_a_memory_mapped_file_are_copies(tmp_path):
    np.save(tmp_path / "X.npy", X)
    stored = np.load(tmp_path / "X.npy", mmap_mode="r")
    for a in (stored, stored[1:], stored[:, ::2], stored.T, stored[:, 0]):
        for k, (block,) in enumerate(streams.Batches(a, size=7)):
            np.testing.assert_array_equal(block, np.asarray(a)[7 * k : 7 * k + 7])


def test_half_precision_and_a_progress_bar(tmp_path, capsys):
    values = jnp.asarray(X[:10, 0], jnp.bfloat16)
    results = streams.run(lambda _, v: streams.Part({"v": v}, {}), progress=True)(
        None, [(values[:5],), (values[5:],)], tmp_path
    )
    assert results.rows["v"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.float32(results.rows["v"]), np.float32(values))
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
    with pytest.raises(ValueError, match="expected k of at least 1, got 0"):
        streams.search(0)
    with pytest.raises(ValueError, match=r"streams\.scores: expected at least one row"):
        streams.scores()(np.ones((1, 2)), np.ones((0, 2)))


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
