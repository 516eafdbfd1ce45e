"""The shape of the code: layers, third-party fences, file sizes."""

import ast
import warnings
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "cbq"
MODULES = sorted(SOURCE.rglob("*.py"))

# A module imports its own package and lower rows; never sideways, never up.
ROWS = (
    {"errors", "durable", "hashes", "attributes", "__init__"},
    {"hub"},
    {"quant", "models", "data", "streams", "devices"},
    {"activations", "quantized", "method", "placement"},
    {"preprocess", "reconstruction", "evaluation", "export"},
    {"checkpoint", "state", "exporter", "tracking", "cost", "results", "run_folder", "report", "analysis"},
    {"runner", "evaluator", "analyzer", "api", "export_checkpoint", "generate"},
    {"cli"},
    {"__main__"},
)
# Inside the row of what a run leaves behind, these serve the others.
SERVES_ITS_ROW = {"cost", "results"}
FENCES = {
    "hydra": {"cli"},
    "wandb": {"tracking"},
    "transformers": {"models"},
    "compressed_tensors": {"export"},
    "datasets": {"data"},
    "lm_eval": {"evaluation"},
    "matplotlib": {"analysis"},
    "pandas": {"report"},
    "huggingface_hub": {"hub"},
}


def unit(module: Path) -> str:
    """Return the name of a module's package below cbq, or its own."""
    parts = module.relative_to(SOURCE).with_suffix("").parts
    return parts[0]


def row(name: str) -> int:
    """Return the number of a unit's row."""
    return next(number for number, units in enumerate(ROWS) if name in units)


def imports(module: Path) -> set[str]:
    """Return every absolute module name that a module imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            names.add(node.module)
    return names


def test_every_unit_has_a_row():
    assert {unit(module) for module in MODULES} <= set.union(*ROWS)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: str(module.relative_to(SOURCE)))
def test_module_keeps_to_its_layer(module):
    here = unit(module)
    if here == "__init__":  # the public face imports what it hands out
        return
    for name in imports(module):
        if not name.startswith("cbq."):
            continue
        there = name.split(".")[1]
        allowed = there == here or row(there) < row(here) or (there in SERVES_ITS_ROW and row(there) == row(here))
        assert allowed, f"{here} must not import {there}"


@pytest.mark.parametrize(("package", "units"), FENCES.items())
def test_one_door_to_each_library(package, units):
    users = {unit(module) for module in MODULES if any(name.split(".")[0] == package for name in imports(module))}
    assert users == units


def test_no_module_is_long():
    lengths = {str(module.relative_to(SOURCE)): len(module.read_text().splitlines()) for module in MODULES}
    assert {name: length for name, length in lengths.items() if length > 300} == {}


def test_datasets_never_goes_online_for_a_local_file():
    # load_dataset asks the network even for a local file.
    assert [str(module) for module in MODULES if "load_dataset(" in module.read_text()] == []


@pytest.mark.parametrize("module", MODULES, ids=lambda module: str(module.relative_to(SOURCE)))
def test_module_compiles_without_a_warning(module):
    """Python 3.12 prints what 3.11 keeps to itself: an escape such as \\\\. in a docstring that is not raw."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compile(module.read_text(encoding="utf-8"), str(module), "exec")
