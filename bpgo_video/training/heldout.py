"""Held-out evaluation: the same prompts and noise every time, their scores, and the videos that are shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bpgo_video.config.bpgo import Config
from bpgo_video.data.media import write_video
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.policies import Policy
from bpgo_video.rewards import FrameScores
from bpgo_video.rewards.look import WATCHED
from bpgo_video.rewards.score_ahead import ScoreAhead
from bpgo_video.rewards.suite import RewardSuite
from bpgo_video.rollouts.denoiser import Denoiser, evaluation_denoiser
from bpgo_video.rollouts.rollout import sample_chunks
from bpgo_video.rollouts.rules import TrainedSteps, no_steps
from bpgo_video.statistics import LEVEL, corrected, effect, paired_differences, signed_rank
from bpgo_video.training.trackers import Cell
from bpgo_video.types import PromptBatch, Rewards, RolloutChunk

Scores = Float[Tensor, "prompts samples"]
ScoresByReward = Mapping[str, Sequence[Sequence[float]]]


@dataclass(frozen=True)
class HeldoutScores:
    """Scores of one evaluation by reward name, the same on every rank.

    Attributes:
        frames: scores of each frame of each prompt's first sample, by the rewards that score frames.
        look: measures of `rewards/look.py`, by their keys in metrics.
    """

    by_name: Mapping[str, Scores]
    frames: Mapping[str, FrameScores] = field(default_factory=dict)
    look: Mapping[str, Scores] = field(default_factory=dict)

    def metrics(self, prefix: str = "heldout") -> dict[str, float]:
        """`PREFIX/NAME` and, with more than one video, its standard error; of the raw weights also how they look."""
        values = {name: float(scores.mean()) for name, scores in self.look.items() if prefix == "heldout"}
        for name, scores in self.by_name.items():
            values[f"{prefix}/{name}"] = float(scores.mean())
            if scores.numel() > 1:
                values[f"{prefix}/{name}_stderr"] = stderr(scores)
        return values


def stderr(scores: Scores) -> float:
    """Standard error of the mean over samples, for fixed prompts: sqrt(sum_i s_i^2 / n) / P.

    With one sample per prompt it is the standard error over prompts; of a single video it is nan.
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
    on_chunk: Callable[[RolloutChunk], None] = lambda chunk: None,
) -> HeldoutScores:
    """Sample with the ODE and score; noise is keyed by seed, prompt and sample only.

    Args:
        on_chunk: receives the videos before they are dropped.
    """
    denoiser, samples = evaluation_denoiser(policy, config), config.evaluation.samples_per_prompt
    rewards = score_samples(denoiser, prompts, suite, config, mesh, samples, ("heldout",), on_chunk=on_chunk)
    frames = {
        name: FrameScores(rewards.per_frame[name][:, 0].cpu(), times)
        for name, times in rewards.frame_times.items()
        if times is not None and name not in WATCHED
    }
    scores = {name: found.cpu() for name, found in rewards.by_name.items()}
    look = {name: scores.pop(name) for name in WATCHED if name in scores}
    return HeldoutScores(scores, frames, look)


def score_samples(
    denoiser: Denoiser,
    prompts: PromptBatch,
    suite: RewardSuite,
    config: Config,
    mesh: Mesh,
    samples: int,
    key: tuple[int | str, ...],
    trained_steps: TrainedSteps = no_steps,
    same_start: bool = False,
    on_chunk: Callable[[RolloutChunk], None] = lambda chunk: None,
) -> Rewards:
    """Sample and score videos of each prompt outside training; noise is keyed by the run's seed and `key`."""
    chunks = sample_chunks(
        denoiser,
        prompts,
        mesh,
        group_size=samples,
        micro_batch_size=config.rollout.micro_batch_size,
        latent_shape=denoiser.policy.latent_shape(config.video),
        key=(config.run.seed, *key),
        trained_steps=trained_steps,
        same_start=same_start,
    )
    scoring = ScoreAhead(suite, prompts, config.rollout.score_ahead, mesh.device, group_size=samples)
    with suite.on_device(), scoring:
        for chunk in chunks:
            scoring.put(chunk)
            on_chunk(chunk)
            del chunk
        return suite.gather(scoring.scores(), prompts, samples, mesh)


def heldout_summary(before: ScoresByReward, after: HeldoutScores, config: Config) -> dict[str, Any]:
    """The held-out fields of summary.json, by the first reward of `evaluation.rewards`."""
    name = next(iter(config.evaluation.rewards))
    first, last = torch.tensor(before[name]), after.by_name[name]
    summary: dict[str, Any] = {
        "heldout_reward": name,
        "heldout_before": float(first.mean()),
        "heldout_after": float(last.mean()),
        "heldout_prompts": last.shape[0],
        "heldout_videos": last.numel(),
    }
    if last.numel() > 1:  # the error of a single video is unknown
        scores = {"before": first, "after": last, "difference": last - first}
        summary |= {f"heldout_{when}_stderr": stderr(values) for when, values in scores.items()}
    return summary | heldout_test(first, last, config)


def heldout_test(first: Scores, last: Scores, config: Config) -> dict[str, Any]:
    """Test of the change over prompts, corrected for all measures that a comparison of policies would take."""
    names = {*config.evaluation.rewards, *config.trained_rewards}
    video_measures = (config.video.num_frames > 1) + (config.evaluation.samples_per_prompt > 1)
    measures = len(names) + (len(config.trained_rewards) > 1) + video_measures
    test = corrected(effect(first.cpu().numpy(), last.cpu().numpy()), measures)
    return {
        "heldout_interval": None if test.low is None else [test.low, test.high],
        "heldout_p_value": test.p_adjusted,
        "heldout_measures": measures,
        "heldout_shown": test.shown,
        "heldout_detectable": test.detectable,
    }


def look_summary(before: ScoresByReward, after: HeldoutScores) -> dict[str, dict[str, float]]:
    """Of each measure of how videos look: its mean before and after, and its drift.

    The drift is the difference in standard deviations of the videos before training; 0 unless the signed-rank test over
    prompts, corrected for all measures, shows a difference.
    """
    found = {}
    for name, last in after.look.items():
        if name not in before:
            continue
        first = torch.tensor(before[name])
        p_value = len(after.look) * signed_rank(paired_differences(first.numpy(), last.numpy()))
        spread, difference = float(first.std()) if first.numel() > 1 else 0.0, float(last.mean() - first.mean())
        drift = difference / spread if spread and p_value < 1 - LEVEL else 0.0
        found[name] = {"before": float(first.mean()), "after": float(last.mean()), "drift": drift}
    return found


class ShownVideos:
    """The held-out videos that a run keeps: the first sample of `evaluation.videos` prompts, evenly spread.

    Args:
        folder: RUN/samples, with a folder of videos for each evaluation.
        texts: all held-out prompts.
    """

    def __init__(self, folder: Path, texts: Sequence[str], config: Config) -> None:
        self.folder, self.texts, self.config = folder, texts, config
        count = min(config.evaluation.videos, len(texts))
        self.rows = [round(i * (len(texts) - 1) / max(1, count - 1)) for i in range(count)]

    def path(self, evaluation: str, index: int) -> Path:
        return self.folder / evaluation / f"{index:03d}.mp4"

    def writer(self, evaluation: str) -> Callable[[RolloutChunk], None]:
        """A function that writes those of a chunk's videos that are shown."""

        def write(chunk: RolloutChunk) -> None:
            samples = zip(chunk.videos, chunk.prompt_rows.tolist(), chunk.sample_index.tolist(), strict=True)
            for number, (video, row, sample) in enumerate(samples):
                if sample == 0 and row in self.rows:
                    path, fps = self.path(evaluation, self.rows.index(row)), self.config.video.fps
                    write_video(path, video.cpu(), fps, audio=chunk.sound(number))

        return write

    def captioned(self, evaluation: str, scores: HeldoutScores) -> list[tuple[Path, str]]:
        """Path and caption of each shown video."""
        return [
            (self.path(evaluation, index), caption(self.texts[row], row, scores)) for index, row in enumerate(self.rows)
        ]

    def table(self, before: ScoresByReward, after: HeldoutScores) -> list[dict[str, Cell]]:
        """A row per shown prompt: its first sample's video and scores, before and after training."""
        return [
            {
                "prompt": self.texts[row],
                "before": self.path("before", index),
                "after": self.path("after", index),
                **{f"{name} before": scores[row][0] for name, scores in before.items()},
                **{f"{name} after": float(scores[row, 0]) for name, scores in after.by_name.items()},
            }
            for index, row in enumerate(self.rows)
        ]

    def frame_lines(self, step: int, scores: HeldoutScores) -> list[dict[str, Any]]:
        """A line of `samples/frame_scores.jsonl` for each shown video and reward."""
        return [
            {
                "step": step,
                "prompt": self.texts[row],
                "reward": name,
                "times": _times(frames),
                "scores": frames.values[row].tolist(),
            }
            for row in self.rows
            for name, frames in scores.frames.items()
        ]

    def samples(
        self, evaluation: str, before: ScoresByReward, frames_before: ScoresByReward, after: HeldoutScores
    ) -> list[dict[str, Any]]:
        """The content of samples.json after an evaluation; scores are those of the run's measure."""
        reward = next(iter(self.config.evaluation.rewards))
        return [
            {
                "index": index,
                "prompt": self.texts[row],
                "seed": self.config.run.seed,
                "after": evaluation,
                "score_before": before[reward][row][0],
                "score_after": float(after.by_name[reward][row, 0]),
                "frames": {
                    name: {
                        "times": _times(frames),
                        "before": frames_before[name][row] if name in frames_before else [],
                        "after": frames.values[row].tolist(),
                    }
                    for name, frames in after.frames.items()
                },
            }
            for index, row in enumerate(self.rows)
        ]


def caption(prompt: str, row: int, scores: HeldoutScores) -> str:
    """A prompt with the scores of its first sample and, from rewards that score frames, of each frame."""
    parts = [prompt]
    for name, by_video in scores.by_name.items():
        frames = scores.frames[name].values[row].tolist() if name in scores.frames else []
        by_frame = f" ({' '.join(f'{score:.3g}' for score in frames)})" if frames else ""
        parts.append(f"{name}: {float(by_video[row, 0]):.3g}{by_frame}")
    return " | ".join(parts)


def _times(frames: FrameScores) -> list[float]:
    return [] if frames.times is None else frames.times.tolist()
