"""The table of reward models, and how an entry of a recipe's rewards becomes a model."""

from __future__ import annotations

import inspect
import pkgutil
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
from bpgo_video.rewards.offload import to_cpu

REWARDS: dict[str, str] = {
    "aesthetic": "bpgo_video.rewards.image_text:Aesthetic",
    "brisque": "bpgo_video.rewards.quality:Brisque",
    "clip_image_score": "bpgo_video.rewards.image_text:ClipImageScore",
    "clip_score": "bpgo_video.rewards.image_text:ClipScore",
    "dynamic_degree": "bpgo_video.rewards.motion:DynamicDegree",
    "first_frame_consistency": "bpgo_video.rewards.consistency:FirstFrameConsistency",
    "frame_consistency": "bpgo_video.rewards.consistency:FrameConsistency",
    "hpsv2": "bpgo_video.rewards.image_text:HPSv2",
    "learned_motion": "bpgo_video.rewards.motion:LearnedMotion",
    "niqe": "bpgo_video.rewards.quality:Niqe",
    "ocr_text": "bpgo_video.rewards.text:OcrText",
    "pickscore": "bpgo_video.rewards.image_text:PickScore",
    "remote": "bpgo_video.rewards.remote:RemoteReward",
    "shapes_oracle": "bpgo_video.rewards.motion:ShapesOracle",
    "shot_cuts": "bpgo_video.rewards.consistency:ShotCuts",
    "siglip_score": "bpgo_video.rewards.image_text:SiglipScore",
    "subject_consistency": "bpgo_video.rewards.consistency:SubjectConsistency",
    "temporal_flickering": "bpgo_video.rewards.motion:TemporalFlickering",
    "videoalign": "bpgo_video.rewards.vlm:VideoAlign",
    "videoprism_score": "bpgo_video.rewards.video_text:VideoPrismScore",
    "vjepa_prediction": "bpgo_video.rewards.consistency:VJepaPrediction",
    "vlm_judge": "bpgo_video.rewards.vlm:VlmJudge",
    "worker": "bpgo_video.rewards.worker:WorkerReward",
    "xclip_score": "bpgo_video.rewards.video_text:XClipScore",
}

GIVEN = ("device", "timeout", "backbones")  # what the run passes to constructors that take it


@dataclass(frozen=True)
class Reward:
    """A model with its entry of the recipe; `second` scores the same videos again, with other options."""

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
        return [self.model] if self.second is None else [self.model, self.second]

    def aggregate(self, rows: Float[Tensor, "samples scored"]) -> Float[Tensor, "samples"]:
        """Each video's score, from oriented frame scores."""
        at = self.config.aggregate_at or 0.0
        if self.config.aggregate == "share_above" and not self.model.higher_is_better:
            at = -at  # stated in the model's own units
        return AGGREGATES[self.config.aggregate](rows, at)


def reward_factory(name: str, reward: RewardConfig) -> Callable[..., Any]:
    """The constructor of an entry's model, checked to take the entry's options; nothing is loaded.

    Raises:
        ConfigError: no such name or dotted path, or options that the constructor does not take.
    """
    path = REWARDS.get(reward.model, reward.model)
    if ":" not in path:
        rule = f"it must be one of {sorted(REWARDS)} or a dotted path like 'my_pkg.rewards:MyReward'"
        raise ConfigError(f"rewards.{name}.model is {reward.model!r}; {rule}")
    try:
        factory: Callable[..., Any] = pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"rewards.{name} ({path}) could not be built: {error}") from error
    taken = inspect.signature(factory)
    try:
        for options in all_options(reward):
            taken.bind(**_arguments(factory, options, dict.fromkeys(GIVEN)))
    except TypeError as error:
        known = [option for option in taken.parameters if option not in GIVEN]
        raise ConfigError(f"rewards.{name} ({path}): {error}; its options are {known}") from error
    return factory


def build_reward(
    name: str, reward: RewardConfig, device: torch.device, twice: bool = False, backbones: Backbones | None = None
) -> Reward:
    """The reward model of a recipe's entry.

    Args:
        twice: build the second model as well, where the entry has one.
        backbones: networks that rewards share; None shares none.

    Raises:
        ConfigError: see `reward_factory`; or the constructor raised.
    """
    factory = reward_factory(name, reward)
    given = {"device": device, "timeout": reward.timeout, "backbones": backbones or Backbones()}
    try:
        models = [factory(**_arguments(factory, options, given)) for options in all_options(reward)[: 1 + twice]]
        if reward.offload:
            to_cpu(models)
    except (ImportError, AttributeError, TypeError, ValueError, OSError) as error:
        raise ConfigError(f"rewards.{name} ({reward.model}) could not be built: {error}") from error
    return Reward(models[0], reward, *models[1:])


def all_options(reward: RewardConfig) -> list[dict[str, Any]]:
    """Options of the model, and of the second one where the entry has one."""
    return [reward.options, *([] if reward.second is None else [{**reward.options, **reward.second}])]


def _arguments(factory: Callable[..., Any], options: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's options, and what of `given` the constructor takes."""
    taken = inspect.signature(factory).parameters
    return {**{name: value for name, value in given.items() if name in taken}, **options}
