"""The doctor's verdict on the ratios of a replay."""

from __future__ import annotations

from unittest.mock import Mock, PropertyMock, patch

import pytest
import torch

from bpgo_video.config.bpgo import Config
from bpgo_video.training.doctor import Examination, ratio_is_one
from bpgo_video.training.loop import Stopwatch
from bpgo_video.training.session import Session
from bpgo_video.types import Loss, PromptBatch, Trajectory


@pytest.mark.parametrize(
    ("lowest", "highest", "holds", "words"),
    [
        (1.0, 1.0, True, "exactly 1"),
        (1 - 5e-5, 1 + 1e-6, True, "well inside"),
        (1.0, 1 + 5e-4, False, "off 1 by up to 0.0005"),
        (float("nan"), float("nan"), False, "off 1 by up to nan"),
    ],
)
def test_a_ratio_is_judged_by_the_clip_range_and_nan_fails(
    recipe: Config, lowest: float, highest: float, holds: bool, words: str
) -> None:
    exact, seen = ({"ratio_min": torch.tensor(low), "ratio_max": torch.tensor(high)} for low, high in
                   ((1.0, 1.0), (lowest, highest)))  # fmt: skip
    objective = Mock()
    objective.passes.return_value = (0, 1, 2)
    objective.loss.side_effect = [Loss(torch.zeros(()), metrics) for metrics in (exact, seen, exact)]
    session = Mock(spec=Session, config=recipe)
    examination = Examination(session, Mock(spec=PromptBatch), Mock(spec=Stopwatch), [Mock(spec=Trajectory)])
    with patch.object(Examination, "objective", PropertyMock(return_value=objective)):
        held, explanation = ratio_is_one(examination)
    assert held is holds
    assert words in explanation
