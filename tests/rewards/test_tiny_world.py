"""The synthetic world of moving shapes: captions, rendering, and oracle."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bpgo_video.rewards.tiny_rewards import oracle_parts, oracle_scores
from bpgo_video.tiny import world as world

RED_CIRCLE_LEFT = world.Caption("circle", "red", "left")


def clip(captions: list[world.Caption], seed: int = 0) -> torch.Tensor:
    return world.render(world.sample_scenes(captions, torch.Generator().manual_seed(seed)))


def test_captions_are_parsed_back_and_split_in_half():
    captions = world.all_captions()
    assert len({caption.text for caption in captions}) == len(captions)
    assert [world.Caption.parse(caption.text) for caption in captions] == captions
    train, heldout = world.captions("train"), world.captions("heldout")
    assert not set(train) & set(heldout)
    assert len(train) + len(heldout) == len(captions)
    for split in (train, heldout):
        assert 0.4 <= sum(caption.is_clear for caption in split) / len(split) <= 0.6
    with pytest.raises(ValueError, match="purple"):
        world.Caption.parse("a purple circle moving left")


def test_coverage_has_the_area_of_the_circle():
    radius = torch.tensor(8.0)
    for shape in range(len(world.SHAPES)):
        area = world.coverage(torch.tensor(shape), torch.tensor([32.0, 30.0]), radius).sum()
        assert area == pytest.approx(torch.pi * 64, rel=0.03)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_oracle_accepts_every_completion_on_ground_truth(split):
    captions = world.captions(split) * 4
    scores = oracle_scores(clip(captions), [caption.text for caption in captions])
    assert scores.shape == (len(captions), world.FRAMES)
    assert scores.mean() > 0.99
    assert scores.mean(dim=1).min() > 0.9


@pytest.mark.parametrize(
    ("attribute", "part", "wrong"),
    [
        ("shape", "shape", ("square", "triangle")),
        ("colour", "colour", ("green", "blue", "yellow")),
        ("direction", "motion", ("right", "up", "down")),
    ],
)
def test_oracle_scores_a_wrong_attribute_near_zero_in_its_own_part(attribute, part, wrong):
    for value in wrong:
        shown = dataclasses.replace(RED_CIRCLE_LEFT, **{attribute: value})
        for pair in ((shown, RED_CIRCLE_LEFT), (RED_CIRCLE_LEFT, shown)):
            parts = oracle_parts(clip([pair[0]] * 8), [pair[1].text] * 8)
            right = [scores.mean() for name, scores in parts.items() if name != part]
            assert parts[part].max() < 0.05
            assert min(right) > 0.95


def test_oracle_is_near_zero_on_frames_without_a_moving_object():
    video = clip([RED_CIRCLE_LEFT])
    failures = {
        "empty": torch.full_like(video, world.BACKGROUND),
        "black": torch.zeros_like(video),
        "white": torch.ones_like(video),
        "noise": torch.rand(video.shape, generator=torch.Generator().manual_seed(0)),
        "static": video[:, :1].expand_as(video),
        "backwards": video.flip(1),
        "shuffled": video[:, [4, 0, 8, 2, 6, 1, 7, 3, 5]],
        "faded": world.BACKGROUND + (video - world.BACKGROUND) * 0.3,
        "full red": torch.tensor(world.COLOURS["red"])[:, None, None].expand_as(video),
        "two things": torch.maximum(video, video.roll(25, dims=-2)),
    }
    for name, failure in failures.items():
        for text in (RED_CIRCLE_LEFT.text, "a red object", "a shape moving left"):
            scores = oracle_scores(failure, [text])
            assert scores.isfinite().all(), name
            assert (name, text) == ("backwards", "a red object") or scores.mean() < 0.25, (name, text)


def test_an_open_attribute_takes_one_value_for_the_whole_clip():
    generator = torch.Generator().manual_seed(1)
    scene = world.sample_scenes([world.Caption("circle", "red", "left")], generator)
    red = world.render(scene)
    green = world.render(dataclasses.replace(scene, colours=torch.tensor([1])))
    half = torch.cat([red[:, :5], green[:, 5:]], dim=1)
    assert oracle_scores(red, ["a circle moving left"]).mean() > 0.98
    assert oracle_scores(half, ["a circle moving left"]).mean() < 0.6


def test_scores_fall_with_sideways_drift_and_with_too_little_speed():
    def moving(x_speed: float, y_speed: float) -> float:
        steps = torch.arange(world.FRAMES)
        centres = torch.stack([44 - x_speed * steps, 30 + y_speed * steps], dim=-1)[None]
        one = torch.zeros(1, dtype=torch.long)
        video = world.render(world.Scenes(one, one, one, centres, torch.tensor([8.0])))
        return oracle_scores(video, [RED_CIRCLE_LEFT.text]).mean().item()

    assert moving(2.0, 0.0) > 0.98
    assert moving(2.0, 0.0) > moving(2.0, 0.8) > moving(2.0, 1.2) > moving(2.0, 2.0) == 0.0
    assert moving(2.0, 0.0) > moving(0.7, 0.0) > moving(0.2, 0.0) == 0.0


def test_oracle_refuses_different_counts_and_single_frames():
    video = clip([RED_CIRCLE_LEFT])
    with pytest.raises(ValueError, match="2 texts"):
        oracle_scores(video, ["a red object"] * 2)
    with pytest.raises(ValueError, match="two frames"):
        oracle_scores(video[:, :1], ["a red object"])
