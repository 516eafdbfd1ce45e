"""The notebooks: in the default suite that they name what there is, in the slow one that they run."""

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import cbq

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def code_of(notebook: Path) -> str:
    """Return the code cells of a notebook as one program."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


def test_there_are_notebooks():
    assert [path.name for path in NOTEBOOKS] == ["first_run.ipynb"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_compile_and_name_what_there_is(notebook):
    for node in ast.walk(ast.parse(code_of(notebook))):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert [each.name for each in node.names if not hasattr(module, each.name)] == []
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "cbq":
            assert hasattr(cbq, node.attr), node.attr


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_small_and_say_nothing_of_a_machine(notebook):
    assert notebook.stat().st_size < 300_000
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"] == []
    text = json.dumps([{**output, "data": {**output.get("data", {}), "image/png": ""}} for output in outputs])
    assert [prefix for prefix in ("/tmp/", "/work/", "/home/", "/root/", "site-packages") if prefix in text] == []


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_run_in_order(notebook, tmp_path):
    """As one program: Jupyter is not needed. What it leaves in the system's folder for temporary files goes here."""
    environment = os.environ | {"MPLBACKEND": "Agg", "TMPDIR": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), environment.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-c", code_of(notebook)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    (results, *_) = sorted(tmp_path.rglob("results.json"))
    assert json.loads(results.read_text(encoding="utf-8"))["status"] == "finished"
