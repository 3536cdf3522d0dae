"""FAISS indexes of stored rows. They need faiss-cpu, which the extras `faiss` and `test` install."""

import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrad import streams
from jaxgrad.integrations.faiss import index

N, T, S = 200, 3, 12
RNG = np.random.default_rng(0)
QUERIES = np.float32(RNG.normal(size=(5, S)))


def rows_on_disk(folder, shape, dtype):
    X = RNG.normal(size=shape).astype(jnp.dtype(dtype))
    each = lambda _, x: streams.Part({"x": x}, {})  # noqa: E731
    return streams.run(each, jit=False)(None, streams.Batches(X, size=64), folder).rows["x"]


def test_without_the_package_the_error_says_what_to_install():
    program = (
        "import sys; sys.modules['faiss'] = None\n"
        "import numpy as np\n"
        "from jaxgrad.integrations.faiss import index\n"
        "try:\n    index(np.ones((3, 2)))\n"
        "except ModuleNotFoundError as error:\n    print(error)\n"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert found.startswith(
        "faiss.index: expected the package FAISS, which is not installed. Run pip install faiss-cpu"
    )


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(N, S), (N, T, S)])
def test_a_flat_index_finds_what_the_exact_search_finds(tmp_path, dtype, shape):
    pytest.importorskip("faiss")
    rows = rows_on_disk(tmp_path, shape, dtype)
    mask = np.random.default_rng(1).random(shape[:-1]) < 0.6
    for where in (None, mask):
        exact = streams.search(7)(QUERIES, rows, where=where)
        values, found = index(rows, where=where, size=32).search(QUERIES, 7)
        pairs = found if len(shape) == 2 else np.stack(np.unravel_index(found, shape[:-1]), -1)
        np.testing.assert_array_equal(pairs, exact.indices)
        np.testing.assert_allclose(values, exact.values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("description", ["IVF8,Flat", "SQfp16", "IVF4,PQ4x4"])
def test_indexes_that_are_trained(tmp_path, description):
    faiss = pytest.importorskip("faiss")
    rows = rows_on_disk(tmp_path, (N, S), "float16")
    where = np.arange(N) % 2 == 0
    found = index(rows, description, train=150)
    again, half = index(rows, description, train=150), index(rows, description, where=where)
    assert (found.ntotal, half.ntotal, found.metric_type) == (N, N // 2, faiss.METRIC_INNER_PRODUCT)
    np.testing.assert_array_equal(found.search(QUERIES, 5)[1], again.search(QUERIES, 5)[1])
    if description.startswith("IVF"):
        faiss.extract_index_ivf(found).nprobe = faiss.extract_index_ivf(half).nprobe = 8
    if not description.endswith("PQ4x4"):
        np.testing.assert_array_equal(found.search(QUERIES, 3)[1], streams.search(3)(QUERIES, rows).indices)
        exact = streams.search(3)(QUERIES, rows, where=where)
        np.testing.assert_array_equal(half.search(QUERIES, 3)[1], exact.indices)
    faiss.write_index(found, str(tmp_path / "index"))
    read = faiss.read_index(str(tmp_path / "index"))
    np.testing.assert_array_equal(read.search(QUERIES, 5)[1], found.search(QUERIES, 5)[1])


def test_fewer_rows_than_are_asked_for():
    pytest.importorskip("faiss")
    values, found = index(np.eye(3, dtype=np.float32), where=np.array([False, True, False])).search(np.eye(3)[:1], 2)
    assert found.tolist() == [[1, -1]]
    assert values[0, 0] == 0
    assert index(np.zeros((0, 3), np.float32)).ntotal == 0


def test_only_blocks_of_the_rows_are_read(tmp_path, monkeypatch):
    """No array of all rows in float32 is made: blocks are converted, and the rows drawn for training."""
    pytest.importorskip("faiss")
    rows = rows_on_disk(tmp_path, (N, S), "float16")
    sizes = []
    convert = np.ndarray.astype
    monkeypatch.setattr("jaxgrad.integrations.faiss._float32", lambda a: sizes.append(len(a)) or convert(a, np.float32))
    index(rows, "IVF4,Flat", size=32, train=50)
    assert sizes == [50, *[32] * (N // 32), N % 32]


@pytest.mark.usefixtures("plain_types")
def test_errors_name_the_call():
    rows = np.ones((3, 2, 4), np.float32)
    with pytest.raises(ValueError, match=r"faiss.index: expected rows \[N, S\] or .* got shapes \[4\] and None"):
        index(rows[0, 0])
    with pytest.raises(ValueError, match=r"got shapes \[3, 2, 4\] and \[3\]"):
        index(rows, where=np.ones(3, bool))
    with pytest.raises(ValueError, match="at least 1 row, got 0"):
        index(rows, train=0)
    with pytest.raises(ValueError, match="size of at least 1"):
        index(rows[0], size=0)
    pytest.importorskip("faiss")
    with pytest.raises(ValueError, match="FAISS can build from 6 rows of 4 numbers, got 'no such index'"):
        index(rows, "no such index")
    with pytest.raises(ValueError, match="got 'IVF7,Flat'"):
        index(rows, "IVF7,Flat")
    rows[1, 1, 2] = np.nan
    with pytest.raises(ValueError, match=r"finite in float32, got another at rows\[1, 1\]"):
        index(rows, size=2)
    assert index(rows, where=np.isfinite(rows).all(-1)).ntotal == 5
