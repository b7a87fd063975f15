"""Warnings of the doctor about package versions and this machine."""

from __future__ import annotations

import shutil
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bpgo_video.config.bpgo import Config
from bpgo_video.policies import Policy
from bpgo_video.training import installation


@pytest.mark.parametrize(("sequence", "height", "tokens"), [(1, 64, None), (2, 64, "24"), (2, 512, None)])
def test_a_sequence_group_for_few_tokens_is_a_warning(
    recipe: Config, policy: Policy, sequence: int, height: int, tokens: str | None
) -> None:
    video = replace(recipe.video, num_frames=9, height=height, width=height)
    config = replace(recipe, video=video, parallel=replace(recipe.parallel, sequence=sequence))
    lines = list(installation.few_tokens(config, policy))
    assert [f"a rank computes {tokens} tokens" in line for line in lines] == ([True] if tokens else [])


def test_every_dependency_has_a_tested_version() -> None:
    tested = installation.tested_versions()
    assert tested["torch"] == "2.13.0"
    assert {"deepspeed", "PyYAML", "opencv-python-headless"} <= set(tested)
    assert not {"ruff", "pytest", "mypy"} & set(tested), "development tools do not affect runs"


@pytest.mark.parametrize(
    ("installed", "expected"),
    [
        ("2.13.0", []),
        ("2.13.0+cpu", []),
        ("2.14.1+cu130", ["torch 2.14.1 is installed; this release was tested with 2.13.0"]),
        (None, []),
    ],
)
def test_another_version_is_reported_but_not_another_build_of_the_same(
    installed: str | None, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if installed is None:
            raise PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(installation, "tested_versions", lambda: {"torch": "2.13.0"})
    monkeypatch.setattr(installation, "version", version)
    assert list(installation.other_versions()) == expected


@pytest.mark.parametrize(("threads", "ranks", "advice"), [(1, 2, []), (2, 2, ["1"]), (4, 1, ["2"])])
def test_more_threads_than_cores_are_reported(
    threads: int, ranks: int, advice: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installation, "available_cores", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setenv("LOCAL_SIZE", str(ranks))
    warnings = list(installation.crowded_cores())
    assert [line.rpartition("OMP_NUM_THREADS=")[2] for line in warnings] == advice


@pytest.mark.parametrize(
    ("free", "decay", "fits"), [(36, 0.0, True), (35, 0.0, False), (48, 0.9, True), (47, 0.9, False)]
)
def test_a_disk_too_small_for_three_checkpoints_is_reported(
    free: int, decay: float, fits: bool, recipe: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a billion trained weights with fp32 moments and average; two checkpoints are kept while one is written."""
    run = replace(recipe.run, dir=str(tmp_path / "not" / "there yet"), keep_checkpoints=2)
    config = replace(recipe, run=run, ema=replace(recipe.ema, decay=decay))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free * 10**9))
    assert (list(installation.small_disk(config, 10**9)) == []) is fits


@pytest.mark.parametrize("home", [None, "/nonexistent/home"])
def test_an_unwritable_home_is_reported(home: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME") if home is None else monkeypatch.setenv("HOME", home)
    assert [line.partition(" cannot be written")[0] for line in installation.missing_home()] == [f"HOME ({home})"]
