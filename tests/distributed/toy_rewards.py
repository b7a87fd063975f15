"""Rewards for tests: a learnable one and several that fail."""

from __future__ import annotations

import os
import signal
import time

import torch

from bpgo_video.rewards import Clips, FrameSampling, FrameScores


class Redness:
    """Mean of the red channel, per frame."""

    name, version = "redness", "1"
    range = (0.0, 1.0)
    higher_is_better, differentiable, kind = True, True, "test"
    frames = FrameSampling()

    def __call__(self, clips: Clips) -> FrameScores:
        return FrameScores(clips.videos[:, :, 0].mean(dim=(2, 3)), clips.times)


class Loudness(Redness):
    """Root mean square of the sound, a score of the whole video."""

    name, listens = "loudness", True

    def __call__(self, clips: Clips) -> FrameScores:
        assert clips.audio is not None
        return FrameScores(clips.audio.waveform.square().mean(dim=(1, 2)).sqrt()[:, None])


class Cyan(Redness):
    """The opposite of redness, a score of the whole video: it falls while a policy learns redness."""

    def __call__(self, clips: Clips) -> FrameScores:
        return FrameScores(1 - clips.videos[:, :, 0].mean(dim=(1, 2, 3))[:, None])


class NanOnSecondRank(Redness):
    """Returns NaN for one sample on the last rank from the third call on."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, clips: Clips) -> FrameScores:
        self.calls += 1
        scores = super().__call__(clips)
        if self.calls > 2 and torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            scores.values[-1, 0] = torch.nan
        return scores


class BreaksOnSecondRank(Redness):
    """Raises only on the last rank."""

    def __call__(self, clips: Clips) -> FrameScores:
        if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            raise RuntimeError("the reward model ran out of patience")
        return super().__call__(clips)


class HangsOnSecondRank(Redness):
    """Never returns on the last rank."""

    def __call__(self, clips: Clips) -> FrameScores:
        if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            time.sleep(3600)
        return super().__call__(clips)


class Drawn(Redness):
    """Redness plus a draw of torch's global generator."""

    def __call__(self, clips: Clips) -> FrameScores:
        scores = super().__call__(clips)
        return FrameScores(scores.values + 0.01 * torch.randn_like(scores.values), scores.times)


class ScriptedRedness(Redness):
    """Redness that sleeps, fails or dies at "RANK CALL" (counted from 0) of REWARD_SLEEPS, REWARD_FAILS or REWARD_DIES.

    It dies a second later, when the concurrent rollout has ended and the loop waits for the scores.
    """

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, clips: Clips) -> FrameScores:
        now = f"{torch.distributed.get_rank()} {self.calls}"
        self.calls += 1
        if os.environ.get("REWARD_SLEEPS") == now:
            time.sleep(8)
        if os.environ.get("REWARD_FAILS") == now:
            raise RuntimeError("the reward model ran out of patience")
        if os.environ.get("REWARD_DIES") == now:
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(clips)


class Blind(Redness):
    """The same score for every video."""

    def __call__(self, clips: Clips) -> FrameScores:
        return FrameScores(torch.full((len(clips), 1), 0.5))
