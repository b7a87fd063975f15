"""Sizes of reward models in plans: published networks, local folders, own classes, and those that nothing states."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from bpgo_video.commands import plan as command
from bpgo_video.config.bpgo import Config, RewardConfig
from bpgo_video.planning.rewards import RewardSize, reward_size
from bpgo_video.rewards.base import RewardModel
from bpgo_video.weights import headers
from tests.made.recipes import RECIPE, ROOT

CLIP = "package:bpgo_video.tiny/weights/clip"


class Sized(RewardModel):
    gigabytes, tera_operations = 3.0, 0.5


class Unsized(RewardModel):
    pass


def size_of(recipe: Config, *rewards: RewardConfig, heldout: tuple[RewardConfig, ...] = ()) -> RewardSize:
    """Of the recipe with these rewards only, for videos of 81 frames at 16 a second."""
    trained, evaluated = (
        {f"{name}{i}": one for i, one in enumerate(some)} for name, some in (("r", rewards), ("h", heldout))
    )
    video = replace(recipe.video, num_frames=81, fps=16.0)
    evaluation = replace(recipe.evaluation, rewards=evaluated)
    return reward_size(replace(recipe, video=video, rewards=trained, evaluation=evaluation))


def test_a_published_network_counts_once_however_many_rewards_use_it(recipe: Config) -> None:
    pick = RewardConfig("pickscore", options={"frames": 8})
    assert size_of(recipe, pick) == RewardSize(3_944_000_000, 0, operations=8 * 335e9)
    assert size_of(recipe, pick, pick).resting == size_of(recipe, pick).resting
    assert size_of(recipe, pick, pick).operations == 2 * 8 * 335e9
    assert size_of(recipe, heldout=(pick,)) == RewardSize(3_944_000_000, 0)
    half = RewardConfig("pickscore", options={"frames": 8, "dtype": "bfloat16"})
    assert size_of(recipe, half) == RewardSize(1_972_000_000, 0, half_operations=8 * 335e9)
    align = RewardConfig("videoalign", options={"template": "none", "dtype": "bfloat16"})
    assert size_of(recipe, align).half_operations == 11 * 1100e9, "two of sixteen frames a second"


def test_weights_are_offloaded_if_every_reward_that_uses_them_offloads(recipe: Config) -> None:
    stays = RewardConfig("pickscore")
    goes = replace(stays, offload=True)
    for rewards, offloaded in (((goes, goes), True), ((goes, stays), False), ((stays, goes), False)):
        found = size_of(recipe, *rewards)
        assert (found.resting, found.offloaded) == ((0, 3_944_000_000) if offloaded else (3_944_000_000, 0))


def test_a_local_folder_is_sized_by_its_files(recipe: Config) -> None:
    folder = ROOT / "bpgo_video" / "tiny" / "weights" / "clip"
    elements = 0
    for _, shape in headers([folder / "model.safetensors"]).values():
        count = 1
        for length in shape:
            count *= length
        elements += count
    found = size_of(recipe, RewardConfig("clip_score", options={"model": CLIP}))
    assert found.resting == pytest.approx(4 * elements, abs=4)
    assert found.operations > 0


def test_an_own_class_states_its_size_or_is_unknown(recipe: Config) -> None:
    own, silent = (RewardConfig(f"{__name__}:{name}") for name in ("Sized", "Unsized"))
    assert size_of(recipe, own) == RewardSize(3 * 10**9, 0, operations=5e11)
    worker = RewardConfig("worker", options={"python": "python", "script": "none"})
    hub = RewardConfig("clip_score", options={"model": "someone/clip"})
    found = size_of(recipe, silent, own, worker, hub, RewardConfig("niqe"))
    assert found == RewardSize(3 * 10**9, 0, operations=5e11, unknown=("r0", "r2", "r3"))


def test_two_scorings_take_twice_the_operations(recipe: Config) -> None:
    pick = RewardConfig("pickscore")
    twice = replace(pick, rescorings=({"frames": 4},))
    assert size_of(recipe, twice).operations == 2 * size_of(recipe, pick).operations


@pytest.mark.parametrize(("stated", "code"), [(None, 3), (2, 0)])
def test_a_plan_does_not_say_that_rewards_of_unknown_size_fit(
    stated: int | None, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    words: list[Any] = ["--config", str(RECIPE), "--gpus", "2", "--gigabytes", "80", "--rewards.motion.model", "worker"]
    flags = [] if stated is None else ["--reward-gigabytes", str(stated)]
    assert command.main([*words, *flags]) == code
    shown = capsys.readouterr().out
    assert (f"reward models {stated}.0 GB" in shown) == (stated is not None)
    assert ("fits" in shown) == (code == 0)
    assert ("Nothing states the size of rewards.motion" in shown) == (code == 3)
    assert ("--reward-gigabytes" in shown) == (code == 3)
