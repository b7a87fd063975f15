"""What did a step's videos earn? A recipe's rewards: built by name or path, asked one by one, gathered over ranks."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bpgo_video.config.bpgo import ConfigError, RewardConfig
from bpgo_video.parallel.mesh import Mesh
from bpgo_video.rewards.aggregate import AGGREGATES
from bpgo_video.rewards.backbones import Backbones
from bpgo_video.rewards.base import Clips, FrameScores, RewardError, RewardModel
from bpgo_video.rewards.calls import Call, ask
from bpgo_video.rewards.resting import at_work, rest
from bpgo_video.types import PromptBatch, Rewards, RolloutChunk

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


def build_reward(
    name: str, reward: RewardConfig, device: torch.device, twice: bool = False, backbones: Backbones | None = None
) -> Reward:
    """The reward model behind a recipe's entry.

    Args:
        twice: build the second model, too, where the entry has one.
        backbones: networks that rewards share; None shares none.

    Raises:
        ConfigError: no such name or dotted path, or the constructor refused its options.
    """
    path = REWARDS.get(reward.model, reward.model)
    module, _, attribute = path.partition(":")
    if not attribute:
        raise ConfigError(
            f"rewards.{name}.model is {reward.model!r}; it must be one of {sorted(REWARDS)} or a dotted path "
            "like 'my_pkg.rewards:MyReward'"
        )
    try:
        factory = getattr(importlib.import_module(module), attribute)
        given = {"device": device, "timeout": reward.timeout, "backbones": backbones or Backbones()}
        model = factory(**_options(reward.options, given, factory))
        second = None
        if twice and reward.second is not None:
            second = factory(**_options({**reward.options, **reward.second}, given, factory))
        built = Reward(model, reward, second)
        if reward.rests_on == "cpu":
            rest(built.models)
    except (ImportError, AttributeError, TypeError, ValueError, OSError) as error:
        raise ConfigError(f"rewards.{name} ({path}) could not be built: {error}") from error
    return built


def _options(options: Mapping[str, Any], given: Mapping[str, Any], factory: Callable[..., Any]) -> dict[str, Any]:
    """A recipe's options, behind what of `given` the constructor takes."""
    taken = inspect.signature(factory).parameters
    return {**{name: value for name, value in given.items() if name in taken}, **options}


@dataclass(frozen=True)
class ScoredChunk:
    """What a rank's videos of one chunk earned: oriented scores by reward name, and whose they are.

    `second` holds the videos' scores by the second models, nan where those were not asked, by the names of the rewards
    that have one.
    """

    prompt_rows: Int[Tensor, "samples"]
    sample_index: Int[Tensor, "samples"]
    scores: Mapping[str, FrameScores]
    second: Mapping[str, Float[Tensor, "samples"]] = field(default_factory=dict)


class RewardSuite:
    """The rewards of a recipe, by the names that it gives them.

    Args:
        fps: of the videos, which come without.
        twice: build the second models, too.
        backbones: networks that another suite's rewards may stand on, too.
    """

    def __init__(
        self,
        rewards: Mapping[str, RewardConfig],
        device: torch.device,
        fps: float,
        twice: bool = False,
        backbones: Backbones | None = None,
    ):
        self.fps = fps
        shared = backbones or Backbones()
        self.rewards = {name: build_reward(name, reward, device, twice, shared) for name, reward in rewards.items()}

    @property
    def versions(self) -> dict[str, str]:
        return {name: reward.version for name, reward in self.rewards.items()}

    @property
    def weights(self) -> dict[str, float]:
        return {name: reward.config.weight for name, reward in self.rewards.items()}

    def at_work(self) -> AbstractContextManager[None]:
        """Where videos are scored: models that rest on the CPU are on the device meanwhile."""
        rewards = self.rewards.values()
        resting = [model for reward in rewards if reward.config.rests_on == "cpu" for model in reward.models]
        return at_work([model for reward in rewards for model in reward.models], resting)

    @torch.no_grad()
    def score(
        self, chunk: RolloutChunk, prompts: PromptBatch, begins: Callable[[Call], object] = lambda call: None
    ) -> ScoredChunk:
        """Scores of each model, oriented, fp32, on the CPU.

        Args:
            begins: hears of each call before it is made.

        Raises:
            RewardError: a model failed, or returned something else than a row of scores per video; names the model,
                the prompts and the samples.
        """
        rows = chunk.prompt_rows
        images = None if prompts.images is None else prompts.images[rows].to(chunk.videos.device)
        clips = Clips(chunk.videos, self.fps, tuple(prompts.texts[row] for row in rows.tolist()), images)

        def scores(name: str, timeout: float, model: RewardModel, of: Tensor) -> FrameScores:
            call = Call(name, timeout, prompts, rows[of], chunk.sample_index[of])
            begins(call)
            return ask(call, model, clips if len(of) == len(clips) else clips.of(of))

        everyone = torch.arange(len(clips))
        again = everyone if prompts.twice is None else everyone[prompts.twice[rows]]
        first, second = {}, {}
        for name, reward in self.rewards.items():
            first[name] = scores(name, reward.config.timeout, reward.model, everyone)
            if reward.second is not None:
                second[name] = torch.full((len(clips),), torch.nan)
                if len(again):
                    found = scores(f"{name}.second", reward.config.timeout, reward.second, again)
                    second[name][again] = reward.aggregate(found.values)
        return ScoredChunk(rows, chunk.sample_index, first, second)

    @torch.no_grad()
    def score_images(self, prompts: PromptBatch, num_frames: int, mesh: Mesh) -> dict[str, Float[Tensor, "prompts"]]:
        """What each prompt's conditioning image would earn as a still video of so many frames, by reward; gathered."""
        if prompts.images is None:
            return {}
        rows = torch.tensor(mesh.share(len(prompts), 1)).flatten()
        images = prompts.images[rows].to(mesh.device)
        videos = images[:, None].expand(-1, num_frames, -1, -1, -1)  # the frames of one share its memory
        texts = [prompts.texts[row] for row in rows.tolist()]
        stills = [
            Clips(video[None], self.fps, (text,), image[None])
            for video, text, image in zip(videos, texts, images, strict=True)
        ]

        def scores(name: str, reward: Reward) -> Tensor:
            found = []
            for row, still in zip(rows, stills, strict=True):
                call = Call(name, reward.config.timeout, prompts, row[None], torch.zeros_like(row[None]))
                found.append(reward.aggregate(ask(call, reward.model, still).values))
            return mesh.gather(torch.cat(found).to(mesh.device), rows.tolist(), len(prompts))

        return {name: scores(name, reward) for name, reward in self.rewards.items()}

    def gather(self, chunks: Sequence[ScoredChunk], prompts: PromptBatch, group_size: int, mesh: Mesh) -> Rewards:
        """All ranks' scores as prompts x group, the same on every rank.

        Raises:
            RewardError: a score is not finite, or videos differ in how many they have; on every rank, naming the
                reward, the prompt and the sample.
        """
        total = len(prompts) * group_size
        items = torch.cat([chunk.prompt_rows * group_size + chunk.sample_index for chunk in chunks]).tolist()

        def gathered(name: str, scores: Sequence[FrameScores]) -> Tensor:
            widths = torch.cat([torch.full((len(score.values),), score.values.shape[1]) for score in scores])
            _check_alike(name, mesh.gather(widths.to(mesh.device), items, total), prompts, group_size)
            rows = mesh.gather(torch.cat([score.values.to(mesh.device) for score in scores]), items, total)
            _check_finite(name, rows, prompts, group_size)
            return rows

        per_frame, times, by_name, second = {}, {}, {}, {}
        for name, reward in self.rewards.items():
            rows = gathered(name, [chunk.scores[name] for chunk in chunks])
            times[name] = chunks[0].scores[name].times
            per_frame[name] = rows.unflatten(0, (len(prompts), group_size))
            by_name[name] = reward.aggregate(rows).unflatten(0, (len(prompts), group_size))
            if reward.second is not None:
                own = torch.cat([chunk.second[name] for chunk in chunks])
                again = mesh.gather(own.to(mesh.device), items, total)
                asked = torch.ones(total, dtype=torch.bool)
                if prompts.twice is not None:
                    asked = prompts.twice.repeat_interleave(group_size)
                known = again.masked_fill(~asked.to(again.device), 0.0)
                _check_finite(f"{name}.second", known[:, None], prompts, group_size)
                second[name] = again.unflatten(0, (len(prompts), group_size))
        weighted = [self.weights[name] * scores for name, scores in by_name.items()]
        return Rewards(by_name, torch.stack(weighted).sum(dim=0), per_frame, times, second)


def _check_alike(name: str, widths: Tensor, prompts: PromptBatch, group_size: int) -> None:
    other = (widths != widths[0]).nonzero()
    if len(other):
        row = int(other[0])
        raise RewardError(
            f"reward {name!r} gave {int(widths[0])} scores for the first sample and {int(widths[row])} for "
            f"{_sample_of(row, prompts, group_size)}; videos of one step have equally many scored frames"
        )


def _sample_of(row: int, prompts: PromptBatch, group_size: int) -> str:
    prompt, sample = divmod(row, group_size)
    return f"sample {sample} of prompt {prompts.texts[prompt]!r} (id {int(prompts.ids[prompt])})"


def _check_finite(name: str, rows: Tensor, prompts: PromptBatch, group_size: int) -> None:
    bad = (~rows.isfinite()).nonzero()
    if len(bad):
        row, frame = bad[0].tolist()
        raise RewardError(
            f"reward {name!r} scored {float(rows[row, frame])} for {_sample_of(row, prompts, group_size)}, "
            f"scored frame {frame}; all ranks stop, nothing was updated with it"
        )
