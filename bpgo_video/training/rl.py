"""Reinforcement learning: sample, score, anchor to the prior, weigh by trust, replay, update."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from bpgo_video.config.bpgo import Config
from bpgo_video.distributed.heartbeat import Heartbeat
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.files import write_json
from bpgo_video.learner.bpgo import GroupAdvantages
from bpgo_video.learner.losses import with_spread
from bpgo_video.learner.metrics import trust_by_kind
from bpgo_video.randomness import isolated
from bpgo_video.rollouts.prior_sampling import check_anchors
from bpgo_video.rollouts.replay import OBJECTIVES, samples_to_replay
from bpgo_video.rollouts.updates import AVERAGE, OLDER, Objective, UpdateStats, optimise, step_metrics, step_sums
from bpgo_video.training import loop
from bpgo_video.training.alarm import AlarmMemory
from bpgo_video.training.environment import environment
from bpgo_video.training.estimation import Memory, estimate_advantages, to_be_scored
from bpgo_video.training.heldout import HeldoutScores, ShownVideos, evaluate, heldout_summary, look_summary
from bpgo_video.training.inputs import Inputs
from bpgo_video.training.metrics import METRICS_FILE, ROLLOUTS, Keys, RunLog, read_metrics, reduce_metrics
from bpgo_video.training.report import LiveReport, write_report
from bpgo_video.training.response import alarm_summary, ended, raised, respond
from bpgo_video.training.sampling import Rollout, sample
from bpgo_video.training.session import Session, build_session
from bpgo_video.training.summary import diagnose, reversals, summary_table
from bpgo_video.types import PromptBatch, Rewards, Trajectory

KINDS = 6  # the most frequent tags, whose trust is recorded
PHASES = ("rollout", "reward", "update")
EVALUATED = (("heldout", ""), ("heldout_ema", "-ema"))  # metric prefix and folder suffix of each kind of weights
RESULTS = ("report.html", "summary.json", "metrics.jsonl", "config.yaml", "samples", "checkpoints", "export")


@dataclass
class Progress(Memory, AlarmMemory):
    """The run's progress, which checkpoints keep, with what its steps and evaluations remember.

    Attributes:
        position: number of prompts consumed.
        sampled_ahead: number of steps whose rollouts the weights of the step before sampled.
        max_ratio_error_first_update: of the other steps.
    """

    step: int = 0
    position: int = 0
    videos_generated: int = 0
    sampled_ahead: int = 0
    max_ratio_error_first_update: float = 0.0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("total", *PHASES), 0.0))
    heldout_before: dict[str, list[list[float]]] | None = None
    frames_before: dict[str, list[list[float]]] = field(default_factory=dict)
    look_before: dict[str, list[list[float]]] = field(default_factory=dict)

    def count(self, record: dict[str, float], videos: int) -> None:
        """Add a training step."""
        self.videos_generated += videos
        self.sampled_ahead += OLDER in record
        self.trained.append((self.step + 1, record["reward"]))
        error = record.get("ratio_error_first_update_max", 0.0)
        self.max_ratio_error_first_update = max(self.max_ratio_error_first_update, error)
        for name in PHASES:
            self.seconds[name] += record[f"seconds/{name}"]


class RL(loop.Trainer):
    """Post-training on rewards.

    Attributes:
        after: the last held-out scores, of the weights that measure the run.
        kinds: tags whose prompts' trust is recorded.
        warned: rewards whose order a form reverses, and of which this launch has said so.
        next_rollout: of the next step, if it is sampled ahead.
    """

    def __init__(self, config: Config, mesh: Mesh, inputs: Inputs, heartbeat: Heartbeat) -> None:
        self.session, self.heartbeat = build_session(config, mesh, *inputs), heartbeat
        self.progress = Progress()
        self.keys = keys_of(config)
        self.after: HeldoutScores | None = None
        self.warned: set[str] = set()
        self.next_rollout: Rollout | None = None
        self.kinds = self.session.shards.common_tags(config.data.split, KINDS)
        heldout = self.session.heldout
        texts = heldout.prompts.texts if heldout else ()
        self.heldout_videos = len(texts) * config.evaluation.samples_per_prompt
        self.shown = ShownVideos(Path(config.run.dir) / "samples", texts, config)
        self.report, self.environment = LiveReport(Path(config.run.dir)), environment(self.session)

    @cached_property
    def batches(self) -> Iterator[PromptBatch]:
        """The prompts of each step from here on."""
        session, progress = self.session, self.progress
        config = session.config
        left = (config.run.num_steps - progress.step) * config.rollout.prompts_per_step
        ahead = range(progress.position, progress.position + left)  # another part, if prompts_per_step was another
        check_anchors(config, session.shards, session.priors, ahead, "--prior.prompts", "all")
        return session.batches(progress.position)

    def train_step(self, step: int, pause: bool = True) -> dict[str, float]:
        """Sample, score, anchor to the prior, weigh, replay, record."""
        progress = self.progress
        session = replace(self.session, config=raised(self.session.config, progress))
        if session.mesh.is_main and progress.step:
            self.report.update(self.summary)
        watch = loop.Stopwatch(self.heartbeat, step, PHASES)
        with session.suite.on_device():
            rollout = self.next_rollout or self.sample(step, watch)
            ahead = session.config.rollout.sample_ahead and not pause
            self.next_rollout = self.sample(step + 1, watch, after=rollout) if ahead else None
            rewards = rollout.rewards(session, watch)
        progress.position += len(rollout.prompts)
        self.publish()
        advantages = estimate_advantages(session, rollout.prompts, rewards, progress)  # anchored, with trust
        with watch.phase("update"):
            learning_rate = session.engine.learning_rate
            trajectories, advantages = worth_replaying(session, rollout.trajectories, advantages)
            objective = build_objective(session, rollout.prompts, advantages, step)
            objective, batches = objective.arranged(trajectories, session.mesh)
            stats = optimise(session.engine, objective, batches, session.config.optim.updates_per_rollout)
            if session.old is not None:
                session.old.update()
        stats = stats.of_other_weights(OLDER) if rollout.age else stats
        stats = stats.of_other_weights(AVERAGE) if session.old else stats
        record = {**step_record(session, rewards, advantages, stats), "learning_rate": learning_rate, **watch.record}
        if session.config.uses_trust:
            kinds = trust_by_kind(advantages.trust, rollout.prompts.tags, self.kinds)
            record |= {name: float(value) for name, value in kinds.items()}
        progress.count(record, rewards.total.numel())
        return record

    def sample(self, step: int, watch: loop.Stopwatch, after: Rollout | None = None) -> Rollout:
        """The rollout of a step, on the next prompts."""
        prompts = to_be_scored(self.session, next(self.batches), self.progress)
        return sample(self.session, prompts, step, watch, after)

    @property
    def is_ahead(self) -> bool:
        return self.next_rollout is not None

    def notices(self, record: Mapping[str, float]) -> list[str]:
        found = reversals(record, self.session.config.bpgo.form)
        new = [name for name in found if name not in self.warned]
        self.warned.update(new)
        return [found[name] for name in new]

    def begin(self) -> None:
        before = self.heldout_scores(self.session.config.evaluation.measured[0], "before")
        if before is not None:
            self.progress.heldout_before = {name: scores.tolist() for name, scores in before.by_name.items()}
            self.progress.frames_before = {name: frames.values.tolist() for name, frames in before.frames.items()}
            self.progress.look_before = {name: scores.tolist() for name, scores in before.look.items()}
            respond(self.session.config, self.progress, 0, before, self.session.mesh)
        self.progress.videos_generated += self.heldout_videos

    def evaluate(self, step: int, last: bool, log: RunLog) -> dict[str, float]:
        record: dict[str, float] = {}
        for kind, (prefix, suffix) in zip(self.session.config.evaluation.measured, EVALUATED, strict=False):
            name = f"{'after' if last else f'step-{step + 1:06d}'}{suffix}"
            scores = self.heldout_scores(kind, name)
            if scores is None:
                return {}
            record |= scores.metrics(prefix)
            log.media(step, prefix, self.shown.captioned(name, scores))
            self.progress.videos_generated += self.heldout_videos
            if not suffix:
                self.after = scores
                for alarm in respond(self.session.config, self.progress, step + 1, scores, self.session.mesh):
                    log.later(f"step {step + 1}: {alarm}", {})
                record |= {f"alarm/{name}": float(name in self.progress.alarms) for name in self.progress.best}
        assert self.after is not None
        if last and self.progress.heldout_before is not None:
            log.table(step, "heldout_before_after", self.shown.table(self.progress.heldout_before, self.after))
        self.write_samples("after" if last else f"step-{step + 1:06d}")
        log.frames(self.shown.frame_lines(step, self.after))
        return record

    @property
    def ended(self) -> str:
        return ended(self.session.config, self.progress)

    def heldout_scores(self, weights: str, name: str) -> HeldoutScores | None:
        """Held-out scores of one kind of weights; writes the shown videos to samples/NAME. Training is not affected."""
        session, heldout = self.session, self.session.heldout
        if heldout is None:
            return None
        with isolated(), session.weights(weights), session.rollout_weights():
            return evaluate(
                session.policy, heldout.prompts, heldout.suite, session.config, session.mesh, self.shown.writer(name)
            )

    def finish(self) -> dict[str, Any]:
        if self.after is None:
            self.after = self.heldout_scores(self.session.config.evaluation.measured[0], "after")
            self.write_samples("after")
        summary = self.summary()
        if self.session.mesh.is_main:
            self.write_results(summary)
        return summary

    def summary(self) -> dict[str, Any]:
        """The fields of summary.json so far."""
        return {**summarise(self.session, self.progress, self.after), "environment": self.environment}

    def write_samples(self, evaluation: str) -> None:
        """Write samples.json with the videos of the last evaluation, on rank 0."""
        progress = self.progress
        if self.session.mesh.is_main and self.after is not None and progress.heldout_before is not None:
            samples = self.shown.samples(evaluation, progress.heldout_before, progress.frames_before, self.after)
            write_json(self.shown.folder / "samples.json", samples)

    def write_results(self, summary: dict[str, Any]) -> None:
        """Write summary.json and report.html; print a table with the diagnosis of the run."""
        run_dir = Path(self.session.config.run.dir)
        summary = {**summary, "diagnosis": diagnose(read_metrics(run_dir / METRICS_FILE), summary)}
        write_json(run_dir / "summary.json", summary)
        write_report(run_dir)
        names = [*RESULTS, *(["export-ema"] if self.session.ema else [])]
        print(summary_table(summary, {name: run_dir / name for name in names}))


train = partial(loop.train, kind=RL)


def keys_of(config: Config) -> Keys:
    """The keys of a run's records; the progress line shows trust where the recipe has one."""
    required = tuple(key for key in ROLLOUTS.required if key != "ratio_mean" or config.loss.has_ratio)
    shown = {key: form for key, form in ROLLOUTS.shown.items() if key != "trust_mean" or config.uses_trust}
    return Keys(required, shown)


def worth_replaying(
    session: Session, trajectories: list[Trajectory], advantages: GroupAdvantages
) -> tuple[list[Trajectory], GroupAdvantages]:
    """With `advantage.best_of`, the samples that have an advantage, scaled for a mean over fewer samples; else all."""
    if session.config.advantage.best_of is None:
        return trajectories, advantages
    by_prompt = session.config.sampler.share_steps == "group"
    kept = samples_to_replay(trajectories, advantages.trains, by_prompt, session.mesh)
    return kept, advantages.times(len(kept) / len(trajectories))


def build_objective(session: Session, prompts: PromptBatch, advantages: GroupAdvantages, step: int) -> Objective:
    """The objective of one training step."""
    objective = OBJECTIVES[session.config.loss.objective]
    parts = (session.policy, session.config, prompts, advantages, step, session.mesh.device, session.reference)
    return objective(*parts, suite=session.suite)


def step_record(
    session: Session, rewards: Rewards, advantages: GroupAdvantages, stats: UpdateStats
) -> dict[str, float]:
    """The metrics of a step, reduced over ranks."""
    followed = {"kl_weight": session.config.loss.kl_weight} if session.config.evaluation.alarm == "kl" else {}
    unused = () if session.config.loss.has_ratio else ("rms_ratio",)  # a length of the step that the loss does not take
    return {
        **followed,
        "reward": float(rewards.total.mean()),
        "reward_std": float(rewards.total.std(dim=1).mean()),
        **{f"reward/{name}": float(scores.mean()) for name, scores in rewards.by_name.items()},
        **{name: float(value) for name, value in advantages.metrics.items() if name not in unused},
        **with_spread(reduce_metrics(stats.metrics)),
        **step_metrics(session.mesh.total(step_sums(stats.passes, session.config.sampler.num_steps))),
    }


def summarise(session: Session, progress: Progress, after: HeldoutScores | None) -> dict[str, Any]:
    """The fields of summary.json."""
    error = progress.max_ratio_error_first_update
    summary: dict[str, Any] = {
        "steps": progress.step,
        "num_steps": session.config.run.num_steps,
        "world_size": session.mesh.world_size,
        "zero_stage": session.engine.stage,
        "algorithm": session.config.algorithm,
        "seed": session.config.run.seed,
        "heldout_before": None,
        "heldout_after": None,
        "videos_generated": progress.videos_generated,
        "seconds": {name: round(seconds, 3) for name, seconds in progress.seconds.items()},
        "max_ratio_error_first_update": error if session.config.loss.starts_at_ratio_one else None,
    }
    if session.config.rollout.sample_ahead:
        summary["steps_sampled_ahead"] = progress.sampled_ahead
    summary |= alarm_summary(session.config, progress)
    if after is not None and progress.heldout_before is not None:
        summary |= heldout_summary(progress.heldout_before, after, session.config)
        summary["look"] = look_summary(progress.look_before, after)
    return summary
