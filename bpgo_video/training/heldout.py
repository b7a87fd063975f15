"""How good is the policy on prompts that it never trains on? The same prompts, the same noise, at every evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from bpgo_video.config.bpgo import Config
from bpgo_video.data.media import write_video
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.policies import Policy
from bpgo_video.rewards import FrameScores
from bpgo_video.rewards.ahead import ScoreAhead
from bpgo_video.rewards.suite import RewardSuite
from bpgo_video.rollouts.rollout import sample_chunks
from bpgo_video.rollouts.shipped_scheduler import evaluation_denoiser
from bpgo_video.types import PromptBatch, RolloutChunk

Scores = Float[Tensor, "prompts samples"]
Seen = Callable[[RolloutChunk], None]  # what else looks at the videos before they go


@dataclass(frozen=True)
class HeldoutScores:
    """Scores of one evaluation by reward name, the same on every rank.

    Attributes:
        frames: of each prompt's first sample, by the rewards that score frames, with the frames' times.
    """

    by_name: Mapping[str, Scores]
    frames: Mapping[str, FrameScores] = field(default_factory=dict)

    def metrics(self, prefix: str = "heldout") -> dict[str, float]:
        """`PREFIX/NAME` and its standard error, where there is one."""
        values = {}
        for name, scores in self.by_name.items():
            values[f"{prefix}/{name}"] = float(scores.mean())
            if scores.numel() > 1:
                values[f"{prefix}/{name}_stderr"] = stderr(scores)
        return values


def stderr(scores: Scores) -> float:
    """Standard error of the mean over the samples, the prompts being fixed: sqrt(sum_i s_i^2 / n) / P.

    With one sample per prompt, it is that over prompts; of one video in all it is not known, nan.
    """
    prompts, samples = scores.shape
    if samples == 1:
        return float(scores.std() / prompts**0.5)
    return float((scores.double().var(dim=1) / samples).sum().sqrt() / prompts)


def evaluate(
    policy: Policy,
    prompts: PromptBatch,
    suite: RewardSuite,
    config: Config,
    mesh: Mesh,
    seen: Seen = lambda chunk: None,
) -> HeldoutScores:
    """Sample with the ODE and score; noise is keyed by the seed, the prompt and the sample alone."""
    samples = config.evaluation.samples_per_prompt
    chunks = sample_chunks(
        evaluation_denoiser(policy, config),
        prompts,
        mesh,
        group_size=samples,
        micro_batch_size=config.rollout.micro_batch_size,
        latent_shape=policy.latent_shape(config.video),
        key=(config.run.seed, "heldout"),
    )
    with suite.on_device(), ScoreAhead(suite, prompts, config.rollout.score_ahead, mesh.device) as scoring:
        for chunk in chunks:
            scoring.put(chunk)
            seen(chunk)
            del chunk
        rewards = suite.gather(scoring.scores(), prompts, samples, mesh)
    frames = {
        name: FrameScores(rewards.per_frame[name][:, 0].cpu(), times)
        for name, times in rewards.frame_times.items()
        if times is not None
    }
    return HeldoutScores({name: scores.cpu() for name, scores in rewards.by_name.items()}, frames)


def shown_rows(prompts: int, samples: int, videos: int) -> list[int]:
    """Which (prompt, sample) items are shown: sample 0 of evenly spread prompts."""
    count = min(videos, prompts)
    return [round(i * (prompts - 1) / max(1, count - 1)) * samples for i in range(count)]


def write_shown(folder: Path, prompts: int, config: Config) -> Seen:
    """Writes the first sample of `evaluation.videos` of so many prompts, spread evenly."""
    samples = config.evaluation.samples_per_prompt
    shown = shown_rows(prompts, samples, config.evaluation.videos)

    def seen(chunk: RolloutChunk) -> None:
        items = (chunk.prompt_rows * samples + chunk.sample_index).tolist()
        for video, item in zip(chunk.videos, items, strict=True):
            if item in shown:
                write_video(folder / f"{shown.index(item):03d}.mp4", video.cpu(), config.video.fps)

    return seen
