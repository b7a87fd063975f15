"""Anchors and advantages: the starting policy's rewards on each prompt before training, and A, A~ and w of each step.

The reference prior of arXiv 2511.18919 is the starting policy's mean reward on each prompt, and its scale s_ref.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from bpgo_video.config.bpgo import Config, ConfigError
from bpgo_video.config.rules import OWNER
from bpgo_video.data.priors import UnfinishedPriors, write_priors
from bpgo_video.data.reader import PromptShards
from bpgo_video.data.stream import as_batch
from bpgo_video.distributed.ds_config import compute_dtype
from bpgo_video.distributed.heartbeat import Heartbeat
from bpgo_video.distributed.mesh import Mesh, all_or_none, from_main
from bpgo_video.files import fingerprint
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
from bpgo_video.policies import Policy
from bpgo_video.rewards.suite import RewardSuite
from bpgo_video.rollouts.conditioning import conditioned, image_size
from bpgo_video.rollouts.denoiser import training_denoiser
from bpgo_video.rollouts.rules import sampled_steps
from bpgo_video.training.heldout import score_samples
from bpgo_video.training.inputs import check_inputs
from bpgo_video.training.lease import Lease
from bpgo_video.training.session import Session, sampling_policy
from bpgo_video.types import PriorAnchor, PromptBatch, Rewards

PROMPTS_AT_ONCE = 64  # gathered and saved together


def estimate_priors(config: Config, mesh: Mesh, heartbeat: Heartbeat) -> dict[str, Float[Tensor, "prompts samples"]]:
    """Score the starting policy on all prompts of the training split; rank 0 writes the priors.

    An interrupted estimation with the same settings continues with the prompts that are missing.

    Returns:
        Scores by reward name.

    Raises:
        ConfigError: a reward gives all samples of every prompt the same score.
        OwnedError: another launch measures priors of these prompts.
    """
    ds_config, shards = check_inputs(config, mesh, need_priors=False)
    folder = shards.directory / "priors"
    with Lease(folder / OWNER) as lease:
        lease.on_loss = heartbeat.abort
        with all_or_none(mesh):
            if mesh.is_main:
                folder.mkdir(exist_ok=True)
                lease.acquire()
        return _estimate(config, mesh, ds_config, shards, lease)


def _estimate(
    config: Config, mesh: Mesh, ds_config: Mapping[str, Any], shards: PromptShards, lease: Lease
) -> dict[str, Float[Tensor, "prompts samples"]]:
    suite = RewardSuite(config.rewards, mesh.device, config.video.fps)
    policy = sampling_policy(config, ds_config, mesh)
    policy_hash = fingerprint(policy.folder, policy.transformer_names)
    notes = UnfinishedPriors(shards.directory, settings_of(config, suite.versions, policy_hash))
    known = from_main(notes.begin() if mesh.is_main else {}, mesh)
    rows = shards.rows(config.data.split)
    ids = shards.ids(rows).tolist()
    missing = [row for row, prompt in zip(rows.tolist(), ids, strict=True) if prompt not in known]
    dtype, done = compute_dtype(ds_config), len(ids) - len(missing)
    with tqdm(total=len(ids), initial=done, desc="priors", unit="prompt", disable=not mesh.is_main) as bar:
        for start in range(0, len(missing), PROMPTS_AT_ONCE):
            records = [shards.record(row) for row in missing[start : start + PROMPTS_AT_ONCE]]
            batch = as_batch(records, image_size(config, policy))
            batch = conditioned(batch, policy, config, dtype, mesh, config.prior.samples)
            by_name = score_prompts(config, policy, batch, suite, mesh).by_name
            new = {
                prompt: {name: scores[row].tolist() for name, scores in by_name.items()}
                for row, prompt in enumerate(batch.ids.tolist())
            }
            known |= new
            lease.check()
            if mesh.is_main:
                notes.add(new)
            bar.update(len(batch))
    scores = {name: torch.tensor([known[prompt][name] for prompt in ids]) for name in suite.versions}
    anchors = {name: measured(name, scores[name], version) for name, version in suite.versions.items()}
    lease.check()
    if mesh.is_main:
        for name, anchor in anchors.items():
            store(shards.directory, name, anchor, policy_hash, ids)
        notes.remove()
    mesh.barrier()
    return scores


def settings_of(config: Config, versions: Mapping[str, str], policy_hash: str) -> dict[str, str]:
    """Everything that the scores depend on, as text."""
    sections = {name: repr(getattr(config, name)) for name in ("policy", "video", "sampler", "data")}
    draws = f"seed {config.run.seed}, {config.prior.samples} samples"
    return {**sections, "rewards": repr(dict(versions)), "policy hash": policy_hash, "draws": draws}


def score_prompts(config: Config, policy: Policy, prompts: PromptBatch, suite: RewardSuite, mesh: Mesh) -> Rewards:
    """Score `prior.samples` videos per prompt, made by the training sampler with noise that no training step draws."""
    steps = sampled_steps(policy, config, step=-1)(0)  # the same for all prompts: a micro-batch may hold several
    denoiser = training_denoiser(policy, config)
    return score_samples(denoiser, prompts, suite, config, mesh, config.prior.samples, "prior", lambda prompt: steps)


def measured(name: str, scores: Float[Tensor, "prompts samples"], version: str) -> PriorAnchor:
    """The anchor of a reward's scores; raises ConfigError if they have no deviation to scale by."""
    try:
        return PriorAnchor.of_samples(scores, version)
    except ValueError as error:
        raise ConfigError(f"reward {name!r}: {error}; it cannot tell the samples apart, use another reward") from error


def store(directory: Path, name: str, anchor: PriorAnchor, policy_hash: str, ids: Sequence[int]) -> None:
    """Write the anchors of one reward, and print a summary."""
    rows = zip(anchor.mean.tolist(), anchor.std.tolist(), anchor.count.tolist(), strict=True)
    path = write_priors(directory, name, anchor.version, anchor.scale, policy_hash, dict(zip(ids, rows, strict=True)))
    mean, samples = float(anchor.mean.mean()), int(anchor.count[0])
    print(f"{path}: {len(ids)} prompts x {samples} samples, mean {mean:.4f}, s_ref {anchor.scale:.4f}")


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
