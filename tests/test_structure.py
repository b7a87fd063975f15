"""The architecture, as facts: which module may import which, and that DeepSpeed stays in one file."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import bpgo_video

PACKAGE = Path(bpgo_video.__file__).parent
PURE = (
    *("sde", "steps", "losses", "schedule"),
    *("advantages", "bpgo", "bpgo_forms", "bpgo_metrics", "bpgo_settings"),
    *("credit", "reliability", "rescoring", "running_priors", "shrinkage", "trust"),
)
ALLOWED_IN_PURE = {"__future__", "collections", "dataclasses", "math", "typing", "torch", "jaxtyping", "bpgo_video"}
TOP = {"trainer", "session", "engine", "checkpoint", "export", "metrics", "report"}


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


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_import_torch_types_and_each_other_only(name: str) -> None:
    found = imports(PACKAGE / f"{name}.py")
    assert {module.split(".")[0] for module in found} <= ALLOWED_IN_PURE
    assert ours(found) <= {"types", *PURE}
    assert not any("distributed" in module for module in found), "pure functions do not communicate"


def test_deepspeed_is_imported_where_it_trains_and_where_its_files_are_read_alone() -> None:
    roots = {path: {name.split(".")[0] for name in imports(path)} for path in PACKAGE.rglob("*.py")}
    found = {str(path.relative_to(PACKAGE)) for path, names in roots.items() if "deepspeed" in names}
    assert found == {"engine.py", "zero_files.py", "universal.py"}


@pytest.mark.parametrize("folder", ["policies", "rewards", "data", "parallel", "tiny"])
def test_lower_layers_do_not_import_the_loop(folder: str) -> None:
    for path in (PACKAGE / folder).rglob("*.py"):
        assert not ours(imports(path)) & (TOP | {"rollout", "replay"}), path


def test_the_worker_side_runs_under_any_python_without_packages() -> None:
    path = PACKAGE / "worker_side" / "reward_worker.py"
    ast.parse(path.read_text(), feature_version=(3, 8))
    assert {name.split(".")[0] for name in imports(path)} - {"numpy"} <= sys.stdlib_module_names
