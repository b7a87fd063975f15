"""Whole groups for rewards that compare the samples of a prompt, from chunks that hold parts of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from bpgo_video.config.bpgo import RewardConfig
from bpgo_video.rewards.base import RewardError, groupwise
from bpgo_video.rewards.reward import describe_samples, reward_factory
from bpgo_video.types import Audio, PromptBatch, RolloutChunk


def groupwise_names(rewards: Mapping[str, RewardConfig]) -> list[str]:
    """The entries of a recipe whose models compare the samples of a prompt; loads nothing."""
    return [name for name, reward in rewards.items() if groupwise(reward_factory(name, reward))]


class WholeGroups:
    """The videos of this rank whose groups are not complete yet; they wait on the CPU.

    Args:
        size: samples of a group.
    """

    def __init__(self, size: int):
        self._size = size
        self._parts: dict[int, list[RolloutChunk]] = {}

    def completed_by(self, chunk: RolloutChunk) -> Iterator[RolloutChunk]:
        """The groups that the chunk completes, each as a chunk on the CPU without trajectories."""
        for row in dict.fromkeys(chunk.prompt_rows.tolist()):
            parts = self._parts.setdefault(row, [])
            parts.append(_part(chunk, row))
            if sum(len(part.sample_index) for part in parts) == self._size:
                yield _joined(self._parts.pop(row))

    def require_none(self, prompts: PromptBatch) -> None:
        """
        Raises:
            RewardError: after all chunks, this rank has only some samples of a prompt, or some twice.
        """
        for row, parts in self._parts.items():
            samples = describe_samples(prompts, row, [int(index) for part in parts for index in part.sample_index])
            raise RewardError(
                f"this rank has {samples} of a group of {self._size}, which a reward is to compare; take a number of "
                "prompts that the ranks divide, or one rank"
            )


def _part(chunk: RolloutChunk, row: int) -> RolloutChunk:
    """A chunk's videos of one prompt, on the CPU."""
    of_row = chunk.prompt_rows == row
    audio = None if chunk.audio is None else Audio(chunk.audio.waveform[of_row].cpu(), chunk.audio.sampling_rate)
    videos = (chunk.videos if bool(of_row.all()) else chunk.videos[of_row.to(chunk.videos.device)]).cpu()
    return RolloutChunk((), videos, chunk.prompt_rows[of_row], chunk.sample_index[of_row], audio)


def _joined(parts: Sequence[RolloutChunk]) -> RolloutChunk:
    sounds = [part.audio for part in parts if part.audio is not None]
    audio = Audio(torch.cat([sound.waveform for sound in sounds]), sounds[0].sampling_rate) if sounds else None
    videos, rows, samples = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("videos", "prompt_rows", "sample_index")
    )
    return RolloutChunk((), videos, rows, samples, audio)
