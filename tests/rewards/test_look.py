"""How videos look: measures of pictures whose values are known."""

from __future__ import annotations

import pytest
import torch

from bpgo_video.rewards import Clips
from bpgo_video.rewards.look import LUMA, MEASURES, WATCHED, Look


def scores(measure: str, videos: torch.Tensor, frames: int | None = None) -> torch.Tensor:
    found = Look(measure, frames)(Clips(videos, 8.0, ("x",) * len(videos)))
    assert found.times is not None
    assert found.values.shape[1] == len(found.times)
    return found.values.double()


def plain(red: float, green: float, blue: float) -> torch.Tensor:
    return torch.tensor([red, green, blue]).view(1, 1, 3, 1, 1).expand(1, 3, 3, 4, 6)


@pytest.mark.parametrize(
    ("video", "brightness", "clipped", "saturation"),
    [
        (plain(0.0, 0.0, 0.0), 0.0, 0.0, 0.0),
        (plain(1.0, 1.0, 1.0), 1.0, 1.0, 0.0),
        (plain(1.0, 0.0, 0.0), LUMA[0], 0.0, 1.0),
        (plain(0.2, 0.6, 0.4), 0.2 * LUMA[0] + 0.6 * LUMA[1] + 0.4 * LUMA[2], 0.0, 0.4),
    ],
)
def test_pictures_of_one_colour(video: torch.Tensor, brightness: float, clipped: float, saturation: float) -> None:
    for measure, expected in zip(MEASURES, (brightness, clipped, saturation, 0.0), strict=True):
        assert scores(measure, video)[0].tolist() == pytest.approx([expected] * 3, abs=1e-6), measure


def test_half_black_and_half_white_frames() -> None:
    video = torch.zeros(2, 5, 3, 4, 6)
    video[1, :, :, :, :3] = 1.0
    for measure, expected in (("brightness", 0.5), ("clipped", 0.5), ("saturation", 0.0), ("contrast", 0.5)):
        found = scores(measure, video, frames=2)
        assert found[0].tolist() == [0.0, 0.0]
        assert found[1].tolist() == pytest.approx([expected] * 2), measure


def test_an_unknown_measure_is_refused_and_every_measure_is_watched() -> None:
    with pytest.raises(ValueError, match=r"measure is 'gloss'; it can be brightness, clipped"):
        Look("gloss")
    assert set(WATCHED) == {f"look/{measure}" for measure in MEASURES}
