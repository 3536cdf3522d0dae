"""Each notebook runs from top to bottom, and its committed outputs are those of such a run."""

import os
import shutil
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

# The results that a notebook prints as "name: number" lines in its last cell, and the bounds of each.
HEADLINES = {
    "05_influence_and_curvature": {
        "table, AUC of loss": (0.97, 1),
        "table, AUC of averaged loss": (0.97, 1),
        "table, AUC of gradient norm": (0.97, 1),
        "table, AUC of GraNd": (0.97, 1),
        "table, AUC of self-influence": (0.96, 1),
        "table, found in the first 5 % by GraNd": (0.8, 1),
        "digits, AUC of loss": (0.97, 1),
        "digits, AUC of averaged loss": (0.98, 1),
        "digits, AUC of gradient norm": (0.97, 1),
        "digits, AUC of GraNd": (0.98, 1),
        "digits, AUC of self-influence": (0.97, 1),
        "digits, found in the first 5 % by GraNd": (0.85, 1),
        "digits memorised, AUC of loss": (0.95, 0.99),
        "digits memorised, AUC of self-influence": (0.96, 1),
        "digits memorised, AUC of GraNd": (0.98, 1),
        "influence on the test set, AUC for flipped labels": (0.97, 1),
        "influence, one left out: rank correlation with training again": (0.95, 1),
        "influence, twenty left out: rank correlation with training again": (0.9, 1),
        "NTK at step 0, cosine within a class less that between": (0.16, 0.22),
        "NTK at step 600, cosine within a class less that between": (0.26, 0.36),
        "NTK, largest eigenvalue: last over first": (2.5, 4),
        "noise scale, before training": (45, 56),
        "noise scale, mean of the last five": (800, 3500),
        "noise scale, batches averaged over all data, median": (0.6, 1.6),
        "SGD, steps to a loss of 0.01": (40, 150),
        "Adam, steps to a loss of 0.01": (120, 450),
        "Fisher, steps to a loss of 0.01": (4, 31),  # 30 at damping 0.01; less at 0.001, where the loss jumps
        "Gauss-Newton, steps to a loss of 0.01": (4, 15),
    },
    # Training is deterministic up to rounding. The bounds of an LDS are the number ± three standard errors over random
    # halves: 0.013 for the lowest, 0.0045 for the highest. That of a correlation r of n changes is (1 - r²)/√n; here n
    # is 30 and 24. A correlation of TracIn outside of its narrower bounds would make the notebook's words wrong.
    "06_data_attribution": {
        "MLP, LDS of TracIn": (0.28, 0.36),
        "MLP, LDS of EK-FAC": (0.66, 0.74),
        "MLP, LDS of Gauss-Newton": (0.785, 0.82),
        "MLP, one left out, smallest correlation of influence": (0.76, 1),
        "MLP, one left out, smallest correlation of TracIn": (0.2, 0.6),
        "bytes, LDS of TracIn": (0.28, 0.36),
        "bytes, LDS of TRAK, exact": (0.66, 0.735),
        "bytes, LDS of EK-FAC": (0.66, 0.74),
        "bytes, LDS of Gauss-Newton": (0.785, 0.82),
        "bytes, LDS of TRAK, 64": (0.365, 0.445),
        "bytes, LDS of TRAK, 128": (0.435, 0.515),
        "bytes, LDS of TRAK, 256": (0.535, 0.615),
        "bytes, LDS of TRAK, 512": (0.59, 0.67),
        "bytes, LDS of LoGra, 4": (0.32, 0.4),
        "bytes, LDS of LoGra, 8": (0.445, 0.525),
        "bytes, LDS of LoGra, 16": (0.555, 0.635),
        "texts, one left out, correlation": (0.74, 1),
    },
}

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


class ThisInterpreter(KernelSpecManager):
    """Finds one kernel, python3: the interpreter that runs the tests, whatever else is installed."""

    def get_kernel_spec(self, kernel_name):
        assert kernel_name == "python3"
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=argv, display_name="Python 3", language="python")


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell):
    """The kinds of a cell's outputs, without the numbers: streams by name, results by media types."""
    return {(o.output_type, o.get("name", ""), *sorted(o.get("data", {}))) for o in cell.outputs}


def headlines(notebook):
    """The numbers of its last code cell, by name."""
    lines = code_cells(notebook)[-1].outputs[0].text.splitlines()
    return {name: float(number) for name, number in (line.rsplit(": ", 1) for line in lines)}


def assert_headlines_hold(notebook, stem):
    if stem not in HEADLINES:
        return
    bounds, found = HEADLINES[stem], headlines(notebook)
    assert found.keys() == bounds.keys()
    assert not {name: value for name, value in found.items() if not bounds[name][0] <= value <= bounds[name][1]}


@pytest.mark.slow
@each_notebook
def test_runs_from_top_to_bottom_with_the_committed_kinds_of_output(path, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))  # without a user's start-up files
    monkeypatch.delenv("MPLBACKEND", raising=False)  # figures belong in the notebook
    copy = shutil.copy(path, tmp_path)
    notebook, committed = nbformat.read(copy, as_version=4), nbformat.read(path, as_version=4)
    for cell in code_cells(notebook):
        cell.outputs = []
    kernel = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=ThisInterpreter())
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, km=kernel, kernel_name="python3", timeout=600, resources=resources).execute(
        cleanup_kc=True
    )
    for ran, kept in zip(code_cells(notebook), code_cells(committed), strict=True):
        assert kinds(ran) == kinds(kept), ran.source
    assert_headlines_hold(notebook, path.stem)


@each_notebook
def test_is_committed_with_the_outputs_of_one_run_without_errors_or_warnings(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(cell.outputs for cell in cells), [cell.source for cell in cells if not cell.outputs]
    for cell in cells:
        for output in cell.outputs:
            assert output.output_type != "error", output.evalue
            assert output.get("name") != "stderr", output.text
    assert notebook.metadata.kernelspec.name == "python3"
    assert_headlines_hold(notebook, path.stem)


def test_there_are_notebooks():
    assert NOTEBOOKS
