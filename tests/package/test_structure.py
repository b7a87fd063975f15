"""The package's architecture: which folder may import which, and where DeepSpeed may be imported."""

from __future__ import annotations

import ast
import sys
from functools import cache
from pathlib import Path

import pytest

import bpgo_video

PACKAGE = Path(bpgo_video.__file__).parent
LAYERS = (  # a folder imports only folders before it
    *("tiny", "config", "distributed", "diffusion", "learner", "policies", "data", "rewards", "rollouts"),
    *("inference", "planning", "training", "evaluation", "study", "commands"),
)
OWN = {"bpgo_video", "tests", "tools"}
PURE = [path for folder in ("diffusion", "learner") for path in (PACKAGE / folder).glob("*.py")]
ALLOWED_IN_PURE = {"__future__", "collections", "dataclasses", "math", "typing", "torch", "jaxtyping", "bpgo_video"}
DEEPSPEED = {
    f"distributed/{name}.py"
    for name in ("engine", "gathering", "launcher", "process_group", "sharded_build", "zero_files")
}


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
    assert {name.split(".")[0] for name in imports(path)} - {"numpy", "PIL"} <= sys.stdlib_module_names
    for script in (path, *(PACKAGE / "rewards" / "workers").glob("*.py")):
        ast.parse(script.read_text(), feature_version=(3, 8))


def test_every_name_that_a_worker_or_a_tool_imports_exists() -> None:
    """Workers and tools are imported by other processes alone, and mypy does not read them."""
    root, missing = Path(__file__).parents[2], []
    for path in [*root.glob("tests/**/*.py"), *root.glob("tools/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in OWN:
                names = {alias.name for alias in node.names} - top_level_names(root, node.module)
                missing += [f"{path.relative_to(root)}: {node.module}.{name}" for name in sorted(names)]
    assert not missing


@cache
def top_level_names(root: Path, module: str) -> frozenset[str]:
    """What can be imported from a module or package of this project."""
    path = root.joinpath(*module.split("."))
    names = {one.stem for one in path.glob("*")} if path.is_dir() else set()
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.walk(ast.parse(path.read_text())) if path.is_file() else ():
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return frozenset(names)
