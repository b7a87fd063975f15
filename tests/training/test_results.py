"""What a run leaves and tells of its held-out videos."""

from __future__ import annotations

import torch

from bpgo_video.rewards import FrameScores
from bpgo_video.training.heldout import HeldoutScores
from bpgo_video.training.results import caption


def test_a_caption_has_the_scores_of_the_video_that_is_shown() -> None:
    """The first sample of the prompt's row; of a reward that scores frames, also each frame."""
    by_name = {"oracle": torch.tensor([[0.1, 0.9], [0.25, 0.75]]), "frames": torch.tensor([[0.0, 0.0], [0.5, 0.0]])}
    scores = HeldoutScores(by_name, {"frames": FrameScores(torch.tensor([[0.0, 0.0], [0.4, 0.6]]), torch.arange(2.0))})
    assert caption("a cat", 1, scores) == "a cat | oracle: 0.25 | frames: 0.5 (0.4 0.6)"
