"""Advantages of a training step from its rewards: A, A~ and w, the same numbers on every rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from bpgo_video.learner.advantages import FrameLayout, segment_credit
from bpgo_video.learner.agreement import pooled_icc
from bpgo_video.learner.bpgo import GroupAdvantages, step_advantages
from bpgo_video.learner.priors import (
    FROM_IMAGES,
    PRIORS,
    RUNNING,
    PriorInputs,
    RunningRewards,
    image_key,
    update_running_rewards,
)
from bpgo_video.learner.rescoring import ICCHistory, icc_by_reward, needs_rescoring, reliability_of, updated_history
from bpgo_video.training.session import Session
from bpgo_video.types import PromptBatch, Rewards


@dataclass
class Memory:
    """What later steps need of earlier ones: dictionaries of plain numbers, changed in place and stored in checkpoints.

    Attributes:
        running_rewards: averages for the priors that follow the run.
        agreements: the last ICC of each prompt's scorings, under its name in checkpoints.
    """

    running_rewards: RunningRewards = field(default_factory=dict)
    agreements: ICCHistory = field(default_factory=dict)


def to_be_scored(session: Session, prompts: PromptBatch, memory: Memory) -> PromptBatch:
    """The prompts, with `again` set for those whose videos are to be scored again."""
    if not session.config.rescored:
        return prompts
    limits, ids = session.config.reliability, prompts.ids.tolist()
    again = needs_rescoring(memory.agreements, ids, limits.rescore_below, limits.rescore_every)
    return replace(prompts, again=again)


def estimate_advantages(
    session: Session, prompts: PromptBatch, rewards: Rewards, memory: Memory | None = None
) -> GroupAdvantages:
    """The advantages of a step's rewards: the same numbers on every rank.

    Args:
        memory: of the batches before this one; this batch is added after use.
    """
    memory = memory or Memory()
    config, suite = session.config, session.suite
    by_name = _on_cpu(rewards.by_name)
    image_rewards: dict[str, Tensor] = {}
    if config.prior.kind in FROM_IMAGES:
        with suite.on_device():
            image_rewards = _on_cpu(suite.score_images(prompts, config.video.num_frames, session.mesh))
    averaged = by_name | {image_key(name): scores[:, None] for name, scores in image_rewards.items()}
    inputs = PriorInputs(prompts, suite.trained_versions, averaged, memory.running_rewards, image_rewards)
    reliability, icc_metrics = reliability_of_scores(prompts, rewards, memory, config.reliability.memory)
    advantages = step_advantages(
        by_name,
        anchors=PRIORS[config.prior.kind](config.prior, inputs) if config.needs_prior else {},
        weights=suite.weights,
        bpgo=config.bpgo,
        normalisation=config.advantage,
        clip=config.loss.advantage_clip,
        trusts=config.trusts,
        frames=_on_cpu({name: rewards.per_frame[name] for name, at in rewards.frame_times.items() if at is not None}),
        reliability=reliability,
        stds=_on_cpu(rewards.stds),
        credit=credit_by_frame(session, rewards),
    )
    if config.prior.kind in RUNNING:
        memory.running_rewards |= update_running_rewards(
            memory.running_rewards, prompts.ids.tolist(), averaged, config.prior.decay, config.prior.scale
        )
    return replace(advantages, metrics={**advantages.metrics, **icc_metrics})


def reliability_of_scores(
    prompts: PromptBatch, rewards: Rewards, memory: Memory, kept: float
) -> tuple[dict[str, Float[Tensor, "prompts"]], dict[str, Tensor]]:
    """rho of each prompt's scores by reward, and metrics: the share of prompts scored again, and their pooled ICC."""
    if not rewards.scorings:
        return {}, {}
    ids = prompts.ids.tolist()
    again = torch.ones(len(prompts), dtype=torch.bool) if prompts.again is None else prompts.again
    scorings = _on_cpu(rewards.scorings)
    icc = icc_by_reward(memory.agreements, ids, scorings, again, kept)
    memory.agreements |= updated_history(memory.agreements, ids, icc, again)
    metrics = {"scored_again": again.float().mean()}
    if bool(again.any()):
        metrics |= {f"icc/{name}": pooled_icc(scores[again]).float() for name, scores in scorings.items()}
    return {name: reliability_of(icc[name], scores.shape[2], again) for name, scores in scorings.items()}, metrics


def credit_by_frame(
    session: Session, rewards: Rewards
) -> dict[str, Float[Tensor, "prompts group latent_frames"]] | None:
    """What each reward adds to a video's advantage for each latent frame; None if `credit.kind` is video."""
    credit, video, policy = session.config.credit, session.config.video, session.policy
    if credit.kind == "video":
        return None
    padding = policy.padding_frames  # latent frames that belong to no frame of the video have the video's advantage
    later_latents = policy.latent_shape(video)[1] + policy.given_frames - padding - 1
    stride = (video.num_frames - 1) // later_latents if later_latents else 1
    layout = FrameLayout(video.num_frames, video.fps, stride, policy.given_frames)
    credits = segment_credit(
        _on_cpu(rewards.per_frame), rewards.frame_times, session.suite.weights, layout, credit.gamma
    )
    return {name: F.pad(values, (padding, 0)) for name, values in credits.items()}


def _on_cpu(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: values.cpu() for name, values in scores.items()}
