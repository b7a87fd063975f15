"""Will this recipe train this policy? A ladder of checks, from inputs to one update, in minutes and in words.

Each rung stands on those before it: what a run with hundreds of GPU hours would show late is shown here on a single
step. The rungs run the very functions of training, on the recipe's own ranks; nothing is saved.
"""

from __future__ import annotations

import io
import math
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from rich import box
from rich.console import Console
from rich.table import Table

from bpgo_video.distributed.heartbeat import Heartbeat
from bpgo_video.learner.bpgo import GroupAdvantages
from bpgo_video.policies import Policy
from bpgo_video.policies.networks import Transformers, from_pretrained, networks_of
from bpgo_video.randomness import keyed_noise
from bpgo_video.rollouts.conditioning import cast
from bpgo_video.rollouts.objectives import OBJECTIVES
from bpgo_video.rollouts.replay import Objective, Setting, optimise
from bpgo_video.rollouts.rollout import guidance_of, training_denoiser
from bpgo_video.training.artifacts import PHASES
from bpgo_video.training.estimation import estimate_advantages
from bpgo_video.training.installation import warnings
from bpgo_video.training.metrics import reduce_metrics
from bpgo_video.training.policy_session import describe_policy
from bpgo_video.training.rl import sample_and_score
from bpgo_video.training.session import Session
from bpgo_video.training.stopwatch import Stopwatch
from bpgo_video.types import PromptBatch, Rewards, Trajectory

NOISE_LEVELS = (0.7, 0.99, 0.05)  # one for each transformer of a pipeline with several
VELOCITY_BOUND = {torch.float32: 1e-4, torch.bfloat16: 0.1}  # relative; small models are .004 to .010 off in bf16
ODE_BOUND = 1e-4  # of latents of unit size, in fp32
NOISE_SHARE = 0.1  # of the clip range: more noise than that in a ratio blurs what the clip sees


@dataclass(frozen=True)
class Finding:
    """One rung: whether it holds, and what that means."""

    name: str
    holds: bool
    words: str


@dataclass
class Examination:
    """What the rungs find on the way up, for those above."""

    session: Session
    prompts: PromptBatch
    watch: Stopwatch
    trajectories: list[Trajectory] | None = None
    rewards: Rewards | None = None
    advantages: GroupAdvantages | None = None

    @property
    def objective(self) -> Objective:
        session, config = self.session, self.session.config
        assert self.advantages is not None
        setting = Setting(session.policy, config, self.prompts, session.mesh.device, session.reference)
        return OBJECTIVES[config.loss.objective](setting, self.advantages, 0)


@torch.no_grad()
def velocity_is_the_pipelines(found: Examination) -> Finding:
    """The policy's velocity on its smallest input against the transformers of its folder, in fp32 on rank 0's CPU."""
    session = found.session
    latents, conditioning = session.policy.example()
    gaps = {}
    for name in session.policy.transformer_names:
        sigma = torch.tensor(next(level for level in NOISE_LEVELS if session.policy.transformer_at(level) == name))
        inputs = cast(conditioning, session.dtype, session.mesh.device)
        velocity = session.policy.velocity(latents.to(session.mesh.device), sigma, inputs).cpu()
        gap = 0.0
        if session.mesh.is_main:
            expected = reference_policy(session, name).velocity(latents, sigma, conditioning)
            gap = float((velocity - expected).norm() / expected.norm())
        gaps[name] = reduce_metrics({"gap_max": gap})["gap_max"]
    worst, bound = max(gaps.values()), VELOCITY_BOUND[session.dtype]
    words = f"in {str(session.dtype).removeprefix('torch.')} off the folder's transformer in fp32 by {worst:.2g}"
    if worst > bound:
        words += f", more than {bound:g}: the weights or the precision are not the folder's"
    return Finding("velocity", worst <= bound, words)


def reference_policy(session: Session, name: str) -> Policy:
    """The policy with one transformer of its folder, as diffusers loads it, whole and in fp32 on the CPU."""
    policy = describe_policy(session.config)
    model_class = networks_of(policy.folder)[name]
    policy.transformers = Transformers({name: from_pretrained(model_class, policy.folder / name, torch.float32)})
    return policy


@torch.no_grad()
def ode_is_diffusers(found: Examination) -> Finding:
    """Our loop without noise against diffusers' scheduler on the same velocities."""
    session, config = found.session, found.session.config
    denoiser = training_denoiser(session.policy, config)
    shape = session.policy.latent_shape(config.video)
    start = keyed_noise(shape, [("doctor", row) for row in range(config.rollout.micro_batch_size)], session.mesh.device)
    rows = torch.zeros(len(start), dtype=torch.long)
    guidance = guidance_of(found.prompts, rows, session.mesh.device)
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(sigmas=denoiser.sigmas[:-1].tolist())
    latents = start
    for index, timestep in enumerate(scheduler.timesteps):
        velocity = denoiser.velocity(latents, index, guidance)
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    own = denoiser.denoise(start, guidance, lambda _: torch.zeros_like(start)).latents[:, -1]
    error = float((own.float() - latents).abs().max())
    if config.sampler.solver != "euler" or config.sampler.latents_dtype != "float32":
        return Finding(
            "ODE", math.isfinite(error), f"differs from diffusers' Euler loop by {error:.2g}, as it was asked to"
        )
    words = f"differs from diffusers' Euler loop by {error:.2g}"
    return Finding(
        "ODE", error < ODE_BOUND, words if error < ODE_BOUND else f"{words}: the schedule is not the policy's"
    )


def rewards_vary(found: Examination) -> Finding:
    """One rollout, scored: does the reward tell samples of one prompt apart?"""
    config = found.session.config
    found.trajectories, found.rewards = sample_and_score(found.session, found.prompts, 0, found.watch)
    found.advantages = estimate_advantages(found.session, found.prompts, found.rewards)
    blind = []
    parts = []
    for name, scores in found.rewards.by_name.items():
        spread = float(scores.std(dim=1).mean())
        parts.append(f"{name} {float(scores.mean()):.4g} ± {spread:.2g} within groups")
        blind += [name] if spread == 0 else []
    words = "; ".join(parts)
    if blind:
        words += (
            f". {', '.join(blind)} gives all {config.rollout.group_size} samples of a prompt the same score: nothing "
            "can be learnt from it. Raise sampler.eta or rollout.group_size, or choose another reward"
        )
    return Finding("rewards", not blind, words)


def ratio_is_one(found: Examination) -> Finding:
    """Replay without an update in between: every ratio is 1, or as near as the precision allows."""
    assert found.trajectories is not None
    objective = found.objective
    objective.prepare(found.trajectories, 2)
    errors = []
    for trajectory in found.trajectories:
        for index in objective.passes(trajectory):
            metrics = objective.loss(trajectory, index).metrics
            errors.append(torch.maximum(metrics["ratio_max"] - 1, 1 - metrics["ratio_min"]).detach())
    worst = reduce_metrics({"worst_max": torch.stack(errors).amax()})["worst_max"]  # nan stays nan, as in no max()
    clip = min(found.session.config.loss.clip_range)
    if worst == 0:
        return Finding("ratio", True, "exactly 1 before the first update")
    words = f"off 1 by up to {worst:.2g} before any update, with a clip range of {clip:g}"
    if worst < NOISE_SHARE * clip:
        return Finding("ratio", True, f"{words}: noise of the precision, well inside")
    return Finding(
        "ratio", False, f"{words}: replay is not the rollout. Use fp32 latents, or a larger micro-batch or clip"
    )


def gradient_flows(found: Examination) -> Finding:
    """The updates of one step."""
    session, config = found.session, found.session.config
    assert found.trajectories is not None
    with found.watch.phase("update"):
        update = optimise(session.engine, found.objective, found.trajectories, config.optim.updates_per_rollout)
    norm, limit = update.metrics["grad_norm"], config.optim.max_grad_norm
    words = f"norm {norm:.3g}"
    if norm == 0:
        return Finding(
            "gradient", False, f"{words}: no group has signal, or nothing is trained (policy.lora.target_modules)"
        )
    if limit and norm > 100 * limit:
        words += (
            f", {norm / limit:.0f} times optim.max_grad_norm: the clip sets the step's size, trust only its direction"
        )
    return Finding("gradient", math.isfinite(norm), words)


def time_and_memory(found: Examination) -> Finding:
    """What the step took, and what it means for the run."""
    session, config = found.session, found.session.config
    seconds = found.watch.seconds
    step = sum(seconds[name] for name in PHASES)  # scoring goes on beside them
    if session.mesh.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(session.mesh.device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = int(reduce_metrics({"peak_max": peak})["peak_max"])
    parts = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
    hours = step * config.run.num_steps / 3600
    words = f"{parts} (a first step: later ones are faster); {config.run.num_steps} steps in about {hours:.1f} h; "
    return Finding("cost", True, f"{words}at most {peak / 2**30:.1f} GiB on a rank")


LADDER: tuple[Callable[[Examination], Finding], ...] = (
    velocity_is_the_pipelines,
    ode_is_diffusers,
    rewards_vary,
    ratio_is_one,
    gradient_flows,
    time_and_memory,
)


def examine(session: Session, prompts: PromptBatch, heartbeat: Heartbeat) -> list[Finding]:
    """Up the ladder to the first rung that breaks; all ranks climb together and find the same."""
    found = Examination(session, prompts, Stopwatch(heartbeat, 0))
    findings = []
    for rung in LADDER:
        findings.append(rung(found))
        if not findings[-1].holds:
            break
    return findings


def as_table(findings: Sequence[Finding], seconds: float) -> str:
    table = Table(box=box.ROUNDED, show_header=False)
    table.add_column()
    table.add_column()
    table.add_column(overflow="fold")
    for finding in findings:
        table.add_row("✓" if finding.holds else "✗", finding.name, finding.words)
    text = io.StringIO()
    Console(file=text, width=110, color_system=None).print(table)
    healthy = all(finding.holds for finding in findings)
    verdict = "Ready to train" if healthy else f"Not ready: mend {findings[-1].name} first"
    return f"{text.getvalue().rstrip()}\n{verdict} ({seconds:.0f} s, nothing was saved)"


def diagnose(session: Session, prompts: PromptBatch, heartbeat: Heartbeat) -> bool:
    """Examine, tell, and say whether all is well; warnings about the installation do not count."""
    started = time.perf_counter()
    if session.mesh.is_main:
        for warning in warnings(session):
            print(f"warning: {warning}", flush=True)
    findings = examine(session, prompts, heartbeat)
    if session.mesh.is_main:
        print(as_table(findings, time.perf_counter() - started), flush=True)
    return all(finding.holds for finding in findings)
