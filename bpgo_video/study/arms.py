"""An arm of the study: how a step's videos are scored, and the advantages that the learner makes of the scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bpgo_video.learner.advantages import DELTA, group_relative
from bpgo_video.learner.agreement import frame_agreement
from bpgo_video.learner.bpgo import rms_quotient, step_advantages
from bpgo_video.learner.priors import RunningRewards, first_average, update_running_rewards
from bpgo_video.learner.rescoring import ICCHistory, icc_by_reward, needs_rescoring, reliability_of, updated_history
from bpgo_video.study.draws import Draws
from bpgo_video.study.judges import Judge
from bpgo_video.study.preregistration import Arm
from bpgo_video.study.reliability import SOURCES, Scored, averaged
from bpgo_video.study.world import Rows, Samples, World
from bpgo_video.types import PriorAnchor

Scores = Float[Tensor, "prompts group"]
Frames = Float[Tensor, "prompts group frames"]
Scorings = Mapping[str, Float[Tensor, "prompts group scorings"]]
Mask = Bool[Tensor, "prompts"]
PRIOR_DECAY = 0.9  # of the running prior, a recipe's default


@dataclass
class ArmLearner:
    """The learner of one run: it keeps running priors, and the last ICC of each prompt.

    Attributes:
        judges: by name.
        anchors: of all prompts, by judge, for reference priors.
        scorings: of a video by all judges, summed over steps.
    """

    arm: Arm
    world: World
    judges: Mapping[str, Judge]
    draws: Draws
    anchors: Mapping[str, PriorAnchor]
    scorings: float = 0.0
    running: RunningRewards = field(default_factory=dict)
    history: ICCHistory = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.bpgo, self.normalisation = self.arm.learner

    def advantage(self, step: int, rows: Rows, samples: Samples) -> Scores:
        """w A + zeta A~ of a step, with the RMS that GRPO's advantage has on one reward."""
        scored = self.scored(step, rows, samples)
        rewards, rho = scored.trained, SOURCES[self.arm.rho](scored)
        found = step_advantages(
            rewards,
            self.anchors_of(rows, rewards),
            dict.fromkeys(rewards, 1.0),
            self.bpgo,
            self.normalisation,
            frames=scored.frames,
            reliability=averaged(rho) if self.arm.average_trust else rho,
        )
        total, first = found.advantage, next(iter(rewards.values()))
        if found.contrastive is not None:
            total = total + self.bpgo.zeta * found.contrastive
        if self.arm.shrunk_baseline:
            total = total + shrunk_offset(first)[:, None]
        return total * rms_quotient(group_relative(first), total)

    def scored(self, step: int, rows: Rows, samples: Samples) -> Scored:
        """The step's scores by the arm's judges."""
        truth, uniform = self.world.reward(rows, samples), self.draws.uniform[step]
        if self.arm.trains_on == "truth":
            self.scorings += 1
            alike = truth[..., None].expand(-1, -1, self.draws.sizes.frames)
            return Scored({"truth": truth}, {"truth": alike}, {}, truth, uniform)
        by_judge = {
            name: torch.stack(
                [judge.frames(rows, samples, self.draws.scoring(step, index, k)) for k in range(self.arm.scorings)]
            )
            for index, (name, judge) in enumerate(self.judges.items())
        }
        again = self.scored_again(rows, {name: of[0] for name, of in by_judge.items()})
        self.scorings += len(by_judge) * (1 + (self.arm.scorings - 1) * float(again.double().mean()))
        frames = {name: self.frames_that_train(of, again) for name, of in by_judge.items()}
        videos = {name: of.mean(dim=3).permute(1, 2, 0) for name, of in by_judge.items()}
        trained = {name: of.mean(dim=2) for name, of in frames.items()}
        if self.arm.trains_on == "pessimistic":
            trained = {name: of - self.arm.pessimism * videos[name].var(dim=2) for name, of in trained.items()}
        return Scored(trained, frames, self.repeated(rows, videos, again), truth, uniform)

    def scored_again(self, rows: Rows, first: Mapping[str, Frames]) -> Mask:
        """Which prompts are scored more than once."""
        below, every = self.arm.rescore_below, self.arm.rescore_every
        if self.arm.rescore == "icc":
            return needs_rescoring(self.history, rows.tolist(), below, every)
        if self.arm.rescore == "frames":
            return torch.stack([frame_agreement(frames) < below for frames in first.values()]).any(dim=0)
        return torch.ones(len(rows), dtype=torch.bool)

    def frames_that_train(self, scorings: Float[Tensor, "scorings prompts group frames"], again: Mask) -> Frames:
        """The mean over the scorings of a prompt, or the first."""
        if self.arm.trains_on == "first":
            return scorings[0]
        return torch.where(again[:, None, None], scorings.mean(dim=0), scorings[0])

    def repeated(self, rows: Rows, scorings: Scorings, again: Mask) -> dict[str, Float[Tensor, "prompts"]]:
        """rho of the scores that train, by judge; empty where videos are scored once."""
        if self.arm.scorings == 1 or self.arm.rescore == "frames":
            return {}
        ids = rows.tolist()
        icc = icc_by_reward(self.history, ids, scorings, again, self.arm.memory)
        self.history = updated_history(self.history, ids, icc, again)
        averaged_over = 1 if self.arm.trains_on == "first" else self.arm.scorings
        return {name: reliability_of(of, averaged_over, again) for name, of in icc.items()}

    def anchors_of(self, rows: Rows, rewards: Mapping[str, Scores]) -> dict[str, PriorAnchor]:
        """The step's anchors; a running prior is updated after it is read."""
        if self.arm.prior == "none":
            return {}
        if self.arm.prior == "reference":
            found = {name: self.anchors[name] for name in rewards}
            return {
                name: PriorAnchor(of.mean[rows], of.std[rows], of.count[rows], of.scale) for name, of in found.items()
            }
        means = {name: self.running.get(name) or first_average(of, None) for name, of in rewards.items()}
        self.running = update_running_rewards(self.running, rows.tolist(), rewards, PRIOR_DECAY, None)
        return {
            name: PriorAnchor.without_samples(
                torch.full((len(rows),), of["mean"], dtype=torch.float64), of["spread"] or 1.0
            )
            for name, of in means.items()
        }


def reference_anchor(world: World, judge: Judge, draws: Draws, judge_index: int) -> PriorAnchor:
    """The anchors of all prompts: scores of samples of the starting policy, as `bpgo-video priors` measures them."""
    rows, noise, scoring = draws.reference(judge_index)
    samples = world.samples(world.start(), rows, noise)
    return PriorAnchor.of_samples(judge.frames(rows, samples, scoring).mean(dim=2))


def shrunk_offset(rewards: Scores) -> Float[Tensor, "prompts"]:
    """What is added to A_ij if the baseline is the group's mean, shrunk towards the mean of the step.

    James and Stein: b_i = m_i + l (m - m_i), l = min(1, (P - 3) v / sum_i (m_i - m)^2) with v the sampling variance of
    a group's mean, pooled over the step's P groups. A_ij becomes (R_ij - b_i)/s_i = A_ij + l (m_i - m)/s_i.
    """
    means, variances = rewards.mean(dim=1), rewards.var(dim=1)
    between = (means - means.mean()).square().sum()
    sampling = variances.mean() / rewards.shape[1]
    share = ((len(means) - 3) * sampling / between).clamp(0, 1) if between > 0 else torch.ones_like(between)
    return share * (means - means.mean()) / (variances.sqrt() + DELTA)
