"""Which model does an entry of a recipe's rewards name? Built by name or path, with the options that it takes."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bpgo_video.config.bpgo import ConfigError, RewardConfig
from bpgo_video.rewards.aggregate import AGGREGATES
from bpgo_video.rewards.backbones import Backbones
from bpgo_video.rewards.base import RewardModel
from bpgo_video.rewards.resting import rest

REWARDS: dict[str, str] = {
    "aesthetic": "bpgo_video.rewards.aesthetic:Aesthetic",
    "brisque": "bpgo_video.rewards.brisque:Brisque",
    "clip_image_score": "bpgo_video.rewards.clip:ClipImageScore",
    "clip_score": "bpgo_video.rewards.clip:ClipScore",
    "dynamic_degree": "bpgo_video.rewards.dynamics:DynamicDegree",
    "first_frame_consistency": "bpgo_video.rewards.dino:FirstFrameConsistency",
    "frame_consistency": "bpgo_video.rewards.consistency:FrameConsistency",
    "hpsv2": "bpgo_video.rewards.hpsv2:HPSv2",
    "learned_motion": "bpgo_video.rewards.motion:LearnedMotion",
    "niqe": "bpgo_video.rewards.niqe:Niqe",
    "ocr_text": "bpgo_video.rewards.text:OcrText",
    "pickscore": "bpgo_video.rewards.pickscore:PickScore",
    "remote": "bpgo_video.rewards.remote:RemoteReward",
    "shapes_oracle": "bpgo_video.rewards.oracle:ShapesOracle",
    "shot_cuts": "bpgo_video.rewards.shots:ShotCuts",
    "siglip_score": "bpgo_video.rewards.siglip:SiglipScore",
    "subject_consistency": "bpgo_video.rewards.dino:SubjectConsistency",
    "temporal_flickering": "bpgo_video.rewards.flickering:TemporalFlickering",
    "videoalign": "bpgo_video.rewards.videoalign:VideoAlign",
    "videoprism_score": "bpgo_video.rewards.videoprism:VideoPrismScore",
    "vjepa_prediction": "bpgo_video.rewards.vjepa:VJepaPrediction",
    "vlm_judge": "bpgo_video.rewards.judge:VlmJudge",
    "worker": "bpgo_video.rewards.worker:WorkerReward",
    "xclip_score": "bpgo_video.rewards.xclip:XClipScore",
}

GIVEN = ("device", "timeout", "backbones")  # to constructors that take them


@dataclass(frozen=True)
class Reward:
    """A model with its place in the recipe; `second` scores the same videos again, by other options."""

    model: RewardModel
    config: RewardConfig
    second: RewardModel | None = None

    @property
    def version(self) -> str:
        """Changes when a video's score does."""
        how = "" if self.config.aggregate == "mean" else f"-{self.config.aggregate}{self.config.aggregate_at or ''}"
        return f"{self.model.version}{how}"

    @property
    def models(self) -> list[RewardModel]:
        return [self.model, *([] if self.second is None else [self.second])]

    def aggregate(self, rows: Float[Tensor, "samples scored"]) -> Float[Tensor, "samples"]:
        """Each video's score, from oriented ones."""
        at = self.config.aggregate_at or 0.0
        if self.config.aggregate == "share_above" and not self.model.higher_is_better:
            at = -at  # stated in the model's own units
        return AGGREGATES[self.config.aggregate](rows, at)


def reward_factory(name: str, reward: RewardConfig) -> Callable[..., Any]:
    """What builds the model of a recipe's entry, once it is known to take the entry's options; nothing is loaded.

    Raises:
        ConfigError: no such name or dotted path, or options that are not those of the constructor.
    """
    path = REWARDS.get(reward.model, reward.model)
    module, _, attribute = path.partition(":")
    if not attribute:
        raise ConfigError(
            f"rewards.{name}.model is {reward.model!r}; it must be one of {sorted(REWARDS)} or a dotted path "
            "like 'my_pkg.rewards:MyReward'"
        )
    try:
        factory: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"rewards.{name} ({path}) could not be built: {error}") from error
    taken = inspect.signature(factory)
    given = dict.fromkeys(GIVEN)
    for options in (reward.options, {**reward.options, **(reward.second or {})}):
        try:
            taken.bind(**_options(options, given, factory))
        except TypeError as error:
            known = [option for option in taken.parameters if option not in given]
            raise ConfigError(f"rewards.{name} ({path}): {error}; its options are {known}") from error
    return factory


def build_reward(
    name: str, reward: RewardConfig, device: torch.device, twice: bool = False, backbones: Backbones | None = None
) -> Reward:
    """The reward model behind a recipe's entry.

    Args:
        twice: build the second model, too, where the entry has one.
        backbones: networks that rewards share; None shares none.

    Raises:
        ConfigError: see `reward_factory`; or the constructor refused its options.
    """
    factory = reward_factory(name, reward)
    try:
        given = dict(zip(GIVEN, (device, reward.timeout, backbones or Backbones()), strict=True))
        model = factory(**_options(reward.options, given, factory))
        second = None
        if twice and reward.second is not None:
            second = factory(**_options({**reward.options, **reward.second}, given, factory))
        built = Reward(model, reward, second)
        if reward.rests_on == "cpu":
            rest(built.models)
    except (ImportError, AttributeError, TypeError, ValueError, OSError) as error:
        raise ConfigError(f"rewards.{name} ({reward.model}) could not be built: {error}") from error
    return built


def _options(options: Mapping[str, Any], given: Mapping[str, Any], factory: Callable[..., Any]) -> dict[str, Any]:
    """A recipe's options, behind what of `given` the constructor takes."""
    taken = inspect.signature(factory).parameters
    return {**{name: value for name, value in given.items() if name in taken}, **options}
