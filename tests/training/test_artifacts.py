"""Captions, summary and statistical test of the held-out videos."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bpgo_video.config.bpgo import Config
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.rewards import FrameScores
from bpgo_video.training.heldout import HeldoutScores, caption, heldout_test
from bpgo_video.training.rl import Progress, summarise
from bpgo_video.training.session import Session


def test_a_caption_has_the_scores_of_its_video() -> None:
    """The first sample of the prompt; for a reward that scores frames, also the score of each frame."""
    by_name = {"oracle": torch.tensor([[0.1, 0.9], [0.25, 0.75]]), "frames": torch.tensor([[0.0, 0.0], [0.5, 0.0]])}
    scores = HeldoutScores(by_name, {"frames": FrameScores(torch.tensor([[0.0, 0.0], [0.4, 0.6]]), torch.arange(2.0))})
    assert caption("a cat", 1, scores) == "a cat | oracle: 0.25 | frames: 0.5 (0.4 0.6)"


@pytest.mark.parametrize(("samples", "known"), [(1, False), (2, True)])
def test_a_summary_has_standard_errors_where_they_are_defined(recipe: Config, samples: int, known: bool) -> None:
    """A single held-out video has none, and the summary is still valid JSON."""
    session = object.__new__(Session)
    parts: dict[str, Any] = {
        "config": recipe,
        "mesh": Mesh(0, 1, torch.device("cpu")),
        "engine": SimpleNamespace(stage=3),
    }
    for name, part in parts.items():
        object.__setattr__(session, name, part)
    scores = torch.linspace(0.25, 0.75, samples)[None]
    progress = Progress(heldout_before={"oracle": scores.tolist()})
    found = summarise(session, progress, HeldoutScores({"oracle": scores + 0.1 * scores.square()}))
    json.dumps(found, allow_nan=False)
    assert (found["heldout_interval"], found["heldout_shown"], found["heldout_prompts"]) == (None, 0, 1)
    errors = {key for key in found if key.endswith("_stderr")}
    assert errors == ({f"heldout_{when}_stderr" for when in ("before", "after", "difference")} if known else set())


@pytest.mark.parametrize(("prompts", "gain", "shown"), [(6, 1.0, 0), (12, 1.0, 1), (12, -1.0, -1), (12, 0.0, 0)])
def test_the_claim_of_a_run_is_corrected_for_all_measures(
    recipe: Config, prompts: int, gain: float, shown: int
) -> None:
    """If all 6 prompts gain, p is 2 / 2^6, which is below .05 for one measure but not for several."""
    first = torch.randn(prompts, 2, generator=torch.Generator().manual_seed(0))
    found = heldout_test(first, first + gain, recipe)
    assert found["heldout_measures"] > 1
    assert found["heldout_shown"] == shown
    low, high = found["heldout_interval"]
    assert low <= gain <= high
