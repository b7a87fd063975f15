"""Advantages of a training step from its rewards: A, A~ and w, the same numbers on every rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from bpgo_video.learner.advantages import FrameLayout, segment_credit
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
from bpgo_video.learner.trust import ICCHistory, icc_by_reward, needs_second_scoring, pooled_icc, updated_history
from bpgo_video.training.session import Session
from bpgo_video.types import PromptBatch, Rewards


@dataclass
class Memory:
    """What later steps need of earlier ones: dictionaries of plain numbers, changed in place and stored in checkpoints.

    Attributes:
        running_rewards: averages for the priors that follow the run.
        agreements: the last ICC of two scorings of each prompt, under its name in checkpoints.
    """

    running_rewards: RunningRewards = field(default_factory=dict)
    agreements: ICCHistory = field(default_factory=dict)


def to_be_scored(session: Session, prompts: PromptBatch, memory: Memory) -> PromptBatch:
    """The prompts, with `twice` set for those whose videos are to be scored twice."""
    if not session.config.bpgo.scores_twice:
        return prompts
    limits, ids = session.config.reliability, prompts.ids.tolist()
    twice = needs_second_scoring(memory.agreements, ids, limits.rescore_below, limits.rescore_every)
    return replace(prompts, twice=twice)


def estimate_advantages(
    session: Session, prompts: PromptBatch, rewards: Rewards, memory: Memory | None = None
) -> GroupAdvantages:
    """A, A~ and w of a step's rewards: the same numbers on every rank.

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
    inputs = PriorInputs(prompts, suite.versions, averaged, memory.running_rewards, image_rewards)
    by_frame = credit_by_frame(session, rewards)
    icc, icc_metrics = icc_of_scorings(prompts, rewards, memory)
    advantages = step_advantages(
        by_name,
        anchors=PRIORS[config.prior.kind](config.prior, inputs) if config.bpgo.needs_prior else {},
        weights=suite.weights,
        bpgo=config.bpgo,
        normalisation=config.advantage,
        clip=config.loss.advantage_clip,
        icc=icc,
        by_frame=by_frame,
    )
    if config.prior.kind in RUNNING:
        memory.running_rewards |= update_running_rewards(
            memory.running_rewards, prompts.ids.tolist(), averaged, config.prior.decay, config.prior.scale
        )
    return replace(advantages, metrics={**advantages.metrics, **icc_metrics})


def icc_of_scorings(
    prompts: PromptBatch, rewards: Rewards, memory: Memory
) -> tuple[dict[str, Float[Tensor, "prompts"]], dict[str, Tensor]]:
    """Each prompt's ICC by reward, and metrics: the share of prompts scored twice, and their pooled ICC."""
    if not rewards.second:
        return {}, {}
    ids = prompts.ids.tolist()
    twice = torch.ones(len(prompts), dtype=torch.bool) if prompts.twice is None else prompts.twice
    first, second = _on_cpu(rewards.by_name), _on_cpu(rewards.second)
    icc = icc_by_reward(memory.agreements, ids, first, second, twice)
    memory.agreements |= updated_history(memory.agreements, ids, icc, twice)
    metrics = {"scored_twice": twice.float().mean()}
    if bool(twice.any()):
        pairs = {name: torch.stack([first[name], scores], dim=2)[twice] for name, scores in second.items()}
        metrics |= {f"icc/{name}": pooled_icc(pair).float() for name, pair in pairs.items()}
    return icc, metrics


def credit_by_frame(session: Session, rewards: Rewards) -> Float[Tensor, "prompts group latent_frames"] | None:
    """What is added to a video's advantage for each latent frame; None if `credit.kind` is video."""
    credit, video, policy = session.config.credit, session.config.video, session.policy
    if credit.kind == "video":
        return None
    padding = policy.padding_frames  # latent frames that belong to no frame of the video have the video's advantage
    later_latents = policy.latent_shape(video)[1] + policy.given_frames - padding - 1
    stride = (video.num_frames - 1) // later_latents if later_latents else 1
    layout = FrameLayout(video.num_frames, video.fps, stride, policy.given_frames)
    by_frame = segment_credit(
        _on_cpu(rewards.per_frame), rewards.frame_times, session.suite.weights, layout, credit.gamma
    )
    return F.pad(by_frame, (padding, 0))


def _on_cpu(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: values.cpu() for name, values in scores.items()}
