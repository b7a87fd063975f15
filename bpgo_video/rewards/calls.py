"""What is a reward model asked, and whose videos are meant where it fails? One call: a chunk's videos to one model."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

from bpgo_video.rewards.base import Clips, FrameScores, RewardError, RewardModel
from bpgo_video.types import PromptBatch

NAMED_PROMPTS = 3  # of a call that failed; an error's message has to fit on a screen
LONGEST_TEXT = 120


@dataclass(frozen=True)
class Call:
    """One call of a reward model.

    Attributes:
        reward: the recipe's name for the model.
        timeout: seconds that the call may take.
        prompt_rows, sample_index: whose the videos are, as in RolloutChunk.
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
        named = [
            f"{'sample' if len(own) == 1 else 'samples'} {', '.join(map(str, own))} of prompt "
            f"{textwrap.shorten(self.prompts.texts[row], LONGEST_TEXT)!r} (id {int(self.prompts.ids[row])})"
            for row, own in list(samples.items())[:NAMED_PROMPTS]
        ]
        more = len(samples) - len(named)
        return f"reward {self.reward!r} on {'; '.join(named)}{f' and of {more} more prompts' if more else ''}"


def ask(call: Call, model: RewardModel, clips: Clips) -> FrameScores:
    """The model's scores, oriented: higher is better; fp32, on the CPU.

    Raises:
        RewardError: the model raised, or returned something else than a row of scores per video; names the call.
    """
    try:
        found = model(clips)
    except Exception as error:  # anything, from users' own models too: told with whose videos it was about
        raise RewardError(f"{call} failed: {type(error).__name__}: {error}") from error
    shape = tuple(found.values.shape)
    if len(shape) != 2 or shape[0] != len(clips) or shape[1] == 0:
        raise RewardError(
            f"{call} returned the shape {shape} for {len(clips)} videos; it must be ({len(clips)}, scored frames)"
        )
    if shape[1] != (1 if found.times is None else len(found.times)):
        stated = "no frame times" if found.times is None else f"{len(found.times)} frame times"
        raise RewardError(f"{call} returned {shape[1]} scores a video with {stated}; the two must agree")
    values = found.values.float().cpu()
    return FrameScores(values if model.higher_is_better else -values, found.times)
