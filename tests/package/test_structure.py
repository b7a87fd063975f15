"""The package's architecture: which folder may import which, and where DeepSpeed may be imported."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import bpgo_video

PACKAGE = Path(bpgo_video.__file__).parent
LAYERS = (  # a folder imports only folders before it
    *("tiny", "config", "distributed", "diffusion", "learner", "policies", "data", "rewards", "rollouts"),
    *("inference", "training", "evaluation", "commands"),
)
PURE = [path for folder in ("diffusion", "learner") for path in (PACKAGE / folder).glob("*.py")]
ALLOWED_IN_PURE = {"__future__", "collections", "dataclasses", "math", "typing", "torch", "jaxtyping", "bpgo_video"}
DEEPSPEED = {f"distributed/{name}.py" for name in ("engine", "launcher", "zero_files")}


def imports(path: Path) -> set[str]:
    """Dotted names of everything that a file imports, at any depth."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def ours(names: set[str]) -> set[str]:
    return {name.split(".")[1] for name in names if name.startswith("bpgo_video.")}


@pytest.mark.parametrize("path", sorted(PURE), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_pure_modules_import_only_torch_types_and_each_other(path: Path) -> None:
    found = imports(path)
    assert {module.split(".")[0] for module in found} <= ALLOWED_IN_PURE
    settings = {"config"} if path.parent.name == "learner" else set()  # the learner takes sections of recipes
    assert ours(found) <= {"types", "randomness", "diffusion", "learner"} | settings
    assert not any("distributed" in module for module in found), "pure functions do not communicate"


def test_deepspeed_is_imported_only_for_training_and_for_reading_its_files() -> None:
    roots = {path: {name.split(".")[0] for name in imports(path)} for path in PACKAGE.rglob("*.py")}
    assert {path.relative_to(PACKAGE).as_posix() for path, names in roots.items() if "deepspeed" in names} == DEEPSPEED


def test_every_folder_has_a_layer() -> None:
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(LAYERS)


@pytest.mark.parametrize("folder", LAYERS)
def test_a_folder_imports_only_lower_layers(folder: str) -> None:
    above = set(LAYERS[LAYERS.index(folder) + 1 :])
    found = {path: ours(imports(path)) & above for path in (PACKAGE / folder).rglob("*.py")}
    assert not {path: names for path, names in found.items() if names}


def test_top_level_modules_import_no_folder() -> None:
    found = {path.name: ours(imports(path)) & set(LAYERS) for path in PACKAGE.glob("*.py")}
    assert not {name: folders for name, folders in found.items() if folders}


def test_the_worker_side_runs_under_any_python_without_packages() -> None:
    path = PACKAGE / "worker_side" / "reward_worker.py"
    ast.parse(path.read_text(), feature_version=(3, 8))
    assert {name.split(".")[0] for name in imports(path)} - {"numpy"} <= sys.stdlib_module_names
