"""The embedded learned rewards: they distinguish right from wrong captions."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from bpgo_video.files import resolve_folder
from bpgo_video.rewards import Clips
from bpgo_video.rewards.text import ClipScore
from bpgo_video.rewards.tiny_rewards import LearnedMotion, ShapesOracle, oracle_scores
from bpgo_video.tiny import world as world

CLIP, MOTION = "package:bpgo_video.tiny/weights/clip", "package:bpgo_video.tiny/weights/motion"
VALUES = {"shape": list(world.SHAPES), "colour": list(world.COLOURS), "direction": list(world.DIRECTIONS)}


@pytest.fixture(scope="module")
def clip() -> ClipScore:
    return ClipScore(CLIP, frames=3)


@pytest.fixture(scope="module")
def motion() -> LearnedMotion:
    return LearnedMotion(MOTION)


def heldout_clips(repeats: int = 4) -> tuple[torch.Tensor, list[world.Caption]]:
    captions = [caption for caption in world.captions("heldout") if caption.is_clear] * repeats
    return world.render(world.sample_scenes(captions, torch.Generator().manual_seed(3))), captions


def with_wrong(captions: list[world.Caption], attribute: str, shift: int) -> list[str]:
    values = VALUES[attribute]
    index = [(values.index(getattr(caption, attribute)) + shift) % len(values) for caption in captions]
    return [dataclasses.replace(c, **{attribute: values[i]}).text for c, i in zip(captions, index, strict=True)]


def score(reward, videos: torch.Tensor, texts: list[str]) -> torch.Tensor:
    return reward(Clips(videos, 8.0, tuple(texts))).values


def area_under_curve(right: torch.Tensor, wrong: torch.Tensor) -> float:
    """Share of (right, wrong) pairs in which the right one scores higher."""
    return (right[:, None] > wrong[None]).float().mean().item()


def size_in_mib(folder: str) -> float:
    return sum(path.stat().st_size for path in resolve_folder(folder).rglob("*")) / 2**20


@pytest.mark.parametrize("attribute", ["shape", "colour"])
def test_clip_detects_a_wrong_shape_or_colour_on_heldout_clips(clip, attribute):
    videos, captions = heldout_clips()
    right = score(clip, videos, [caption.text for caption in captions]).mean(dim=1)
    for shift in range(1, len(VALUES[attribute])):
        wrong = score(clip, videos, with_wrong(captions, attribute, shift)).mean(dim=1)
        assert area_under_curve(right, wrong) > 0.95
        assert (right > wrong).float().mean() > 0.95


def test_motion_detects_a_wrong_direction_on_heldout_clips(motion):
    videos, captions = heldout_clips()
    right = score(motion, videos, [caption.text for caption in captions])[:, 0]
    for shift in (1, 2, 3):
        wrong = score(motion, videos, with_wrong(captions, "direction", shift))[:, 0]
        assert area_under_curve(right, wrong) > 0.97
    assert right.mean() > 0.7


def test_motion_accepts_any_direction_for_an_open_caption_but_no_still_video(motion):
    videos, captions = heldout_clips(1)
    open_texts = [dataclasses.replace(caption, direction=None).text for caption in captions]
    for direction in world.DIRECTIONS:
        moving = [caption.direction == direction for caption in captions]
        assert score(motion, videos, open_texts)[moving].mean() > 0.7
    still = videos[:, :1].expand_as(videos)
    jumping = videos[:, [4, 0, 8, 2, 6, 1, 7, 3, 5]]
    for wrong in (still, jumping):
        assert score(motion, wrong, open_texts).mean() < 0.3
        assert score(motion, wrong, [caption.text for caption in captions]).mean() < 0.3


def test_scores_decrease_gradually_with_the_quality_of_the_picture(clip, motion):
    """A reward that saturates on half-right pictures has no gradient for a policy."""
    videos, captions = heldout_clips()
    texts = [caption.text for caption in captions]
    other = world.sample_scenes(
        [dataclasses.replace(c, shape="circle" if c.shape == "triangle" else "triangle") for c in captions],
        torch.Generator().manual_seed(3),
    )
    blended = [torch.lerp(videos, world.render(other), share) for share in (0.0, 0.3, 0.6, 1.0)]
    means = torch.stack([score(clip, video, texts).mean() for video in blended])
    assert (means.diff() < -0.01).all()
    faded = [torch.lerp(videos, torch.full_like(videos, world.BACKGROUND), f) for f in (0.0, 0.5, 0.8)]
    assert (torch.stack([score(clip, video, texts).mean() for video in faded]).diff() < -0.01).all()
    slowed = [videos[:, [round(i * speed) for i in range(world.FRAMES)]] for speed in (1.0, 0.5, 0.25)]
    assert (torch.stack([score(motion, video, texts).mean() for video in slowed]).diff() < -0.03).all()


def test_wide_videos_are_cropped_in_the_middle_and_times_are_those_of_the_scored_frames(clip):
    assert clip(Clips(torch.rand(1, 9, 3, 64, 64), 8.0, ("a red object",))).times.tolist() == [0.0, 0.5, 1.0]
    videos, captions = heldout_clips(1)
    texts = [caption.text for caption in captions]
    margin = torch.rand(*videos.shape[:4], 20, generator=torch.Generator().manual_seed(0))
    wide = torch.cat([margin, videos, margin], dim=-1)
    torch.testing.assert_close(score(clip, wide, texts), score(clip, videos, texts), atol=0.05, rtol=0)
    torch.testing.assert_close(score(clip, videos, texts), score(ClipScore(CLIP), videos, texts)[:, [0, 4, 8]])


def test_gradients_of_learned_rewards_increase_them(clip, motion):
    videos, captions = heldout_clips(1)
    texts = [caption.text for caption in captions]
    noisy = (videos + 0.1 * torch.randn(videos.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    for reward in (clip, motion):
        pixels = noisy.clone().requires_grad_(True)
        before = score(reward, pixels, texts).mean()
        (gradient,) = torch.autograd.grad(before, pixels)
        after = score(reward, noisy + 0.5 * gradient / gradient.abs().max(), texts).mean()
        assert reward.differentiable
        assert after > before


def test_rewards_declare_their_kind_version_and_range(clip, motion):
    oracle = ShapesOracle()
    assert (clip.kind, motion.kind, oracle.kind) == ("real", "proxy", "test")
    for reward in (clip, motion, oracle):
        assert reward.higher_is_better
        assert len(reward.version) >= 8
    videos, captions = heldout_clips(1)
    texts = [caption.text for caption in captions]
    torch.testing.assert_close(score(oracle, videos, texts), oracle_scores(videos, texts))
    for reward in (clip, motion, oracle):
        scores = score(reward, videos, texts)
        assert reward.range[0] <= scores.min()
        assert scores.max() <= reward.range[1]


def test_the_version_follows_the_weights(motion, tmp_path: Path):
    folder = tmp_path / "motion"
    shutil.copytree(resolve_folder(MOTION), folder)
    assert LearnedMotion(str(folder)).version == motion.version
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert LearnedMotion(str(folder)).version != motion.version


def test_embedded_folders_are_small():
    assert size_in_mib(CLIP) <= 4
    assert size_in_mib(MOTION) <= 1
