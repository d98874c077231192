"""examples/quickstart.ipynb: what it shows is run, cell by cell, in a kernel of its own."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import jupyter_client
import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples/quickstart.ipynb"


def test_it_is_committed_without_outputs() -> None:
    """Nobody's pictures, paths and times are in it, and a change of a cell is all that a difference shows."""
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")] == []
    nbformat.validate(nbformat.read(NOTEBOOK, 4))


# Its functions are tested one by one: tests/commands/test_generate.py, test_preview.py, test_evaluate.py.
@pytest.mark.slow
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a Ray of its own. Cells show pictures, the output with its model's name, and tables."""
    shutil.copytree(ROOT / "manifests", tmp_path / "manifests")
    (tmp_path / "examples").mkdir()
    variables = {"RAY_ADDRESS": "local", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    notebook: Any = nbformat.read(NOTEBOOK, 4)
    # Pipes, as ports of the machine are anyone's.
    manager = jupyter_client.AsyncKernelManager(transport="ipc", ip=os.fspath(tmp_path / "kernel"))
    folder = {"metadata": {"path": str(tmp_path / "examples")}}
    nbclient.NotebookClient(notebook, km=manager, timeout=300, resources=folder).execute()
    shown = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in data for data in shown) == 4
    pages = "".join(data["text/html"] for data in shown if "text/html" in data)
    assert "finished, 16 of 16 rows" in pages and "tiny (embedded test model)" in pages
    assert any("text only" in data.get("text/markdown", "") for data in shown)
    assert not [
        output for cell in notebook.cells for output in cell.get("outputs", ()) if output.output_type == "error"
    ]
