"""The main job from the shell: what it prints, writes and refuses."""

import io
import os
import pty
import re
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest

import jaxgrad
from jaxgrad.exercise.job import data as data_module
from jaxgrad.exercise.job import output
from jaxgrad.exercise.job.command import main
from jaxgrad.network import closed_form

# The job runs with JAX's defaults; conftest.py is stricter.
pytestmark = pytest.mark.usefixtures("plain_types")


@pytest.fixture(autouse=True)
def jax_defaults():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def run(capsys, *argv) -> tuple[int, str, str]:
    try:
        status = main([str(a) for a in argv])
    except SystemExit as stop:  # argparse
        status = stop.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def table(path: Path, n=40, columns=("a", "b"), label="label", classes=("no", "yes"), seed=0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(rng.normal(size=(n, len(columns))), columns=list(columns))
    frame[label] = np.where(frame[columns[0]] + 0.1 * rng.normal(size=n) > 0, classes[1], classes[0])
    frame.to_csv(path, index=False)
    return frame


def test_as_a_new_user_runs_it():
    """In its own process, with JAX's defaults, and nothing on the error stream."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX", "XLA"))}
    root = Path(jaxgrad.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "jaxgrad"],
        env=environment | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "breast cancer (scikit-learn): 569 examples × 30 inputs" in done.stdout
    assert float(re.search(r"accuracy (\S+)", done.stdout)[1]) > 0.97
    assert float(re.search(r"loss (\S+),", done.stdout)[1]) < 0.06
    assert "agrees with jax.grad in float64 on 569 examples" in done.stdout
    for words in ("compile and first call", "closed form", "jax.grad", "largest gradients"):
        assert words in done.stdout
    assert "training" not in done.stdout  # no progress bar: this is not a terminal
    assert len(re.findall(r"example \d+ ", done.stdout)) == 5


@pytest.mark.slow
def test_a_progress_bar_on_a_terminal():
    parent, child = pty.openpty()
    root = Path(jaxgrad.__file__).parents[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxgrad", "--steps", "300"],
        env=os.environ | {"PYTHONPATH": str(root), "TERM": "xterm", "JAX_PLATFORMS": "cpu"},
        stdout=child,
        stderr=child,
        stdin=subprocess.DEVNULL,
    )
    os.close(child)
    shown = b""
    while True:
        try:
            chunk = os.read(parent, 4096)
        except OSError:  # the end of a terminal
            break
        if not chunk:
            break
        shown += chunk
    os.close(parent)
    assert process.wait(timeout=60) == 0
    assert b"training" in shown


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "activation"), [("float32", "relu"), ("float64", "gelu"), ("bfloat16", "logistic"), ("float16", "tanh")]
)
def test_every_dtype_and_activation(capsys, dtype, activation):
    status, out, err = run(capsys, "--dtype", dtype, "--activation", activation, "--steps", "60", "--hidden", "5")
    assert (status, err) == (0, "")
    assert f"5 {activation} units, {dtype}" in out
    assert float(re.search(r"accuracy (\S+)", out)[1]) > 0.9


@pytest.mark.slow
def test_untrained_and_seeded(capsys):
    first = run(capsys, "--steps", "0", "--seed", "1")[1]
    repeated = run(capsys, "--steps", "0", "--seed", "1")[1]
    other = run(capsys, "--steps", "0", "--seed", "2")[1]
    loss = re.compile(r"loss \S+ accuracy \S+")
    assert loss.findall(first) == loss.findall(repeated) != loss.findall(other)


@pytest.mark.slow
def test_saves_and_plots(capsys, tmp_path):
    csv, npz, png = tmp_path / "out.csv", tmp_path / "out.npz", tmp_path / "out.png"
    assert run(capsys, "--steps", 20, "--save", csv, "--plot", png)[0] == 0
    assert run(capsys, "--steps", 20, "--save", npz)[0] == 0
    frame = pd.read_csv(csv)
    expected = ["example", "label", "y", "margin", "loss", "grad_norm", "grad_norm_autodiff", "relative_difference"]
    assert list(frame.columns) == expected
    assert len(frame) == 569
    assert set(frame.label) == {"malignant", "benign"}
    np.testing.assert_allclose(frame.loss, np.logaddexp(0, -frame.y * frame.margin), rtol=1e-5)
    np.testing.assert_allclose(frame.grad_norm, frame.grad_norm_autodiff, rtol=1e-4)
    assert (frame.relative_difference < 1e-4).all()
    with np.load(npz, allow_pickle=False) as archive:
        assert set(archive.files) == set(expected)
        np.testing.assert_allclose(archive["grad_norm"], frame.grad_norm, rtol=1e-5)
    assert png.read_bytes().startswith(b"\x89PNG\r\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.csv", "out.npz", "out.png"]  # nothing left over


def test_results_are_those_of_each_example(capsys, tmp_path):
    """Against a loop over examples, on a file, through the saved results; more than one chunk."""
    frame = table(tmp_path / "in.csv", n=30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxgrad.exercise.job.evaluation._CHUNK_BYTES", 7 * 4 * 4 * 4)
        status, _, err = run(
            capsys, "--data", tmp_path / "in.csv", "--hidden", "4", "--steps", "5", "--save", tmp_path / "out.csv"
        )
    assert (status, err) == (0, "")
    saved = pd.read_csv(tmp_path / "out.csv")
    assert list(saved.label) == list(frame.label)
    assert list(saved.y) == [1.0 if v == "yes" else -1.0 for v in frame.label]


@pytest.mark.slow
def test_disagreement_ends_with_status_one(capsys, monkeypatch, tmp_path):
    right = closed_form.batched_grad

    def wrong(params, X, Y, activation):
        return right(params, X, Y, activation)._replace(w=2 * right(params, X, Y, activation).w)

    monkeypatch.setattr(closed_form, "batched_grad", wrong)
    status, out, err = run(capsys, "--steps", "5")
    assert status == 1
    assert "DISAGREES" in out
    assert "the gradients disagree" in err

    def full(path, write):
        raise data_module.InputError(f"{path}: cannot be written: No space left on device")

    monkeypatch.setattr(output, "_write_whole", full)
    status, out, err = run(capsys, "--steps", "5", "--save", tmp_path / "out.csv", "--plot", tmp_path / "out.png")
    assert status == 1  # the verdict, whatever else failed
    assert "DISAGREES" in out
    assert "saved" not in out
    assert "plotted" not in out
    for message in ("out.csv: cannot be written", "out.png: cannot be written", "the gradients disagree"):
        assert message in err


@pytest.mark.slow
def test_csv_with_any_label_column_and_numeric_labels(capsys, tmp_path):
    for classes in ((0, 1), (-1, 1), (False, True), (3, 7), ("a b", "c,d")):
        table(tmp_path / "in.csv", label="outcome", classes=classes)
        status, out, err = run(capsys, "--data", tmp_path / "in.csv", "--label", "outcome", "--steps", "50")
        assert (status, err) == (0, "")
        assert "in.csv: 40 examples × 2 inputs" in out


def test_a_constant_feature_and_large_offsets_are_fine(capsys, tmp_path):
    frame = table(tmp_path / "in.csv")
    frame["constant"], frame["offset"] = 5.0, 1e9 + frame["a"]
    frame.to_csv(tmp_path / "in.csv", index=False)
    assert run(capsys, "--data", tmp_path / "in.csv", "--steps", "5")[::2] == (0, "")


@pytest.mark.slow
def test_numbers_that_only_float64_holds_are_standardized_like_others(capsys, tmp_path):
    frame = table(tmp_path / "in.csv")
    frame["large"], frame["constant"] = 1e100 * frame["b"], 1e300
    frame.to_csv(tmp_path / "in.csv", index=False)
    status, _, err = run(capsys, "--data", tmp_path / "in.csv", "--steps", "5", "--dtype", "float16")
    assert (status, err) == (0, "")
    X = data_module.load(tmp_path / "in.csv", None).X
    np.testing.assert_allclose(X[:, 2], X[:, 1], rtol=1e-9)
    assert not X[:, 3].any()


@pytest.mark.slow
@pytest.mark.parametrize("rows", [slice(None), slice(None, None, -1), slice(3, None, 2)], ids=["all", "turned", "some"])
def test_a_nameless_column_that_counts_the_rows_is_reported_and_not_used(capsys, tmp_path, rows):
    frame = table(tmp_path / "in.csv")
    frame.iloc[rows].to_csv(tmp_path / "in.csv")
    status, out, err = run(capsys, "--data", tmp_path / "in.csv", "--steps", "5")
    assert (status, err) == (0, "")
    assert "2 inputs (without the first column, which counts the rows)" in out
    frame.iloc[rows].set_index("a").to_csv(tmp_path / "in.csv", index_label="")  # its values do not count the rows
    assert "2 inputs\n" in run(capsys, "--data", tmp_path / "in.csv", "--steps", "5")[1]
    frame.iloc[rows].to_csv(tmp_path / "in.csv", index_label="id")  # a column with a name is a feature
    assert "3 inputs\n" in run(capsys, "--data", tmp_path / "in.csv", "--steps", "5")[1]


@pytest.mark.slow
def test_npz(capsys, tmp_path):
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(20, 3)), np.arange(20) % 2
    for arrays in ({"X": X, "y": y}, {"X": X.astype(np.float16), "label": y.astype(str), "ids": y}, {"f": X, "y": y}):
        np.savez(tmp_path / "in.npz", **arrays)
        status, out, err = run(capsys, "--data", tmp_path / "in.npz", "--steps", "5")
        assert (status, err) == (0, "")
        assert "20 examples × 3 inputs" in out


CSV = {
    "an empty file": (b"", "the file is empty"),
    "only blank lines": (b"\n\n\n", "the file is empty"),
    "a header alone": (b"a,b,label\n", "there are no rows below the header"),
    "no header": (b"1,2,0\n3,4,1\n", "the first line has to name the columns"),
    "no label column": (b"a,b\n1,2\n3,4\n", "which is the label column? there are a, b; say so with --label COLUMN"),
    "two label columns": (b"y,a,label\n1,2,0\n0,3,1\n", "several could be it: y, label"),
    "only a label": (b"label\n0\n1\n", "no column besides the label"),
    "a non-numeric column": (
        b"a,b,label\n1,2,0\n3,x,1\n",
        "'b' is not numeric: data row 2 (blank lines not counted) holds 'x'",
    ),
    "an empty cell": (b"a,b,label\n1,2,0\n3,,1\n", "NaN or an empty cell in column 'b', data row 2 (blank lines"),
    "a NaN cell": (b"a,b,label\n1,nan,0\n3,nan,1\n", "'b', data row 1 (blank lines not counted) (1 more such cells)"),
    "an infinite cell": (b"a,b,label\n1,2,0\ninf,4,1\n", "infinite or too large in column 'a', data row 2"),
    "a missing label": (
        b"a,b,label\n1,2,0\n3,4,\n5,6,1\n",
        "missing label: column 'label' is empty or NA in data row 2",
    ),
    "a label NA": (b"a,b,label\n1,2,0\n3,4,NA\n5,6,1\n", "column 'label' is empty or NA in data row 2"),
    "blank lines": (b"a,b,label\n\n1,2,0\n\n3,x,1\n", "data row 2 (blank lines not counted) holds 'x'"),
    "a huge integer": (b"a,b,label\n1,2,0\n3," + b"9" * 400 + b",1\n", "too large in column 'b', data row 2"),
    "a huge integer and an empty cell": (
        b"a,b,label\n1,,0\n3," + b"9" * 400 + b",1\n",
        "empty cell in column 'b', data",
    ),
    "huge labels": (
        b"a,label\n1," + b"9" * 400 + b"\n2,1\n",
        "the label: expected numbers, booleans or strings, got 9999",
    ),
    "two columns of one name": (b"a,a,label\n1,2,0\n3,4,1\n", "several columns have the same name: a\n"),
    "two label columns of one name": (b"label,label\n1,2\n3,4\n", "several columns have the same name: label\n"),
    "a newline in a name": (b'"a\nb",c,label\n1,2,0\nx,3,1\n', "column 'a b' is not numeric"),
    "one class": (b"a,b,label\n1,2,0\n3,4,0\n", "the label: expected two classes, got 1: 0; keep the rows of two"),
    "one boolean class": (b"a,b,label\n1,2,True\n3,4,True\n", "the label is constant: True"),
    "three classes": (
        b"a,b,label\n1,2,u\n3,4,v\n5,6,w\n",
        "got 3: 'u', 'v', 'w'; keep the rows of two classes or choose another --label\n",
    ),
    "a row too long": (b"a,b,label\n1,2,0\n3,4,1,9\n", "not a table with a header"),
    "every row too long": (b"a,b,label\n1,2,0,9\n3,4,1,9\n", "not a table with a header"),
    "a row too short": (b"a,label,b\n1,0,2\n3,1\n", "NaN or an empty cell in column 'b', data row 2"),
    "not text": (b"\xff\xfe\x00a,\x81\n", "not a table with a header"),
    **{
        f"a number of 1e{n} among small ones": (
            b"a,b,label\n" + b"1,2,0\n3,5,1\n" * 20 + f"4,1e{n},1\n".encode(),
            "too large to standardize; scale them first",
        )
        for n in (155, 160, 200, 300)
    },
    "numbers beyond all scale": (b"a,label\n1e308,0\n-1e308,1\n1.7e308,1\n", "too large to standardize"),
}


@pytest.mark.parametrize("case", CSV)
def test_bad_csv_is_one_clear_line_and_status_two(capsys, tmp_path, case):
    content, message = CSV[case]
    path = tmp_path / "in.csv"
    path.write_bytes(content)
    status, out, err = run(capsys, "--data", path)
    assert status == 2
    assert out == ""
    assert err.startswith(f"jaxgrad: error: {path}: ")
    assert message in err
    assert err.count("\n") == 1


def npz(**arrays):
    return lambda path: np.savez(path, **arrays)


def npy() -> bytes:
    file = io.BytesIO()
    np.save(file, X)
    return file.getvalue()


def zipped(path: Path, y: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("X.npy", npy())
        archive.writestr("y.npy", y)


X = np.ones((3, 2))
NPZ = {
    "not a zip": (lambda path: path.write_bytes(b"hello"), "not an NPZ file"),
    "empty": (lambda path: path.write_bytes(b""), "the file is empty"),
    "pickled": (npz(X=X, y=np.array([{}, 1, 2], object)), "not an NPZ file of plain arrays"),
    "one array": (lambda path: path.write_bytes(npy()), "not an NPZ file but a single array"),
    "another file in the zip": (lambda path: zipped(path, b"text"), "got (3, 2) and ()"),
    "cut off": (lambda path: zipped(path, npy()[:-5]), "not an NPZ file of plain arrays"),
    "a date missing": (
        npz(X=X, y=np.array(["2020", "2021", "NaT"], "M8[Y]")),
        "the label: expected two classes, got 1 NaT",
    ),
    "structured": (npz(X=X, y=np.zeros(3, [("u", int)])), "the label: expected numbers, booleans or strings, got"),
    "no label": (npz(X=X), "which is the label array? there are X"),
    "lengths": (npz(X=X, y=[0, 1]), "got (3, 2) and (2,)"),
    "rank": (npz(X=np.ones(3), y=[0, 1, 0]), "got (3,) and (3,)"),
    "text": (npz(X=X.astype(str), y=[0, 1, 0]), "X is not numeric"),
    "nan": (npz(X=np.where(np.eye(3, 2) == 1, np.nan, 1), y=[0, 1, 0]), "in column '1', row 1 (1 more such cells)"),
    "nan label": (npz(X=X, y=[0, 1, np.nan]), "missing label: y is NaN in row 3"),
    "constant": (npz(X=X, y=[1, 1, 1]), "got 1: 1"),
    "no columns": (npz(X=np.ones((3, 0)), y=[0, 1, 0]), "X is empty"),
    "no rows": (npz(X=np.ones((0, 3)), y=[]), "X is empty"),
    "which array": (npz(u=X, v=X, y=[0, 1, 0]), "which is the feature array? there are u, v"),
}


@pytest.mark.parametrize("case", NPZ)
def test_bad_npz_is_one_clear_line_and_status_two(capsys, tmp_path, case):
    make, message = NPZ[case]
    path = tmp_path / "in.npz"
    make(path)
    status, out, err = run(capsys, "--data", path)
    assert (status, out) == (2, "")
    assert err.startswith(f"jaxgrad: error: {path}: ")
    assert message in err
    assert err.count("\n") == 1


def test_bad_options_are_one_clear_line_and_status_two(capsys, tmp_path):
    table(tmp_path / "in.csv")
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "link.csv").symlink_to("in.csv")
    (tmp_path / "link.png").symlink_to("out.csv")
    for argv, message in [
        (["--data", tmp_path / "no.csv"], "no.csv: no such file"),
        (["--data", tmp_path], "not a file"),
        (["--data", tmp_path / "in.csv", "--label", "nope"], "there is no label column 'nope'; there are a, b, label"),
        (["--label", "a"], "no file was given"),
        (["--data", tmp_path / "in.csv", "--label", "a\nb"], "there is no label column 'a b'; there"),
        (["--data", tmp_path / "a\nb.csv"], "a b.csv: no such file"),
        (["a\nb"], "unrecognized arguments: a b"),
        (["--data", tmp_path / f"{'n' * 300}.csv"], "File name too long"),
        (["--save", tmp_path / f"{'n' * 300}.csv"], "cannot be written: File name too long"),
        (["--save", tmp_path / ("n" * 300) / "out.csv"], "cannot be written: File name too long"),
        (["--save", tmp_path / "folder.csv"], "cannot be written: it exists and is not a file"),
        (["--data", tmp_path / "in.csv", "--save", tmp_path / "in.csv"], "the same file as --data"),
        (["--data", tmp_path / "in.csv", "--save", tmp_path / "link.csv"], "link.csv: the same file as --data"),
        (["--save", tmp_path / "out.csv", "--plot", tmp_path / "link.png"], "link.png: the same file as --save"),
        (["--hidden", "0"], "expected a whole number from 1"),
        (["--hidden", "many"], "got 'many'"),
        (["--steps", "-1"], "expected a whole number from 0"),
        (["--activation", "sigmoidal"], "invalid choice: 'sigmoidal'"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["--save", tmp_path / "out.txt"], "expected a file name ending in .csv or .npz"),
        (["--save", tmp_path / "nowhere" / "out.csv"], "there is no folder"),
        (["--plot", tmp_path / "out.jpg"], "expected a file name ending in .png"),
    ]:
        status, out, err = run(capsys, *argv)
        assert (status, out) == (2, ""), argv
        assert err.startswith("jaxgrad: error: ")
        assert message in err
        assert err.count("\n") == 1
    (tmp_path / "in.txt").write_text("a")
    assert "expected a .csv or .npz file" in run(capsys, "--data", tmp_path / "in.txt")[2]


def test_a_missing_package_is_one_clear_line_and_status_two(capsys, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else real(name))
    status, _, err = run(capsys)
    assert (status, err) == (2, "jaxgrad: error: the main job needs scikit-learn; install it with jaxgrad[examples]\n")


def test_a_file_that_is_written_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "out.csv"
    target.write_text("before")

    def fails_half_way(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(data_module.InputError, match=r"out\.csv: cannot be written: No space left on device"):
        output._write_whole(target, fails_half_way)
    assert target.read_text() == "before"
    assert list(tmp_path.iterdir()) == [target]
    output._write_whole(target, lambda file: file.write(b"after"))
    assert target.read_text() == "after"
    umask = os.umask(0)
    os.umask(umask)
    assert target.stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_link_stays_and_its_file_is_written(tmp_path):
    link, target, long = tmp_path / "link.csv", tmp_path / "folder" / "out.csv", tmp_path / f"{'n' * 250}.csv"
    target.parent.mkdir()
    link.symlink_to(target)
    for path in (link, long):
        output.check_writable(path, output.TABLE_SUFFIXES, "--save")
        output._write_whole(path, lambda file: file.write(b"after"))
    assert link.is_symlink()
    assert (target.read_text(), long.read_text()) == ("after", "after")


@pytest.mark.slow
def test_labels_and_names_are_printed_as_they_are(capsys, tmp_path):
    path, saved = tmp_path / "x[bold].csv", tmp_path / "out[i].csv"
    for classes in (("[/]", "[red]"), (":smile:", "[red]")):
        table(path, classes=classes)
        status, out, err = run(capsys, "--data", path, "--steps", "5", "--seed", "1", "--save", saved)
        assert (status, err) == (0, "")
        assert "x[bold].csv: 40 examples" in out
        assert str(saved) in out
        assert any(label in out for label in classes)
        assert len(re.findall(r"example \d+ +(\[/\]|\[red\]|:smile:) ", out)) == 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "status", "message"),
    [
        ("{} --steps 1", 0, ""),
        ("PYTHONUNBUFFERED=1 {} --steps 1 >/dev/full", 2, "standard output: No space left on device"),
        ("{} --steps 1 | true", 2, "standard output: Broken pipe"),
        ("{} --help >/dev/full", 2, "standard output: No space left on device"),
        ("{} --steps none 2>/dev/full", 2, ""),
    ],
)
def test_any_kind_of_standard_output(command, status, message):
    root = Path(jaxgrad.__file__).parents[1]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        ["bash", "-c", f"{command.format(f'{sys.executable} -m jaxgrad')}; exit ${{PIPESTATUS[0]}}"],
        env=environment | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu", "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (status, f"jaxgrad: error: {message}\n" if message else "")
    if status == 0:
        assert "569 examples ? 30 inputs" in done.stdout


def test_help_names_every_option(capsys):
    status, out, _ = run(capsys, "--help")
    assert status == 0
    for option in ("data", "label", "hidden", "activation", "dtype", "steps", "seed", "save", "plot"):
        assert f"--{option}" in out


def test_the_data_is_standardized():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = data_module.load(None, None)
    assert loaded.X.shape == (569, 30)
    np.testing.assert_allclose(loaded.X.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(loaded.X.std(0), 1, rtol=1e-12)
    assert set(loaded.Y) == {-1.0, 1.0}
    assert set(loaded.labels[loaded.Y == -1]) == {"benign"}
