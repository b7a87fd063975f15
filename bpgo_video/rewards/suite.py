"""The rewards of a recipe: each scores the videos of a step, and the scores are gathered over ranks."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from types import ModuleType
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bpgo_video.config.bpgo import ConfigError, RewardConfig
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.rewards.backbones import Backbones
from bpgo_video.rewards.base import Clips, FrameScores, RewardError, RewardModel, Scores
from bpgo_video.rewards.building import build_models
from bpgo_video.types import PromptBatch, Rewards, RolloutChunk

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


@dataclass(frozen=True)
class Reward:
    """A model with its entry of the recipe; `second` scores the same videos again, with other options."""

    model: RewardModel
    config: RewardConfig
    second: RewardModel | None = None

    @property
    def version(self) -> str:
        """Changes whenever a video's score does."""
        how = "" if self.config.aggregate == "mean" else f"-{self.config.aggregate}{self.config.aggregate_at or ''}"
        return f"{self.model.version}{how}"

    @property
    def models(self) -> list[RewardModel]:
        return [self.model] if self.second is None else [self.model, self.second]

    def aggregate(self, frame_scores: Scores) -> VideoScores:
        """Each video's score, of frame scores for which higher is better."""
        at = self.config.aggregate_at or 0.0
        if self.config.aggregate == "share_above" and not self.model.higher_is_better:
            at = -at  # the recipe states it in the model's own units
        return AGGREGATES[self.config.aggregate](frame_scores, at)


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
        """The model's scores, negated where lower is better; fp32, on the CPU.

        Raises:
            RewardError: the model failed, or returned anything but one row of scores per video; names the call.
        """
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
        return FrameScores(values if model.higher_is_better else -values, scores.times)


def describe_samples(prompts: PromptBatch, row: int, samples: Sequence[int]) -> str:
    """Samples of a prompt, for messages."""
    which = f"{'sample' if len(samples) == 1 else 'samples'} {', '.join(map(str, samples))}"
    return f"{which} of prompt {textwrap.shorten(prompts.texts[row], TEXT_SHOWN)!r} (id {int(prompts.ids[row])})"


@dataclass(frozen=True)
class ScoredChunk:
    """Scores of a rank's videos of one chunk, by reward name; higher is better.

    Attributes:
        second: scores by the second models, nan for videos that are scored once.
    """

    prompt_rows: Int[Tensor, "samples"]
    sample_index: Int[Tensor, "samples"]
    scores: Mapping[str, FrameScores]
    second: Mapping[str, VideoScores] = field(default_factory=dict)


class RewardSuite:
    """The rewards of a recipe, by name.

    Args:
        fps: of the videos.
        twice: build the second models as well.
        backbones: networks shared with another suite.
    """

    def __init__(
        self, rewards: Mapping[str, RewardConfig], device: torch.device, fps: float, twice: bool = False,
        backbones: Backbones | None = None,
    ):  # fmt: skip
        self.fps = fps
        shared = backbones or Backbones()
        self.rewards: dict[str, Reward] = {}
        for name, config in rewards.items():
            model, *second = build_models(name, config, device, twice, shared)
            self.rewards[name] = Reward(model, config, *second)
            if config.offload and not modules_of([model]):
                raise ConfigError(f"rewards.{name}: {config.model} holds no torch.nn.Module; set offload: false")
        self._offload()

    @property
    def versions(self) -> dict[str, str]:
        return {name: reward.version for name, reward in self.rewards.items()}

    @property
    def weights(self) -> dict[str, float]:
        return {name: reward.config.weight for name, reward in self.rewards.items()}

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Offloaded models are on their device inside the block, and back on the CPU after it unless it failed."""
        # All models: one may share a network with a model that another suite offloads.
        for module in modules_of(model for reward in self.rewards.values() for model in reward.models):
            if module in OFFLOADED:
                module.to(OFFLOADED.pop(module))
        yield
        self._offload()

    def _offload(self) -> None:
        offloading = [reward for reward in self.rewards.values() if reward.config.offload]
        for module in modules_of(model for reward in offloading for model in reward.models):
            tensor = next(chain(module.parameters(), module.buffers()), None)
            if tensor is not None:
                OFFLOADED.setdefault(module, tensor.device)  # two offloaded models may share it
            module.to("cpu")

    @torch.no_grad()
    def score(
        self, chunk: RolloutChunk, prompts: PromptBatch, on_call: Callable[[Call], object] = lambda call: None
    ) -> ScoredChunk:
        """Scores of each model, higher is better, fp32, on the CPU.

        Args:
            on_call: receives each call before it is made.

        Raises:
            RewardError: as `Call.score`.
        """
        rows = chunk.prompt_rows
        images = None if prompts.images is None else prompts.images[rows].to(chunk.videos.device)
        clips = Clips(chunk.videos, self.fps, tuple(prompts.texts[row] for row in rows.tolist()), images)

        def scores(name: str, timeout: float, model: RewardModel, videos: Tensor) -> FrameScores:
            call = Call(name, timeout, prompts, rows[videos], chunk.sample_index[videos])
            on_call(call)
            return call.score(model, clips if len(videos) == len(clips) else clips.select(videos))

        everyone = torch.arange(len(clips))
        again = everyone if prompts.twice is None else everyone[prompts.twice[rows]]
        first, second = {}, {}
        for name, reward in self.rewards.items():
            first[name] = scores(name, reward.config.timeout, reward.model, everyone)
            if reward.second is not None:
                second[name] = torch.full((len(clips),), torch.nan)
                if len(again):
                    rescored = scores(f"{name}.second", reward.config.timeout, reward.second, again)
                    second[name][again] = reward.aggregate(rescored.values)
        return ScoredChunk(rows, chunk.sample_index, first, second)

    @torch.no_grad()
    def score_images(self, prompts: PromptBatch, num_frames: int, mesh: Mesh) -> dict[str, Float[Tensor, "prompts"]]:
        """Score of each prompt's conditioning image as a still video of `num_frames`, by reward; gathered."""
        if prompts.images is None:
            return {}
        first_model_only = replace(prompts, twice=torch.zeros(len(prompts), dtype=torch.bool))
        rows, scored = torch.tensor(mesh.share(len(prompts), 1)).flatten(), []
        for row in rows.split(1):
            still = prompts.images[row, None].to(mesh.device).expand(-1, num_frames, -1, -1, -1)  # without a copy
            scored.append(self.score(RolloutChunk((), still, row, torch.zeros_like(row)), first_model_only))
        by_name = {}
        for name, reward in self.rewards.items():
            scores = torch.cat([reward.aggregate(chunk.scores[name].values) for chunk in scored])
            by_name[name] = mesh.gather(scores.to(mesh.device), rows.tolist(), len(prompts))
        return by_name

    def gather(self, chunks: Sequence[ScoredChunk], prompts: PromptBatch, group_size: int, mesh: Mesh) -> Rewards:
        """All ranks' scores as prompts x group, the same on every rank.

        Raises:
            RewardError: a score is not finite, or the numbers of scored frames differ; on every rank, with the reward,
                the prompt and the sample.
        """
        total, shape = len(prompts) * group_size, (len(prompts), group_size)
        items = torch.cat([chunk.prompt_rows * group_size + chunk.sample_index for chunk in chunks]).tolist()

        def gathered(parts: Sequence[Tensor]) -> Tensor:
            return mesh.gather(torch.cat(list(parts)).to(mesh.device), items, total)

        per_frame, times, by_name, second = {}, {}, {}, {}
        for name, reward in self.rewards.items():
            scores = [chunk.scores[name] for chunk in chunks]
            widths = gathered([torch.full((len(score.values),), score.values.shape[1]) for score in scores])
            _check_widths(name, widths, prompts, group_size)
            values = gathered([score.values for score in scores])
            _check_finite(name, values, prompts, group_size)
            times[name] = scores[0].times
            per_frame[name] = values.unflatten(0, shape)
            by_name[name] = reward.aggregate(values).unflatten(0, shape)
            if reward.second is not None:
                again = gathered([chunk.second[name] for chunk in chunks])
                scored = again
                if prompts.twice is not None:
                    scored = again.masked_fill(~prompts.twice.repeat_interleave(group_size).to(again.device), 0.0)
                _check_finite(f"{name}.second", scored[:, None], prompts, group_size)
                second[name] = again.unflatten(0, shape)
        weighted = [self.weights[name] * scores for name, scores in by_name.items()]
        return Rewards(by_name, torch.stack(weighted).sum(dim=0), per_frame, times, second)


def _check_widths(name: str, widths: Tensor, prompts: PromptBatch, group_size: int) -> None:
    for row in (widths != widths[0]).nonzero().flatten().tolist():
        sample = describe_samples(prompts, row // group_size, [row % group_size])
        counts = f"{int(widths[0])} scores for the first sample and {int(widths[row])} for {sample}"
        raise RewardError(f"reward {name!r} returned {counts}; all videos of a step need equally many scored frames")


def _check_finite(name: str, values: Scores, prompts: PromptBatch, group_size: int) -> None:
    for row, frame in (~values.isfinite()).nonzero().tolist():
        sample = describe_samples(prompts, row // group_size, [row % group_size])
        score = f"reward {name!r} scored {float(values[row, frame])} for {sample}, scored frame {frame}"
        raise RewardError(f"{score}; all ranks stop before an update with it")


MAX_DEPTH = 4  # of attributes of attributes that are searched for modules
OFFLOADED: WeakKeyDictionary[nn.Module, torch.device] = WeakKeyDictionary()  # modules on the CPU now, and their device


def modules_of(models: Iterable[RewardModel]) -> list[nn.Module]:
    """The modules that reward models are or hold, each once."""
    modules = chain.from_iterable(_modules_in(model, MAX_DEPTH) for model in models)
    return list({id(module): module for module in modules}.values())


def _modules_in(thing: object, depth: int) -> Iterator[nn.Module]:
    if isinstance(thing, nn.Module):
        yield thing
    elif depth and not isinstance(thing, type | ModuleType | str | bytes):
        by_name = thing if isinstance(thing, Mapping) else getattr(thing, "__dict__", {})
        for part in list(thing if isinstance(thing, Sequence) else by_name.values()):
            yield from _modules_in(part, depth - 1)
