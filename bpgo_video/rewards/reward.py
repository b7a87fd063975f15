"""One reward of a recipe: the table of models, the construction of its model, a call, and a video's score."""

from __future__ import annotations

import inspect
import math
import pkgutil
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bpgo_video.config.bpgo import ConfigError, RewardConfig
from bpgo_video.errors import unknown
from bpgo_video.rewards.base import Clips, FrameScores, RewardError, RewardModel, Scores, groupwise, listens
from bpgo_video.types import PromptBatch

if TYPE_CHECKING:
    from bpgo_video.rewards.networks import Backbones

REWARDS: dict[str, str] = {
    "aesthetic": "bpgo_video.rewards.text:Aesthetic",
    "audible": "bpgo_video.rewards.audio:Audible",
    "brisque": "bpgo_video.rewards.quality:Brisque",
    "clap_score": "bpgo_video.rewards.audio:ClapScore",
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
    "videoalign": "bpgo_video.rewards.videoalign:VideoAlign",
    "videoprism_score": "bpgo_video.rewards.text:VideoPrismScore",
    "vjepa_prediction": "bpgo_video.rewards.motion:VJepaPrediction",
    "vlm_judge": "bpgo_video.rewards.vlm:VlmJudge",
    "vlm_pairwise": "bpgo_video.rewards.vlm:VlmPairwise",
    "worker": "bpgo_video.rewards.worker:WorkerReward",
    "xclip_score": "bpgo_video.rewards.text:XClipScore",
}
FROM_THE_RUN = ("device", "timeout", "backbones")  # passed by the run to constructors that take them
NAMED_PROMPTS = 3  # in the message about a failed call, which has to fit on a screen
TEXT_SHOWN = 120  # characters of a prompt

VideoScores = Float[Tensor, "samples"]


def soft_min(scores: Scores, at: float) -> VideoScores:
    """-at log mean exp(-scores/at), in the score's units: the minimum for `at` -> 0, the mean for large `at`."""
    return -at * (torch.logsumexp(-scores / at, dim=1) - math.log(scores.shape[1]))


def top_share(scores: Scores, at: float) -> VideoScores:
    """Mean of the best frames: the share `at` of all frames, at least one."""
    count = max(1, round(at * scores.shape[1]))
    return scores.topk(count, dim=1).values.mean(dim=1)


AGGREGATES: dict[str, Callable[[Scores, float], VideoScores]] = {  # of frame scores (higher is better), `aggregate_at`
    "mean": lambda scores, at: scores.mean(dim=1),
    "min": lambda scores, at: scores.amin(dim=1),
    "soft_min": soft_min,
    "top_share": top_share,
    "share_above": lambda scores, at: (scores > at).float().mean(dim=1),
}


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
        way_out = "install its package, or put its folder on PYTHONPATH"
        raise ConfigError(f"rewards.{name} ({path}) could not be built: {error}; {way_out}") from error
    signature = inspect.signature(factory)
    try:
        for options in _all_options(reward):
            signature.bind(**_arguments(factory, options, dict.fromkeys(FROM_THE_RUN)))
    except TypeError as error:
        known = [option for option in signature.parameters if option not in FROM_THE_RUN]
        raise ConfigError(f"rewards.{name} ({path}): {error}; its options are {known}") from error
    return factory


def build_models(
    name: str, reward: RewardConfig, device: torch.device, backbones: Backbones | None = None
) -> list[RewardModel]:
    """The models of a recipe's entry: one, and one more for each of `rewards.NAME.rescorings`.

    Args:
        backbones: networks that rewards share; None shares none.

    Raises:
        ConfigError: as `reward_factory`, or the constructor failed.
    """
    factory = reward_factory(name, reward)
    from_the_run = {"device": device, "timeout": reward.timeout, "backbones": backbones}
    try:
        return [factory(**_arguments(factory, options, from_the_run)) for options in _all_options(reward)]
    except (ImportError, AttributeError, TypeError, ValueError, OSError) as error:
        raise ConfigError(f"rewards.{name} ({reward.model}) could not be built: {error}") from error


def source_of(name: str, reward: RewardConfig) -> str:
    """What an entry scores with: its weights, server or script, or else the model's name; loads nothing."""
    parameters = inspect.signature(reward_factory(name, reward)).parameters.values()
    options = {**{p.name: p.default for p in parameters if p.default is not p.empty}, **reward.options}
    named = [f"{options[key]}" for key in ("model", "url", "script") if options.get(key)]
    return " ".join([*named, *([f"{options['settings']}"] if options.get("settings") else [])]) or reward.model


def _all_options(reward: RewardConfig) -> list[dict[str, Any]]:
    """Options of each scoring."""
    return [reward.options, *({**reward.options, **options} for options in reward.rescorings)]


def _arguments(factory: Callable[..., Any], options: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's options, and those arguments of the run that the constructor takes."""
    parameters = inspect.signature(factory).parameters
    return {**{name: value for name, value in run.items() if name in parameters}, **options}


@dataclass(frozen=True)
class Reward:
    """A model with its entry of the recipe; `rescorers` score the same videos again, with other options."""

    model: RewardModel
    config: RewardConfig
    rescorers: tuple[RewardModel, ...] = ()

    @property
    def version(self) -> str:
        """Changes whenever a video's score does."""
        how = "" if self.config.aggregate == "mean" else f"-{self.config.aggregate}{self.config.aggregate_at or ''}"
        return f"{'+'.join(model.version for model in self.models)}{how}"

    @property
    def models(self) -> list[RewardModel]:
        return [self.model, *self.rescorers]

    @property
    def groupwise(self) -> bool:
        """Whether it compares the samples of a prompt."""
        return groupwise(self.model)

    def aggregate(self, frame_scores: Scores) -> VideoScores:
        """Each video's score, of frame scores for which higher is better."""
        at = self.config.aggregate_at or 0.0
        if self.config.aggregate == "share_above" and not self.model.higher_is_better:
            at = -at  # the recipe states it in the model's own units
        return AGGREGATES[self.config.aggregate](frame_scores, at)

    def aggregate_std(self, std: Scores | None) -> VideoScores | None:
        """sqrt(sum_f s_f^2)/F, the std of the error of a mean over frames that err independently.

        None if the model states no std, or the aggregate is another.
        """
        if std is None or self.config.aggregate != "mean":
            return None
        return std.square().sum(dim=1).sqrt() / std.shape[1]


@dataclass(frozen=True)
class Call:
    """One call of a reward model, on the videos of a chunk.

    Attributes:
        reward: the recipe's name for the model.
        timeout: seconds that the call may take.
        prompt_rows, sample_index: prompt and sample of each video, as in RolloutChunk.
    """

    reward: str
    timeout: float
    prompts: PromptBatch
    prompt_rows: Int[Tensor, "samples"]
    sample_index: Int[Tensor, "samples"]

    def __str__(self) -> str:
        samples: dict[int, list[int]] = {}
        for row, sample in zip(self.prompt_rows.tolist(), self.sample_index.tolist(), strict=True):
            samples.setdefault(row, []).append(sample)
        named = [describe_samples(self.prompts, *item) for item in list(samples.items())[:NAMED_PROMPTS]]
        more = len(samples) - len(named)
        return f"reward {self.reward!r} on {'; '.join(named)}{f' and of {more} more prompts' if more else ''}"

    def score(self, model: RewardModel, clips: Clips) -> FrameScores:
        """The model's scores, negated where lower is better, with their std; fp32, on the CPU.

        Raises:
            RewardError: the model failed, listens to videos without sound, compares videos that are no groups, or
                returned anything but one row of scores per video, and of std, if any; names the call.
        """
        if groupwise(model) and clips.groups is None:
            raise RewardError(f"{self} compares the samples of a prompt, but these videos are not whole groups")
        if listens(model) and clips.audio is None:
            raise RewardError(f"{self} listens, but the videos have no sound; take a policy that makes sound (LTX-2)")
        try:
            scores = model(clips)
        except Exception as error:  # anything that a user's own model raises: reported with the samples
            raise RewardError(f"{self} failed: {type(error).__name__}: {error}") from error
        shape = tuple(scores.values.shape)
        if len(shape) != 2 or shape[0] != len(clips) or shape[1] == 0:
            rule = f"it must be ({len(clips)}, scored frames)"
            raise RewardError(f"{self} returned the shape {shape} for {len(clips)} videos; {rule}")
        if shape[1] != (1 if scores.times is None else len(scores.times)):
            times = "no frame times" if scores.times is None else f"{len(scores.times)} frame times"
            raise RewardError(f"{self} returned {shape[1]} scores a video with {times}; the numbers must be equal")
        values = scores.values.float().cpu()
        return FrameScores(values if model.higher_is_better else -values, scores.times, self._checked_std(scores))

    def _checked_std(self, scores: FrameScores) -> Scores | None:
        if scores.std is None:
            return None
        std = scores.std.float().cpu()
        if std.shape != scores.values.shape:
            shapes = f"std of shape {tuple(std.shape)} for scores of {tuple(scores.values.shape)}"
            raise RewardError(f"{self} returned {shapes}; each score needs its own")
        if bad := std[~(std.isfinite() & (std >= 0))].tolist():
            raise RewardError(f"{self} returned a std of {bad[0]}; it must be finite and 0 or more, or std None")
        return std


def describe_samples(prompts: PromptBatch, row: int, samples: Sequence[int]) -> str:
    """Samples of a prompt, for messages."""
    which = f"{'sample' if len(samples) == 1 else 'samples'} {', '.join(map(str, samples))}"
    return f"{which} of prompt {textwrap.shorten(prompts.texts[row], TEXT_SHOWN)!r} (id {int(prompts.ids[row])})"
