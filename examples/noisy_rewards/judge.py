"""A judge that is right about some prompts and guesses about the others, as a reward model does outside of its data."""

import torch

from bpgo_video.rewards import Clips, FrameScores, RewardModel
from bpgo_video.rewards.tiny_rewards import ShapesOracle


class Judge(RewardModel):
    """The exact score of the embedded world, but a random number for prompts with a word of `blind`.

    Args:
        blind: words that the judge does not understand.
        seed: of its guesses. Another seed is another judge with the same blind spot.
    """

    name, kind = "judge", "test"

    def __init__(self, blind: list[str], seed: int = 0):
        self.blind, self.seed, self.oracle = set(blind), seed, ShapesOracle()
        self.version = f"1-{'-'.join(blind)}-{seed}"

    def __call__(self, clips: Clips) -> FrameScores:
        scores = self.oracle(clips).values.mean(dim=1, keepdim=True)  # one score per video
        for row, text in enumerate(clips.texts):
            if self.blind & set(text.split()):
                # A function of the video: whoever scores it again, on whichever rank, gets the same guess.
                pixels = int(clips.videos[row].double().sum() * 1e6)
                scores[row] = torch.rand(1, generator=torch.Generator().manual_seed(pixels + self.seed))
        return FrameScores(scores)
