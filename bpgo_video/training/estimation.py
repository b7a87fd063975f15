"""From a step's gathered rewards to its advantages, with what the run remembers of its prompts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from bpgo_video.learner import rescoring
from bpgo_video.learner.bpgo import GroupAdvantages, step_advantages
from bpgo_video.learner.credit import FrameLayout, segment_credit
from bpgo_video.learner.priors import FROM_IMAGES, PRIORS, RUNNING, PriorInputs, image_key
from bpgo_video.learner.reliability import pooled_consistency
from bpgo_video.learner.rescoring import Agreements
from bpgo_video.learner.running_priors import RunningRewards, updated
from bpgo_video.training.session import Session
from bpgo_video.types import PromptBatch, Rewards


@dataclass
class Memory:
    """What steps leave for later ones: dictionaries of plain numbers that change in place, and that checkpoints keep.

    Attributes:
        running_rewards: averages behind the priors that follow the run.
        agreements: how well two scorings of each prompt agreed.
    """

    running_rewards: RunningRewards = field(default_factory=dict)
    agreements: Agreements = field(default_factory=dict)


def to_be_scored(session: Session, prompts: PromptBatch, memory: Memory) -> PromptBatch:
    """The prompts, marked where their videos are to be scored twice."""
    if not session.config.bpgo.scores_twice:
        return prompts
    budget = session.config.reliability
    ids = prompts.ids.tolist()
    return replace(prompts, twice=rescoring.due(memory.agreements, ids, budget.rescore_below, budget.rescore_every))


def estimate_advantages(
    session: Session, prompts: PromptBatch, rewards: Rewards, memory: Memory | None = None
) -> GroupAdvantages:
    """Group-relative advantages, trust and anchored renormalisation: the same numbers on every rank.

    Args:
        memory: of the batches before this one; this batch goes into it after use.
    """
    memory = memory or Memory()
    prior, suite = session.config.prior, session.suite
    by_name = {name: scores.cpu() for name, scores in rewards.by_name.items()}
    first_frames: dict[str, Tensor] = {}
    if prior.kind in FROM_IMAGES:
        with suite.on_device():
            images = suite.score_images(prompts, session.config.video.num_frames, session.mesh)
        first_frames = {name: scores.cpu() for name, scores in images.items()}
    averaged = by_name | {image_key(name): scores[:, None] for name, scores in first_frames.items()}
    seen = PriorInputs(prompts, suite.versions, averaged, memory.running_rewards, first_frames)
    anchors = PRIORS[prior.kind](prior, seen) if session.learner.needs_prior else {}
    icc, agreed = agreement(prompts, rewards, memory)
    by_frame = credit_by_frame(session, rewards)
    found = step_advantages(by_name, anchors, suite.weights, session.learner, session.advantages, icc, by_frame)
    if prior.kind in RUNNING:
        memory.running_rewards |= updated(
            memory.running_rewards, prompts.ids.tolist(), averaged, prior.decay, prior.scale
        )
    return replace(found, metrics={**found.metrics, **agreed})


def agreement(
    prompts: PromptBatch, rewards: Rewards, memory: Memory
) -> tuple[dict[str, Float[Tensor, "prompts"]], dict[str, Tensor]]:
    """Each prompt's ICC by reward, and of the prompts that were scored twice the pooled one, for the log."""
    if not rewards.second:
        return {}, {}
    ids = prompts.ids.tolist()
    twice = torch.ones(len(prompts), dtype=torch.bool) if prompts.twice is None else prompts.twice
    first, second = ({name: scores.cpu() for name, scores in by.items()} for by in (rewards.by_name, rewards.second))
    icc = rescoring.agreement(memory.agreements, ids, first, second, twice)
    memory.agreements |= rescoring.updated(memory.agreements, ids, icc, twice)
    metrics = {"scored_twice": twice.float().mean()}
    if bool(twice.any()):
        pairs = {name: torch.stack([first[name], scores], dim=2)[twice] for name, scores in second.items()}
        metrics |= {f"icc/{name}": pooled_consistency(pair).float() for name, pair in pairs.items()}
    return icc, metrics


def credit_by_frame(session: Session, rewards: Rewards) -> Float[Tensor, "prompts group latent_frames"] | None:
    """What each latent frame adds to its video's advantage, where frames are credited."""
    credit = session.config.credit
    if credit.kind == "video":
        return None
    video, policy = session.config.video, session.policy
    padding = policy.padding_frames  # no frame of the video is theirs: they take the video's own advantage
    later_latents = policy.latent_shape(video)[1] + policy.given_frames - padding - 1
    stride = (video.num_frames - 1) // later_latents if later_latents else 1
    per_frame = {name: scores.cpu() for name, scores in rewards.per_frame.items()}
    layout = FrameLayout(video.num_frames, video.fps, stride, policy.given_frames)
    found = segment_credit(per_frame, rewards.frame_times, session.suite.weights, layout, credit.gamma)
    return F.pad(found, (padding, 0))
