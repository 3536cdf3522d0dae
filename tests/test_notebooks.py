"""Each notebook runs from top to bottom, and what is committed is what such a run shows."""

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
    """What a cell put out, without the numbers: the streams by name, the results by their media types."""
    return {(o.output_type, o.get("name", ""), *sorted(o.get("data", {}))) for o in cell.outputs}


@each_notebook
def test_runs_from_top_to_bottom_and_puts_out_what_is_committed(path, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))  # nobody's own start-up files
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


def test_there_are_notebooks():
    assert NOTEBOOKS
