"""A recipe's rewards together: each scores the videos of a step, and the scores are gathered over ranks."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bpgo_video.config.bpgo import RewardConfig
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.rewards.backbones import Backbones
from bpgo_video.rewards.base import Clips, FrameScores, RewardError, RewardModel
from bpgo_video.rewards.building import Reward, build_reward
from bpgo_video.rewards.offload import on_device
from bpgo_video.types import PromptBatch, Rewards, RolloutChunk

NAMED_PROMPTS = 3  # in the message about a call that failed, which has to fit on a screen
TEXT_SHOWN = 120  # characters of a prompt


@dataclass(frozen=True)
class Call:
    """One call of a reward model, on the videos of a chunk.

    Attributes:
        reward: the recipe's name for the model.
        timeout: seconds that the call may take.
        prompt_rows, sample_index: which samples the videos are, as in RolloutChunk.
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
        named = [samples_of(self.prompts, row, own) for row, own in list(samples.items())[:NAMED_PROMPTS]]
        more = len(samples) - len(named)
        return f"reward {self.reward!r} on {'; '.join(named)}{f' and of {more} more prompts' if more else ''}"

    def score(self, model: RewardModel, clips: Clips) -> FrameScores:
        """The model's scores, oriented: higher is better; fp32, on the CPU.

        Raises:
            RewardError: the model raised, or returned something else than a row of scores per video; names the call.
        """
        try:
            found = model(clips)
        except Exception as error:  # anything, also from users' own models: reported with the samples
            raise RewardError(f"{self} failed: {type(error).__name__}: {error}") from error
        shape = tuple(found.values.shape)
        if len(shape) != 2 or shape[0] != len(clips) or shape[1] == 0:
            rule = f"it must be ({len(clips)}, scored frames)"
            raise RewardError(f"{self} returned the shape {shape} for {len(clips)} videos; {rule}")
        if shape[1] != (1 if found.times is None else len(found.times)):
            stated = "no frame times" if found.times is None else f"{len(found.times)} frame times"
            raise RewardError(f"{self} returned {shape[1]} scores a video with {stated}; the two must agree")
        values = found.values.float().cpu()
        return FrameScores(values if model.higher_is_better else -values, found.times)


def samples_of(prompts: PromptBatch, row: int, samples: Sequence[int]) -> str:
    """Samples of a prompt, for messages."""
    which = f"{'sample' if len(samples) == 1 else 'samples'} {', '.join(map(str, samples))}"
    return f"{which} of prompt {textwrap.shorten(prompts.texts[row], TEXT_SHOWN)!r} (id {int(prompts.ids[row])})"


@dataclass(frozen=True)
class ScoredChunk:
    """Oriented scores of a rank's videos of one chunk, by reward name.

    Attributes:
        second: the videos' scores by the second models, nan where those did not score, by the names of the rewards
            that have one.
    """

    prompt_rows: Int[Tensor, "samples"]
    sample_index: Int[Tensor, "samples"]
    scores: Mapping[str, FrameScores]
    second: Mapping[str, Float[Tensor, "samples"]] = field(default_factory=dict)


class RewardSuite:
    """The rewards of a recipe, by name.

    Args:
        fps: of the videos, which do not state it.
        twice: build the second models as well.
        backbones: networks shared with another suite.
    """

    def __init__(
        self, rewards: Mapping[str, RewardConfig], device: torch.device, fps: float, twice: bool = False,
        backbones: Backbones | None = None,
    ):  # fmt: skip
        self.fps = fps
        shared = backbones or Backbones()
        self.rewards = {name: build_reward(name, reward, device, twice, shared) for name, reward in rewards.items()}

    @property
    def versions(self) -> dict[str, str]:
        return {name: reward.version for name, reward in self.rewards.items()}

    @property
    def weights(self) -> dict[str, float]:
        return {name: reward.config.weight for name, reward in self.rewards.items()}

    def on_device(self) -> AbstractContextManager[None]:
        """The block in which videos are scored: offloaded models are on the device inside it."""
        rewards = self.rewards.values()
        offloaded = [model for reward in rewards if reward.config.offload for model in reward.models]
        return on_device([model for reward in rewards for model in reward.models], offloaded)

    @torch.no_grad()
    def score(
        self, chunk: RolloutChunk, prompts: PromptBatch, on_call: Callable[[Call], object] = lambda call: None
    ) -> ScoredChunk:
        """Scores of each model, oriented, fp32, on the CPU.

        Args:
            on_call: receives each call before it is made.

        Raises:
            RewardError: a model failed, or returned something else than a row of scores per video; names the model,
                the prompts and the samples.
        """
        rows = chunk.prompt_rows
        images = None if prompts.images is None else prompts.images[rows].to(chunk.videos.device)
        clips = Clips(chunk.videos, self.fps, tuple(prompts.texts[row] for row in rows.tolist()), images)

        def scores(name: str, timeout: float, model: RewardModel, of: Tensor) -> FrameScores:
            call = Call(name, timeout, prompts, rows[of], chunk.sample_index[of])
            on_call(call)
            return call.score(model, clips if len(of) == len(clips) else clips.select(of))

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
        """Score of each prompt's conditioning image as a still video of `num_frames`, by reward; gathered."""
        if prompts.images is None:
            return {}
        rows = torch.tensor(mesh.share(len(prompts), 1)).flatten()
        images = prompts.images[rows].to(mesh.device)
        videos = images[:, None].expand(-1, num_frames, -1, -1, -1)  # the frames of one share its memory
        texts = tuple(prompts.texts[row] for row in rows.tolist())
        stills = [Clips(videos, self.fps, texts, images).select(slice(i, i + 1)) for i in range(len(rows))]

        def scores(name: str, reward: Reward) -> Tensor:
            found = []
            for row, still in zip(rows, stills, strict=True):
                call = Call(name, reward.config.timeout, prompts, row[None], torch.zeros_like(row[None]))
                found.append(reward.aggregate(call.score(reward.model, still).values))
            return mesh.gather(torch.cat(found).to(mesh.device), rows.tolist(), len(prompts))

        return {name: scores(name, reward) for name, reward in self.rewards.items()}

    def gather(self, chunks: Sequence[ScoredChunk], prompts: PromptBatch, group_size: int, mesh: Mesh) -> Rewards:
        """All ranks' scores as prompts x group, the same on every rank.

        Raises:
            RewardError: a score is not finite, or videos differ in how many they have; on every rank, naming the
                reward, the prompt and the sample.
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
            rows = gathered([score.values for score in scores])
            _check_finite(name, rows, prompts, group_size)
            times[name] = scores[0].times
            per_frame[name] = rows.unflatten(0, shape)
            by_name[name] = reward.aggregate(rows).unflatten(0, shape)
            if reward.second is not None:
                again = gathered([chunk.second[name] for chunk in chunks])
                known = again
                if prompts.twice is not None:
                    known = again.masked_fill(~prompts.twice.repeat_interleave(group_size).to(again.device), 0.0)
                _check_finite(f"{name}.second", known[:, None], prompts, group_size)
                second[name] = again.unflatten(0, shape)
        weighted = [self.weights[name] * scores for name, scores in by_name.items()]
        return Rewards(by_name, torch.stack(weighted).sum(dim=0), per_frame, times, second)


def _check_widths(name: str, widths: Tensor, prompts: PromptBatch, group_size: int) -> None:
    other = (widths != widths[0]).nonzero().flatten().tolist()
    if other:
        row = other[0]
        found = f"{int(widths[0])} scores for the first sample and {int(widths[row])} for"
        rule = "all videos of a step must have equally many scored frames"
        raise RewardError(f"reward {name!r} returned {found} {_sample(row, prompts, group_size)}; {rule}")


def _check_finite(name: str, rows: Tensor, prompts: PromptBatch, group_size: int) -> None:
    bad = (~rows.isfinite()).nonzero().tolist()
    if bad:
        row, frame = bad[0]
        where = f"{_sample(row, prompts, group_size)}, scored frame {frame}"
        value = float(rows[row, frame])
        raise RewardError(f"reward {name!r} scored {value} for {where}; all ranks stop, nothing was updated with it")


def _sample(row: int, prompts: PromptBatch, group_size: int) -> str:
    prompt, sample = divmod(row, group_size)
    return samples_of(prompts, prompt, [sample])
