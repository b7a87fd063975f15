"""Where the reliability rho of an arm comes from: scorings, frames, other judges, the truth, or what tells nothing.

Each source gives a rho in [0, 1] per prompt and judge, which the learner's trust `reliability` turns into a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bpgo_video.learner.advantages import group_relative
from bpgo_video.learner.agreement import correlation, frame_agreement, group_icc, spearman_brown

Scores = Float[Tensor, "prompts group"]
PerPrompt = Float[Tensor, "prompts"]
ByJudge = Mapping[str, PerPrompt]


@dataclass(frozen=True)
class Scored:
    """A step's scores.

    Attributes:
        trained: the scores that train, by judge.
        frames: of the scores that train, by judge.
        repeated: rho of `trained` by repeated scoring, by judge; empty where each video is scored once.
        truth: the true rewards.
        uniform: random numbers in [0, 1).
    """

    trained: Mapping[str, Scores]
    frames: Mapping[str, Float[Tensor, "prompts group frames"]]
    repeated: ByJudge
    truth: Scores
    uniform: PerPrompt


def scorings(scored: Scored) -> ByJudge:
    """Agreement of repeated scorings."""
    return scored.repeated


def scorings_and_frames(scored: Scored) -> ByJudge:
    """Mean of the agreement of scorings and that of frames."""
    return {name: (scored.repeated[name] + frame_agreement(of)) / 2 for name, of in scored.frames.items()}


def judges(scored: Scored) -> ByJudge:
    """Agreement of the judges' z-scores, as the reliability of their sum; the same for each of them."""
    z = torch.stack([group_relative(scores) for scores in scored.trained.values()], dim=2)
    rho = spearman_brown(group_icc(z), z.shape[2])
    return dict.fromkeys(scored.trained, rho)


def truth(scored: Scored) -> ByJudge:
    """The share of the scores' variance that the truth explains; 0 where they contradict it."""
    return {name: correlation(scores, scored.truth).clamp(0, 1).square() for name, scores in scored.trained.items()}


def random(scored: Scored) -> ByJudge:
    """A placebo."""
    return dict.fromkeys(scored.trained, scored.uniform)


def spread_up(scored: Scored) -> ByJudge:
    """Rank of the group's standard deviation among the step's, from 0 to 1."""
    return {name: ranks(scores.std(dim=1)) for name, scores in scored.trained.items()}


def spread_down(scored: Scored) -> ByJudge:
    """1 minus that rank."""
    return {name: 1 - rank for name, rank in spread_up(scored).items()}


def unknown(scored: Scored) -> ByJudge:
    """None: the arm's trust needs no reliability."""
    return {}


SOURCES: dict[str | None, Callable[[Scored], ByJudge]] = {
    None: unknown,
    "scorings": scorings,
    "scorings_and_frames": scorings_and_frames,
    "judges": judges,
    "truth": truth,
    "random": random,
    "spread_up": spread_up,
    "spread_down": spread_down,
}


def averaged(rho: ByJudge) -> ByJudge:
    """The mean over judges, for each of them."""
    return dict.fromkeys(rho, torch.stack(list(rho.values())).mean(dim=0))


def ranks(values: PerPrompt) -> PerPrompt:
    """From 0, the smallest, to 1."""
    return values.argsort().argsort().double() / max(1, len(values) - 1)
