"""How does a run go? Sample, score, weigh against the prior, update; again and again, then export and report."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from bpgo_video.checkpoints.checkpoint import Saved
from bpgo_video.config.bpgo import Config
from bpgo_video.config.rules import check_world
from bpgo_video.learner.bpgo import GroupAdvantages
from bpgo_video.learner.losses import with_spread
from bpgo_video.parallel.heartbeat import Heartbeat
from bpgo_video.parallel.mesh import Mesh
from bpgo_video.randomness import isolated
from bpgo_video.reports.metrics import RunLog, reduce_metrics
from bpgo_video.rewards.ahead import ScoreAhead
from bpgo_video.rollouts.objectives import OBJECTIVES
from bpgo_video.rollouts.replay import Setting, optimise
from bpgo_video.rollouts.rollout import sample_chunks, sampled_steps, training_denoiser
from bpgo_video.rollouts.selection import worth_replaying
from bpgo_video.rollouts.timesteps import step_metrics, step_sums
from bpgo_video.training.course import Dates, launch, open_run, run_steps
from bpgo_video.training.estimation import Memory, estimate_advantages, to_be_scored
from bpgo_video.training.heldout import HeldoutScores, evaluate, write_shown
from bpgo_video.training.results import (
    PHASES,
    Progress,
    frame_lines,
    heldout_videos,
    shown_table,
    shown_videos,
    summarise,
    write_results,
)
from bpgo_video.training.saving import export, resume, save
from bpgo_video.training.session import Session, build_session, check_inputs
from bpgo_video.training.stopping import StopRequests
from bpgo_video.training.stopwatch import Stopwatch
from bpgo_video.types import PromptBatch, Rewards, RolloutChunk, Trajectory

MEASURED = (("heldout", ""), ("heldout_ema", "-ema"))  # of the first and the second kind of weights: metrics, folders


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


def sample_and_score(
    session: Session, prompts: PromptBatch, step: int, watch: Stopwatch
) -> tuple[list[Trajectory], Rewards]:
    """This rank's trajectories, and all ranks' rewards.

    The phase `reward` is the time that the loop waits for scores; `reward_work` what scoring took, mostly beside it.
    """
    suite, rollout, device = session.suite, session.config.rollout, session.mesh.device
    trajectories_rest_on = torch.device("cpu") if rollout.offload_trajectories else device
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
            trajectories += [trajectory.to(trajectories_rest_on) for trajectory in chunk.trajectories]
            with watch.phase("reward"):
                scoring.put(chunk)
            del chunk  # its videos go once scored, not once the next ones are sampled
        with watch.phase("rollout"):
            weights.close()
        with watch.phase("reward"):
            rewards = suite.gather(scoring.scores(), prompts, rollout.group_size, session.mesh)
    watch.seconds["reward_work"] = scoring.seconds
    return trajectories, rewards


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
        update = optimise(session.updates, objective, trajectories, config.optim.updates_per_rollout)
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


def without_the_average(
    session: Session, trajectories: list[Trajectory], advantages: GroupAdvantages
) -> tuple[list[Trajectory], GroupAdvantages]:
    """The samples that train, and their advantages for a loss that is the mean over fewer of them."""
    apart = session.config.sampler.share_steps == "group"
    kept = worth_replaying(trajectories, advantages.trains, apart, session.mesh)
    return kept, advantages.times(len(kept) / len(trajectories))


def evaluate_heldout(session: Session, weights: str, videos_to: Path) -> HeldoutScores | None:
    """Held-out scores of one kind of weights, some videos into a folder; training goes on as if it had not been."""
    heldout, config = session.prompts.heldout, session.config
    if session.heldout_suite is None or heldout is None:
        return None
    seen = write_shown(videos_to, len(heldout), config)
    with isolated(), session.weights(weights), session.rollout_weights():
        return evaluate(session.policy, heldout, session.heldout_suite, config, session.mesh, seen)


class Training:
    """What BPGO does in each step, for the frame of course.py.

    Attributes:
        after: the last held-out scores, of the weights that the run is measured by.
    """

    def __init__(
        self, session: Session, progress: Progress, run_dir: Path, started: float, heartbeat: Heartbeat
    ) -> None:
        self.session, self.progress, self.heartbeat, self.started = session, progress, heartbeat, started
        self.after: HeldoutScores | None = None
        self._samples = run_dir / "samples"
        self._batches = session.batches(progress.position)
        self._memory = Memory(progress.running_rewards, progress.agreements)

    def step(self, number: int) -> dict[str, float]:
        prompts, position = next(self._batches)
        record = train_step(self.session, prompts, number, self.heartbeat, self._memory)
        advance(self.progress, record, position, self.session)
        return record

    def evaluate(self, step: int, last: bool, log: RunLog) -> dict[str, float]:
        name = "after" if last else f"step-{step + 1:06d}"
        scores: list[HeldoutScores] = []
        record: dict[str, float] = {}
        for kind, (prefix, end) in zip(self.session.config.evaluation.measured, MEASURED, strict=False):
            found = evaluate_heldout(self.session, kind, folder := self._samples / f"{name}{end}")
            if found is None:
                return {}
            record |= found.metrics(prefix)
            log.media(step, prefix, shown_videos(self.session, folder, found))
            self.progress.videos_generated += heldout_videos(self.session)
            scores.append(found)
        self.after = scores[0]
        if last:
            log.table(step, "heldout_before_after", shown_table(self.session, self.progress, self.after, self._samples))
        log.frames(frame_lines(self.session, step, self.after))
        return record

    def save(self) -> Saved:
        self.progress.seconds["total"] = time.perf_counter() - self.started
        return save(self.session, self.progress.step, vars(self.progress))


def train(config: Config) -> dict[str, Any] | None:
    """The whole run on this rank; its summary, the same on every rank, or None where the run was asked to stop.

    Raises:
        ConfigError, ShardError, RewardError, CheckpointError, FloatingPointError: say what is wrong and what to do.
    """
    return launch(config, run)


def run(config: Config, mesh: Mesh, heartbeat: Heartbeat, requests: StopRequests) -> dict[str, Any] | None:
    """From the checks to the report, under the heartbeat's watch."""
    started, run_dir = time.perf_counter(), Path(config.run.dir)
    check_world(config, mesh.world_size)
    mesh, (ds_config, shards), resume_from = open_run(config, mesh, requests, check_inputs)
    session = build_session(config, mesh, ds_config, shards)
    progress = Progress()
    if resume_from is not None:
        progress = Progress(**resume(session, run_dir, resume_from))
        started -= progress.seconds["total"]
    else:
        heartbeat.enter("evaluation")
        evaluate_start(session, progress, run_dir)
    training = Training(session, progress, run_dir, started, heartbeat)
    with RunLog(run_dir, config.wandb, config.run.num_steps, progress.step, vars(config)) as log:
        dates = Dates(progress.step, config.run.num_steps, config.evaluation.every, config.run.save_every)
        if not run_steps(training, dates, log, heartbeat, requests):
            return None
    after = training.after or evaluate_heldout(session, config.evaluation.measured[0], run_dir / "samples" / "after")
    heartbeat.enter("export")
    export(session, run_dir)
    progress.seconds["total"] = time.perf_counter() - started
    summary = summarise(session, progress, after)
    if mesh.is_main:
        write_results(run_dir, summary, session, progress, after)
    mesh.barrier()
    return summary


def evaluate_start(session: Session, progress: Progress, run_dir: Path) -> None:
    """The held-out scores before the first step."""
    before = evaluate_heldout(session, session.config.evaluation.measured[0], run_dir / "samples" / "before")
    if before is not None:
        progress.heldout_before = {name: scores.tolist() for name, scores in before.by_name.items()}
        progress.frames_before = {name: found.values.tolist() for name, found in before.frames.items()}
    progress.videos_generated += heldout_videos(session)


def advance(progress: Progress, record: dict[str, float], position: int, session: Session) -> None:
    rollout = session.config.rollout
    progress.step += 1
    progress.position = position
    progress.videos_generated += rollout.prompts_per_step * rollout.group_size
    error = record["ratio_error_first_update_max"]
    progress.max_ratio_error_first_update = max(progress.max_ratio_error_first_update, error)
    for name in PHASES:
        progress.seconds[name] += record[f"seconds/{name}"]
