"""Notes of an estimation that was broken off come back; those of other settings, and half a line, do not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bpgo_video.data.priors import UnfinishedPriors
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.training import prior_estimation
from bpgo_video.types import PromptBatch
from tests.made.recipes import PROMPTS, make_shards, small_recipe

FIRST, SECOND = {7: {"clip": [0.25, 0.5]}}, {9: {"clip": [0.1, 0.3]}}


def test_notes_come_back_and_a_cut_line_does_not(tmp_path: Path) -> None:
    notes = UnfinishedPriors(tmp_path, {"seed": "0"})
    assert notes.begin() == {}
    notes.add(FIRST)
    notes.add(SECOND)
    notes.path.write_text(notes.path.read_text() + '{"id": 11, "sco')
    assert UnfinishedPriors(tmp_path, {"seed": "0"}).begin() == FIRST | SECOND
    notes.add({11: {"clip": [0.2]}})
    assert notes.begin() == FIRST | SECOND | {11: {"clip": [0.2]}}
    notes.remove()
    assert notes.begin() == {}


def test_notes_of_other_settings_are_replaced(tmp_path: Path) -> None:
    UnfinishedPriors(tmp_path, {"seed": "0"}).begin()
    UnfinishedPriors(tmp_path, {"seed": "0"}).add(FIRST)
    other = UnfinishedPriors(tmp_path, {"seed": "1"})
    assert other.begin() == {}
    other.add(SECOND)
    assert other.begin() == SECOND
    assert UnfinishedPriors(tmp_path, {"seed": "0"}).begin() == {}


def test_a_broken_estimation_goes_on_to_the_same_priors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = make_shards(tmp_path / "shards")
    config = small_recipe(tmp_path / "run", shards, prior={"kind": "reference", "samples": 2})
    mesh, score, sampled = Mesh(0, 1, torch.device("cpu")), prior_estimation.score_prompts, []

    def until_the_third(*arguments: object) -> object:
        prompts = arguments[2]
        assert isinstance(prompts, PromptBatch)
        sampled.extend(prompts.ids.tolist())
        if len(sampled) == 3:
            raise KeyboardInterrupt
        return score(*arguments)

    whole = prior_estimation.estimate(config, mesh)
    files = {path: path.read_bytes() for path in (shards / "priors").glob("*.json")}
    assert len(files) == len(config.rewards)
    for path in files:
        path.unlink()
    monkeypatch.setattr(prior_estimation, "PROMPTS_AT_ONCE", 1)
    monkeypatch.setattr(prior_estimation, "score_prompts", until_the_third)
    with pytest.raises(KeyboardInterrupt):
        prior_estimation.estimate(config, mesh)
    again = prior_estimation.estimate(config, mesh)
    assert len(sampled) == len(PROMPTS["train"]) + 1, "what was broken off is sampled again, and nothing else"
    for name, scores in whole.items():
        torch.testing.assert_close(again[name], scores, rtol=0, atol=1e-5)  # batches of another shape
    assert {path.name for path in (shards / "priors").iterdir()} == {path.name for path in files}
