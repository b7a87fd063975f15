"""The rollout of a training step: this rank samples it, and its reward models score it meanwhile.

With `rollout.sample_ahead` the next rollout is sampled, with the weights at hand, while scores of this one are pending.
Its own are then computed during this step's update. See docs/internals.md, "Sampling ahead of the update".
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from bpgo_video.rewards.score_ahead import ScoreAhead
from bpgo_video.rollouts.denoiser import training_denoiser
from bpgo_video.rollouts.rollout import chunks_of_rank, sample_chunks
from bpgo_video.rollouts.rules import sampled_steps
from bpgo_video.training.loop import Stopwatch
from bpgo_video.training.session import Session
from bpgo_video.types import PromptBatch, Rewards, RolloutChunk, Trajectory


@dataclass(frozen=True)
class Rollout:
    """This rank's samples of a training step.

    Attributes:
        scoring: of its videos, which may go on.
        age: how many steps the weights that sampled it had not been trained on yet: 0, or 1 if it was sampled ahead.
    """

    prompts: PromptBatch
    trajectories: list[Trajectory]
    scoring: ScoreAhead
    age: int

    def rewards(self, session: Session, watch: Stopwatch) -> Rewards:
        """All ranks' rewards, once their videos are scored.

        Seconds of phase `reward` are the time that this takes; `reward_work` is the time that scoring took, most of it
        during phases `rollout` and `update`.
        """
        group_size, mesh = session.config.rollout.group_size, session.mesh
        with watch.phase("reward"):
            rewards = session.suite.gather(self.scoring.scores(), self.prompts, group_size, mesh)
        watch.seconds["reward_work"] = self.scoring.seconds
        return rewards


def sample(
    session: Session, prompts: PromptBatch, step: int, watch: Stopwatch, after: Rollout | None = None
) -> Rollout:
    """Sample this rank's share of a step; inside `suite.on_device()`, which stays open until it is scored.

    Args:
        after: the rollout of the step before, whose scores are pending.
    """
    config, mesh = session.config, session.mesh
    stored_on = torch.device("cpu") if config.rollout.offload_trajectories else mesh.device
    waiting = chunks_of_rank(config.rollout, mesh) if config.rollout.sample_ahead else config.rollout.score_ahead
    chunks = rollout_chunks(session, prompts, step)
    trajectories: list[Trajectory] = []
    before = after.scoring if after else None
    scoring = ScoreAhead(session.suite, prompts, waiting, mesh.device, before, config.rollout.group_size)
    with scoring, ExitStack() as weights:
        with watch.phase("rollout"):
            weights.enter_context(session.sampling_weights())
            weights.enter_context(session.rollout_weights())
        while True:
            with watch.phase("rollout"):
                chunk = next(chunks, None)
            if chunk is None:
                break
            trajectories += [trajectory.to(stored_on) for trajectory in chunk.trajectories]
            with watch.phase("reward"):
                scoring.put(chunk)
            del chunk  # frees its videos as soon as they are scored
        with watch.phase("rollout"):
            weights.close()
    return Rollout(prompts, trajectories, scoring, age=int(after is not None))


def sample_and_score(
    session: Session, prompts: PromptBatch, step: int, watch: Stopwatch
) -> tuple[list[Trajectory], Rewards]:
    """This rank's trajectories and all ranks' rewards, without sampling ahead."""
    with session.suite.on_device():
        rollout = sample(session, prompts, step, watch)
        return rollout.trajectories, rollout.rewards(session, watch)


def rollout_chunks(session: Session, prompts: PromptBatch, step: int) -> Iterator[RolloutChunk]:
    """This rank's samples of a training step."""
    config = session.config
    return sample_chunks(
        training_denoiser(session.policy, config),
        prompts,
        session.mesh,
        group_size=config.rollout.group_size,
        micro_batch_size=config.rollout.micro_batch_size,
        latent_shape=session.policy.latent_shape(config.video),
        key=(config.run.seed, "rollout", step),
        trained_steps=sampled_steps(session.policy, config, step),
        same_start=config.rollout.same_start,
        branching=config.rollout.branches,
    )
