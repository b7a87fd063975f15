"""The table of reward models, and the construction of a model from an entry of a recipe's rewards."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

import torch

from bpgo_video.config.bpgo import ConfigError, RewardConfig
from bpgo_video.errors import unknown
from bpgo_video.rewards.backbones import Backbones
from bpgo_video.rewards.base import RewardModel

REWARDS: dict[str, str] = {
    "aesthetic": "bpgo_video.rewards.text:Aesthetic",
    "brisque": "bpgo_video.rewards.quality:Brisque",
    "clip_image_score": "bpgo_video.rewards.text:ClipImageScore",
    "clip_score": "bpgo_video.rewards.text:ClipScore",
    "dynamic_degree": "bpgo_video.rewards.motion:DynamicDegree",
    "first_frame_consistency": "bpgo_video.rewards.motion:FirstFrameConsistency",
    "frame_consistency": "bpgo_video.rewards.motion:FrameConsistency",
    "hpsv2": "bpgo_video.rewards.text:HPSv2",
    "learned_motion": "bpgo_video.rewards.tiny_rewards:LearnedMotion",
    "niqe": "bpgo_video.rewards.quality:Niqe",
    "ocr_text": "bpgo_video.rewards.text:OcrText",
    "pickscore": "bpgo_video.rewards.text:PickScore",
    "remote": "bpgo_video.rewards.remote:RemoteReward",
    "shapes_oracle": "bpgo_video.rewards.tiny_rewards:ShapesOracle",
    "shot_cuts": "bpgo_video.rewards.motion:ShotCuts",
    "siglip_score": "bpgo_video.rewards.text:SiglipScore",
    "subject_consistency": "bpgo_video.rewards.motion:SubjectConsistency",
    "temporal_flickering": "bpgo_video.rewards.motion:TemporalFlickering",
    "videoalign": "bpgo_video.rewards.vlm:VideoAlign",
    "videoprism_score": "bpgo_video.rewards.text:VideoPrismScore",
    "vjepa_prediction": "bpgo_video.rewards.motion:VJepaPrediction",
    "vlm_judge": "bpgo_video.rewards.vlm:VlmJudge",
    "worker": "bpgo_video.rewards.remote:WorkerReward",
    "xclip_score": "bpgo_video.rewards.text:XClipScore",
}
FROM_THE_RUN = ("device", "timeout", "backbones")  # passed by the run to constructors that take them


def reward_factory(name: str, reward: RewardConfig) -> Callable[..., Any]:
    """The constructor of an entry's model, after a check that it takes the entry's options; loads no weights.

    Raises:
        ConfigError: no such name or dotted path, or options that the constructor does not take.
    """
    path = REWARDS.get(reward.model, reward.model)
    if ":" not in path:
        own = ", or a class of your own as my_pkg.rewards:MyReward"
        raise ConfigError(unknown(f"rewards.{name}.model", reward.model, sorted(REWARDS), own))
    try:
        factory: Callable[..., Any] = pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"rewards.{name} ({path}) could not be built: {error}") from error
    signature = inspect.signature(factory)
    try:
        for options in _all_options(reward):
            signature.bind(**_arguments(factory, options, dict.fromkeys(FROM_THE_RUN)))
    except TypeError as error:
        known = [option for option in signature.parameters if option not in FROM_THE_RUN]
        raise ConfigError(f"rewards.{name} ({path}): {error}; its options are {known}") from error
    return factory


def build_models(
    name: str, reward: RewardConfig, device: torch.device, twice: bool = False, backbones: Backbones | None = None
) -> list[RewardModel]:
    """The model of a recipe's entry; with `twice`, also its second model (`rewards.NAME.second`) if there is one.

    Args:
        backbones: networks that rewards share; None shares none.

    Raises:
        ConfigError: as `reward_factory`, or the constructor failed.
    """
    factory = reward_factory(name, reward)
    from_the_run = {"device": device, "timeout": reward.timeout, "backbones": backbones or Backbones()}
    try:
        return [factory(**_arguments(factory, options, from_the_run)) for options in _all_options(reward)[: 1 + twice]]
    except (ImportError, AttributeError, TypeError, ValueError, OSError) as error:
        raise ConfigError(f"rewards.{name} ({reward.model}) could not be built: {error}") from error


def _all_options(reward: RewardConfig) -> list[dict[str, Any]]:
    """Options of the model, and of the second model if there is one."""
    return [reward.options, *([] if reward.second is None else [{**reward.options, **reward.second}])]


def _arguments(factory: Callable[..., Any], options: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's options, and those arguments of the run that the constructor takes."""
    parameters = inspect.signature(factory).parameters
    return {**{name: value for name, value in run.items() if name in parameters}, **options}
