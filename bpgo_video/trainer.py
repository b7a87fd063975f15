"""How does a run go? Sample, score, weigh against the prior, update; again and again, then export and report."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from bpgo_video import engine
from bpgo_video.bpgo import GroupAdvantages
from bpgo_video.config import Config
from bpgo_video.config_io import load_config
from bpgo_video.config_rules import check_world
from bpgo_video.estimation import Memory, estimate_advantages, to_be_scored
from bpgo_video.heldout import HeldoutScores, evaluate
from bpgo_video.launch import launched
from bpgo_video.metrics import RunLog, reduce_metrics
from bpgo_video.objectives import OBJECTIVES
from bpgo_video.parallel.agreement import same_verdict
from bpgo_video.parallel.heartbeat import Heartbeat
from bpgo_video.parallel.mesh import Mesh, make_mesh
from bpgo_video.replay import Setting, optimise
from bpgo_video.results import PHASES, Progress, frame_lines, heldout_videos, shown_videos, summarise, write_results
from bpgo_video.rewards.ahead import ScoreAhead
from bpgo_video.rollout import sample_chunks, sampled_steps, training_denoiser
from bpgo_video.run_folder import check_run_dir, open_run_dir
from bpgo_video.saving import export, resume, save
from bpgo_video.selection import worth_replaying
from bpgo_video.session import Session, build_session, check_inputs
from bpgo_video.stopping import Request, StopRequests
from bpgo_video.timesteps import step_metrics, step_sums
from bpgo_video.types import PromptBatch, Rewards, RolloutChunk, Trajectory

GO_ON = "The run goes on from its last checkpoint with the same command and --run.resume auto."


class Stopwatch:
    """Seconds of a step by phase; the other ranks hear which phase this one is in.

    The phase `reward` is the time that the loop waits for scores; `reward_work` what scoring took, mostly beside it.
    """

    def __init__(self, heartbeat: Heartbeat, step: int) -> None:
        self.heartbeat, self.step = heartbeat, step
        self.started = time.perf_counter()
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.reward_work = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.heartbeat.enter(name, self.step)
        started = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()  # the device would also wait for the stream that scores
        self.seconds[name] += time.perf_counter() - started

    @property
    def total(self) -> float:
        return time.perf_counter() - self.started


def rollout_chunks(session: Session, prompts: PromptBatch, step: int) -> Iterator[RolloutChunk]:
    """This rank's samples of a training step."""
    config = session.config
    return sample_chunks(
        training_denoiser(session.policy, config),
        prompts,
        session.prompts.negative,
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
    """This rank's trajectories, and all ranks' rewards."""
    suite, rollout, device = session.suite, session.config.rollout, session.mesh.device
    trajectories_rest_on = torch.device("cpu") if rollout.offload_trajectories else device
    chunks = rollout_chunks(session, prompts, step)
    trajectories: list[Trajectory] = []
    with (
        suite.at_work(),
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
    watch.reward_work = scoring.seconds
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
        setting = Setting(session.policy, config, prompts, session.prompts.negative, session.reference)
        objective = OBJECTIVES[config.loss.objective](setting, advantages, step)
        update = optimise(session.updates, objective, trajectories, config.optim.updates_per_rollout)
    return {
        "reward": float(rewards.total.mean()),
        "reward_std": float(rewards.total.std(dim=1).mean()),
        **{f"reward/{name}": float(scores.mean()) for name, scores in rewards.by_name.items()},
        **{name: float(value) for name, value in advantages.metrics.items()},
        **reduce_metrics(update.metrics),
        **step_metrics(session.mesh.total(step_sums(update.passes, config.sampler.num_steps))),
        "learning_rate": learning_rate,
        **{f"seconds/{name}": seconds for name, seconds in watch.seconds.items()},
        "seconds/reward_work": watch.reward_work,
        "seconds": watch.total,
    }


def without_the_average(
    session: Session, trajectories: list[Trajectory], advantages: GroupAdvantages
) -> tuple[list[Trajectory], GroupAdvantages]:
    """The samples that train, and their advantages for a loss that is the mean over fewer of them."""
    apart = session.config.sampler.share_steps == "group"
    kept = worth_replaying(trajectories, advantages.trains, apart, session.mesh)
    return kept, advantages.times(len(kept) / len(trajectories))


def evaluate_heldout(session: Session, videos_to: Path | None = None) -> HeldoutScores | None:
    if session.heldout_suite is None or session.prompts.heldout is None:
        return None
    with session.evaluated_weights(), session.rollout_weights():
        return evaluate(
            session.policy,
            session.prompts.heldout,
            session.prompts.negative,
            session.heldout_suite,
            session.config,
            session.mesh,
            videos_to,
        )


def train(config: Config) -> dict[str, Any] | None:
    """The whole run on this rank; its summary, the same on every rank, or None where the run was asked to stop.

    Raises:
        ConfigError, ShardError, RewardError, CheckpointError, FloatingPointError: say what is wrong and what to do.
    """
    mesh = engine.start_ranks()
    # A launcher terminates the survivors of a dead rank: the handler must outlast the heartbeat's wait for the verdict.
    with (
        StopRequests(Path(config.run.dir), mesh) as requests,
        Heartbeat(mesh, config.parallel.heartbeat_timeout, advice=GO_ON) as heartbeat,
    ):
        return run(config, mesh, heartbeat, requests)


def run(config: Config, mesh: Mesh, heartbeat: Heartbeat, requests: StopRequests) -> dict[str, Any] | None:
    """From the checks to the report, under the heartbeat's watch."""
    started = time.perf_counter()
    check_world(config, mesh.world_size)
    mesh = make_mesh(mesh.device, config.parallel.sequence)
    run_dir = Path(config.run.dir)
    torch.manual_seed(config.run.seed)
    with same_verdict(mesh):
        check_run_dir(config)
    ds_config, shards = check_inputs(config, mesh)
    resume_from = open_run_dir(config, mesh)
    requests.forget_files()
    session = build_session(config, mesh, ds_config, shards)
    progress = Progress()
    if resume_from is not None:
        progress = resume(session, run_dir, resume_from)
        started -= progress.seconds["total"]
    elif session.heldout_suite is not None:
        heartbeat.enter("evaluation")
        before = evaluate_heldout(session, run_dir / "samples" / "before")
        if before is not None:
            progress.heldout_before = {name: scores.tolist() for name, scores in before.by_name.items()}
            progress.frames_before = {name: found.values.tolist() for name, found in before.frames.items()}
        progress.videos_generated += heldout_videos(session)
    after = run_steps(session, progress, run_dir, started, heartbeat, requests)
    if progress.step < config.run.num_steps:
        return None
    heartbeat.enter("export")
    export(session, run_dir)
    progress.seconds["total"] = time.perf_counter() - started
    summary = summarise(session, progress, after)
    if mesh.is_main:
        write_results(run_dir, summary, session, progress, after)
    mesh.barrier()
    return summary


def run_steps(
    session: Session,
    progress: Progress,
    run_dir: Path,
    started: float,
    heartbeat: Heartbeat,
    requests: StopRequests,
) -> HeldoutScores | None:
    """The loop, from where `progress` stands to the end, or to where it was asked to stop; the last held-out scores.

    Args:
        started: when the run began, on the clock of time.perf_counter, earlier launches counted in.
    """
    config = session.config
    batches = session.batches(progress.position)
    memory = Memory(progress.running_rewards, progress.agreements)
    after = None
    with RunLog(run_dir, config.wandb, config.run.num_steps, progress.step, vars(config)) as log:
        for step in range(progress.step, config.run.num_steps):
            prompts, position = next(batches)
            record = train_step(session, prompts, step, heartbeat, memory)
            advance(progress, record, position, session)
            last = step + 1 == config.run.num_steps
            every = config.evaluation.every
            if last or (every and (step + 1) % every == 0):
                heartbeat.enter("evaluation", step)
                after = evaluate_heldout(session, run_dir / "samples" / "after" if last else None)
                if after is not None:
                    record |= after.metrics()
                    progress.videos_generated += heldout_videos(session)
                    log.frames(frame_lines(session, step, after))
                    if last:
                        log.media(step, "heldout", shown_videos(session, run_dir / "samples" / "after", after))
            log.log(step, record)
            request = Request.NONE if last else requests.agreed()
            if last or request or (step + 1) % config.run.save_every == 0:
                heartbeat.enter("checkpoint", step)
                progress.seconds["total"] = time.perf_counter() - started
                saved = save(session, progress)
                log.later(str(saved), saved.metrics())
                requests.obeyed(request, f"after {step + 1} of {config.run.num_steps} steps, in {saved.folder}")
            if request is Request.STOP:
                return after
    return after or (evaluate_heldout(session, run_dir / "samples" / "after"))


def advance(progress: Progress, record: dict[str, float], position: int, session: Session) -> None:
    rollout = session.config.rollout
    progress.step += 1
    progress.position = position
    progress.videos_generated += rollout.prompts_per_step * rollout.group_size
    error = record["ratio_error_first_update_max"]
    progress.max_ratio_error_first_update = max(progress.max_ratio_error_first_update, error)
    for name in PHASES:
        progress.seconds[name] += record[f"seconds/{name}"]


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of pipelines/train_video.py."""
    config = load_config(argv, description="Post-train a video diffusion policy with BPGO under DeepSpeed.")
    with launched():
        train(config)
