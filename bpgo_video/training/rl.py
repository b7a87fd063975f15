"""Reinforcement learning: sample, score, anchor to the prior, weigh by trust, replay, update."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from bpgo_video.config.bpgo import Config
from bpgo_video.config.rules import check_world
from bpgo_video.distributed.heartbeat import Heartbeat
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.learner.bpgo import GroupAdvantages
from bpgo_video.learner.losses import with_spread
from bpgo_video.randomness import isolated
from bpgo_video.rewards.ahead import ScoreAhead
from bpgo_video.rollouts.objectives import OBJECTIVES
from bpgo_video.rollouts.replay import Setting, optimise
from bpgo_video.rollouts.rollout import sample_chunks, sampled_steps, training_denoiser
from bpgo_video.rollouts.selection import worth_replaying
from bpgo_video.rollouts.timesteps import step_metrics, step_sums
from bpgo_video.training import loop
from bpgo_video.training.artifacts import (
    PHASES,
    Progress,
    frame_lines,
    heldout_videos,
    shown_table,
    shown_videos,
    summarise,
    write_results,
)
from bpgo_video.training.estimation import Memory, estimate_advantages, to_be_scored
from bpgo_video.training.heldout import HeldoutScores, evaluate, write_shown
from bpgo_video.training.metrics import ROLLOUTS, RunLog, reduce_metrics
from bpgo_video.training.session import Session, build_session, check_inputs
from bpgo_video.training.stopwatch import Stopwatch
from bpgo_video.types import PromptBatch, Rewards, RolloutChunk, Trajectory

MEASURED = (("heldout", ""), ("heldout_ema", "-ema"))  # metrics and folders of the first and second kind of weights


def train_step(
    session: Session, prompts: PromptBatch, step: int, heartbeat: Heartbeat, memory: Memory | None = None
) -> dict[str, float]:
    """One rollout and its updates; the step's record."""
    config, watch, memory = session.config, Stopwatch(heartbeat, step), memory or Memory()
    prompts = to_be_scored(session, prompts, memory)
    trajectories, rewards = sample_and_score(session, prompts, step, watch)
    advantages = estimate_advantages(session, prompts, rewards, memory)
    learning_rate = session.engine.learning_rate
    with watch.phase("update"):
        if config.advantage.best_of is not None:
            trajectories, advantages = without_the_average(session, trajectories, advantages)
        setting = Setting(session.policy, config, prompts, session.mesh.device, session.reference)
        objective = OBJECTIVES[config.loss.objective](setting, advantages, step)
        update = optimise(session.engine, objective, trajectories, config.optim.updates_per_rollout)
    return {
        "reward": float(rewards.total.mean()),
        "reward_std": float(rewards.total.std(dim=1).mean()),
        **{f"reward/{name}": float(scores.mean()) for name, scores in rewards.by_name.items()},
        **{name: float(value) for name, value in advantages.metrics.items()},
        **with_spread(reduce_metrics(update.metrics)),
        **step_metrics(session.mesh.total(step_sums(update.passes, config.sampler.num_steps))),
        "learning_rate": learning_rate,
        **watch.record,
    }


def sample_and_score(
    session: Session, prompts: PromptBatch, step: int, watch: Stopwatch
) -> tuple[list[Trajectory], Rewards]:
    """This rank's trajectories, and all ranks' rewards.

    The phase `reward` is the time that the loop waits for scores; `reward_work` is what scoring took, mostly meanwhile.
    """
    suite, rollout, device = session.suite, session.config.rollout, session.mesh.device
    kept_on = torch.device("cpu") if rollout.offload_trajectories else device
    chunks = rollout_chunks(session, prompts, step)
    trajectories: list[Trajectory] = []
    with (
        suite.on_device(),
        ScoreAhead(suite, prompts, rollout.score_ahead, device) as scoring,
        ExitStack() as weights,
    ):
        with watch.phase("rollout"):
            weights.enter_context(session.rollout_weights())
        while True:
            with watch.phase("rollout"):
                chunk = next(chunks, None)
            if chunk is None:
                break
            trajectories += [trajectory.to(kept_on) for trajectory in chunk.trajectories]
            with watch.phase("reward"):
                scoring.put(chunk)
            del chunk  # its videos go once scored, not once the next ones are sampled
        with watch.phase("rollout"):
            weights.close()
        with watch.phase("reward"):
            rewards = suite.gather(scoring.scores(), prompts, rollout.group_size, session.mesh)
    watch.seconds["reward_work"] = scoring.seconds
    return trajectories, rewards


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
    )


def without_the_average(
    session: Session, trajectories: list[Trajectory], advantages: GroupAdvantages
) -> tuple[list[Trajectory], GroupAdvantages]:
    """The samples that train, and their advantages, scaled for a loss that is the mean over fewer of them."""
    apart = session.config.sampler.share_steps == "group"
    kept = worth_replaying(trajectories, advantages.trains, apart, session.mesh)
    return kept, advantages.times(len(kept) / len(trajectories))


class RL(loop.Trainer):
    """Post-training on rewards.

    Attributes:
        after: the last held-out scores, of the weights that the run is measured by.
    """

    keys = ROLLOUTS
    check_world = staticmethod(check_world)
    check_inputs = staticmethod(check_inputs)

    def __init__(self, config: Config, mesh: Mesh, inputs: Any, heartbeat: Heartbeat) -> None:
        self.session, self.heartbeat = build_session(config, mesh, *inputs), heartbeat
        self.progress = Progress()
        self.after: HeldoutScores | None = None
        self.samples = Path(config.run.dir) / "samples"
        self.weights = config.evaluation.measured

    @cached_property
    def batches(self) -> Iterator[tuple[PromptBatch, int]]:
        """The prompts of each step from here on, and the position after them."""
        return self.session.batches(self.progress.position)

    def begin(self) -> None:
        before = self.heldout(self.weights[0], "before")
        if before is not None:
            self.progress.heldout_before = {name: scores.tolist() for name, scores in before.by_name.items()}
            self.progress.frames_before = {name: found.values.tolist() for name, found in before.frames.items()}
        self.progress.videos_generated += heldout_videos(self.session)

    def train_step(self, step: int) -> dict[str, float]:
        progress, rollout = self.progress, self.session.config.rollout
        prompts, position = next(self.batches)
        memory = Memory(progress.running_rewards, progress.agreements)
        record = train_step(self.session, prompts, step, self.heartbeat, memory)
        progress.position = position
        progress.videos_generated += rollout.prompts_per_step * rollout.group_size
        error = record["ratio_error_first_update_max"]
        progress.max_ratio_error_first_update = max(progress.max_ratio_error_first_update, error)
        for name in PHASES:
            progress.seconds[name] += record[f"seconds/{name}"]
        return record

    def evaluate(self, step: int, last: bool, log: RunLog) -> dict[str, float]:
        name, scores = "after" if last else f"step-{step + 1:06d}", list[HeldoutScores]()
        record: dict[str, float] = {}
        for kind, (prefix, suffix) in zip(self.weights, MEASURED, strict=False):
            found = self.heldout(kind, f"{name}{suffix}")
            if found is None:
                return {}
            record |= found.metrics(prefix)
            log.media(step, prefix, shown_videos(self.session, self.samples / f"{name}{suffix}", found))
            self.progress.videos_generated += heldout_videos(self.session)
            scores.append(found)
        self.after = scores[0]
        if last:
            log.table(step, "heldout_before_after", shown_table(self.session, self.progress, self.after, self.samples))
        log.frames(frame_lines(self.session, step, self.after))
        return record

    def finish(self) -> dict[str, Any]:
        after = self.after or self.heldout(self.weights[0], "after")
        summary = summarise(self.session, self.progress, after)
        if self.session.mesh.is_main:
            write_results(self.samples.parent, summary, self.session, self.progress, after)
        return summary

    def heldout(self, weights: str, folder: str) -> HeldoutScores | None:
        """Held-out scores of one kind of weights, some videos into a folder of `samples`; training is not affected."""
        session, config = self.session, self.session.config
        prompts = session.prompts.heldout
        if session.heldout_suite is None or prompts is None:
            return None
        seen = write_shown(self.samples / folder, len(prompts), config)
        with isolated(), session.weights(weights), session.rollout_weights():
            return evaluate(session.policy, prompts, session.heldout_suite, config, session.mesh, seen)


def train(config: Config) -> dict[str, Any] | None:
    """`loop.train` of this kind."""
    return loop.train(config, RL)
