"""What did a step's videos earn? A recipe's rewards, asked one by one and gathered over ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bpgo_video.config.bpgo import RewardConfig
from bpgo_video.parallel.mesh import Mesh
from bpgo_video.rewards.backbones import Backbones
from bpgo_video.rewards.base import Clips, FrameScores, RewardError, RewardModel
from bpgo_video.rewards.building import Reward, build_reward
from bpgo_video.rewards.calls import Call, ask
from bpgo_video.rewards.resting import at_work
from bpgo_video.types import PromptBatch, Rewards, RolloutChunk


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
