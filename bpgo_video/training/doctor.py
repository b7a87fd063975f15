"""Checks of a recipe before a long run, from the inputs to one update, and warnings about the installation.

The checks run the functions of training on one step, on the recipe's own ranks. They stop at the first failure, since
each check relies on those before it. Nothing is saved.
"""

from __future__ import annotations

import io
import math
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rich import box
from rich.console import Console
from rich.table import Table

from bpgo_video.config.sft import Recipe
from bpgo_video.distributed.heartbeat import Heartbeat
from bpgo_video.distributed.memory import available_cores, ranks_of_this_host
from bpgo_video.learner.bpgo import GroupAdvantages
from bpgo_video.policies.networks import Transformers, from_pretrained, networks_of
from bpgo_video.randomness import keyed_noise
from bpgo_video.rollouts.conditioning import cast, guidance_of
from bpgo_video.rollouts.denoiser import training_denoiser
from bpgo_video.rollouts.updates import Objective, optimise, ratio_error
from bpgo_video.training.estimation import estimate_advantages
from bpgo_video.training.inputs import describe_policy
from bpgo_video.training.loop import Stopwatch
from bpgo_video.training.metrics import reduce_metrics
from bpgo_video.training.plan import readable
from bpgo_video.training.rl import PHASES, build_objective, sample_and_score
from bpgo_video.training.session import PolicySession, Session
from bpgo_video.types import PromptBatch, Rewards, Trajectory

NOISE_LEVELS = (0.7, 0.99, 0.05)  # the first one at which a transformer computes is used for it
VELOCITY_BOUND = {torch.float32: 1e-4, torch.bfloat16: 0.1}  # relative; small models are .004 to .010 off in bf16
ODE_BOUND = 1e-4  # of latents of unit size, in fp32
NOISE_SHARE = 0.1  # of the clip range; more noise in a ratio blurs the clip

Result = tuple[bool, str]  # whether a check holds, and an explanation


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    name: str
    holds: bool
    words: str


@dataclass
class Examination:
    """The training step under examination; checks add their results for later ones."""

    session: Session
    prompts: PromptBatch
    watch: Stopwatch
    trajectories: Sequence[Trajectory] = ()
    rewards: Rewards | None = None
    advantages: GroupAdvantages | None = None

    @property
    def objective(self) -> Objective:
        assert self.advantages is not None
        return build_objective(self.session, self.prompts, self.advantages, 0)


@torch.no_grad()
def velocity_is_the_pipelines(examination: Examination) -> Result:
    """The policy's velocity equals that of the folder's transformers in fp32 on rank 0's CPU."""
    session = examination.session
    latents, conditioning = session.policy.example()
    inputs = cast(conditioning, session.dtype, session.mesh.device)
    gaps = {}
    for name in session.policy.transformer_names:
        sigma = torch.tensor(next(level for level in NOISE_LEVELS if session.policy.transformer_at(level) == name))
        velocity = session.policy.velocity(latents.to(session.mesh.device), sigma, inputs).cpu()
        gap = 0.0
        if session.mesh.is_main:
            policy = describe_policy(session.config)
            model_class = networks_of(policy.folder)[name]
            transformer = from_pretrained(model_class, policy.folder / name, torch.float32)
            policy.transformers = Transformers({name: transformer})
            expected = policy.velocity(latents, sigma, conditioning)
            gap = float((velocity - expected).norm() / expected.norm())
        gaps[name] = reduce_metrics({"gap_max": gap})["gap_max"]
    worst, bound = max(gaps.values()), VELOCITY_BOUND[session.dtype]
    dtype = str(session.dtype).removeprefix("torch.")
    words = f"in {dtype} differs from the folder's transformer in fp32 by {worst:.2g}"
    if worst > bound:
        words += f", more than {bound:g}: the weights or the precision are not the folder's"
    return worst <= bound, words


@torch.no_grad()
def ode_is_diffusers(examination: Examination) -> Result:
    """The denoising loop without noise equals diffusers' scheduler on the same velocities."""
    session, config = examination.session, examination.session.config
    denoiser, device = training_denoiser(session.policy, config), session.mesh.device
    shape = session.policy.latent_shape(config.video)
    start = keyed_noise(shape, [("doctor", row) for row in range(config.rollout.micro_batch_size)], device)
    guidance = guidance_of(examination.prompts, torch.zeros(len(start), dtype=torch.long), device)
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(sigmas=denoiser.sigmas[:-1].tolist())
    latents = start
    for index, timestep in enumerate(scheduler.timesteps):
        velocity = denoiser.velocity(latents, index, guidance)
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    denoised = denoiser.denoise(start, guidance, lambda _: torch.zeros_like(start)).latents[:, -1]
    error = float((denoised.float() - latents).abs().max())
    words = f"differs from diffusers' Euler loop by {error:.2g}"
    if config.sampler.solver != "euler" or config.sampler.latents_dtype != "float32":
        return math.isfinite(error), f"{words}, as sampler.solver or sampler.latents_dtype requests"
    return error < ODE_BOUND, words if error < ODE_BOUND else f"{words}: the schedule is not the policy's"


def rewards_vary(examination: Examination) -> Result:
    """Each reward scores the samples of a prompt differently, in one rollout."""
    session, prompts = examination.session, examination.prompts
    examination.trajectories, rewards = sample_and_score(session, prompts, 0, examination.watch)
    examination.rewards = rewards
    examination.advantages = estimate_advantages(session, prompts, rewards)
    spreads = {name: float(scores.std(dim=1).mean()) for name, scores in rewards.by_name.items()}
    words = "; ".join(
        f"{name} {float(rewards.by_name[name].mean()):.4g} ± {spread:.2g} within groups"
        for name, spread in spreads.items()
    )
    constant = [name for name, spread in spreads.items() if spread == 0]
    if constant:
        words += (
            f". {', '.join(constant)} gives all {session.config.rollout.group_size} samples of a prompt the same "
            "score: nothing can be learned from it. Raise sampler.eta or rollout.group_size, or choose another reward"
        )
    return not constant, words


def ratio_is_one(examination: Examination) -> Result:
    """In a replay without an update every ratio is 1, up to the precision's noise."""
    objective = examination.objective
    objective.prepare(examination.trajectories, 2)
    errors = [
        ratio_error(objective.loss(trajectory, index).metrics).detach()
        for trajectory in examination.trajectories
        for index in objective.passes(trajectory)
    ]
    worst = reduce_metrics({"worst_max": torch.stack(errors).amax()})["worst_max"]  # nan stays nan, unlike in max()
    if worst == 0:
        return True, "exactly 1 before the first update"
    clip = min(examination.session.config.loss.clip_range)
    words = f"off 1 by up to {worst:.2g} before any update, with a clip range of {clip:g}"
    if worst < NOISE_SHARE * clip:
        return True, f"{words}: noise of the precision, well inside"
    return False, f"{words}: replay differs from the rollout. Use fp32 latents, or a larger micro-batch or clip range"


def gradient_flows(examination: Examination) -> Result:
    """The updates of one step have a finite gradient that is not 0."""
    session, optim = examination.session, examination.session.config.optim
    with examination.watch.phase("update"):
        stats = optimise(session.engine, examination.objective, examination.trajectories, optim.updates_per_rollout)
    norm, limit = stats.metrics["grad_norm"], optim.max_grad_norm
    words = f"norm {norm:.3g}"
    if norm == 0:
        return False, f"{words}: no group has signal, or nothing is trained (policy.lora.target_modules)"
    if limit and norm > 100 * limit:
        words += (
            f", {norm / limit:.0f} times optim.max_grad_norm: the clip sets the step's size, trust only its direction"
        )
    return math.isfinite(norm), words


def time_and_memory(examination: Examination) -> Result:
    """Seconds and memory of the step, and the hours that they mean for the run; always holds."""
    session, seconds = examination.session, examination.watch.seconds
    if session.mesh.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(session.mesh.device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = int(reduce_metrics({"peak_max": peak})["peak_max"])
    parts = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
    steps = session.config.run.num_steps
    minutes = steps * sum(seconds[name] for name in PHASES) / 60  # scoring overlaps with them
    whole = f"{minutes / 60:.1f} hours" if minutes >= 60 else f"{minutes:.1f} minutes"
    words = f"{parts} (a first step: later ones are faster); {steps} steps in about {whole}; "
    return True, f"{words}at most {readable(peak)} on a rank"


CHECKS: dict[str, Callable[[Examination], Result]] = {
    "velocity": velocity_is_the_pipelines,
    "ODE": ode_is_diffusers,
    "rewards": rewards_vary,
    "ratio": ratio_is_one,
    "gradient": gradient_flows,
    "cost": time_and_memory,
}


def examine(session: Session, prompts: PromptBatch, heartbeat: Heartbeat) -> list[Finding]:
    """Run the checks up to the first failure; all ranks together, with the same findings."""
    examination = Examination(session, prompts, Stopwatch(heartbeat, 0))
    findings: list[Finding] = []
    for name, check in CHECKS.items():
        findings.append(Finding(name, *check(examination)))
        if not findings[-1].holds:
            break
    return findings


def diagnose(session: Session, prompts: PromptBatch, heartbeat: Heartbeat) -> bool:
    """Run the checks and print the findings; whether all hold. Warnings about the installation do not count."""
    started = time.perf_counter()
    if session.mesh.is_main:
        for warning in warnings(session):
            print(f"warning: {warning}", flush=True)
    findings = examine(session, prompts, heartbeat)
    if session.mesh.is_main:
        print(as_table(findings, time.perf_counter() - started), flush=True)
    return all(finding.holds for finding in findings)


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
    verdict = "Ready to train" if healthy else f"Not ready: fix {findings[-1].name} first"
    return f"{text.getvalue().rstrip()}\n{verdict} ({seconds:.0f} s, nothing was saved)"


def warnings(session: PolicySession) -> list[str]:
    """What may slow or stop a long run on this host; none of it is an error."""
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in session.engine.module.parameters() if p.requires_grad)
    return [*other_versions(), *crowded_cores(), *small_disk(session.config, trained), *missing_home()]


def tested_versions() -> dict[str, str]:
    """The versions that this release was tested with, of the packages that it requires."""
    lines = files("bpgo_video").joinpath("constraints.txt").read_text("utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    required = map(Requirement, requires("bpgo-video") or ())
    used = {package.name for package in required if not package.marker or package.marker.evaluate({"extra": "rewards"})}
    return {name: tested for name, tested in pinned.items() if canonicalize_name(name) in used}


def other_versions() -> Iterator[str]:
    """A line for each installed package of another version than the tested one."""
    for name, tested in tested_versions().items():
        try:
            installed = version(name).partition("+")[0]  # torch's "+cpu" is a build, not a version
        except PackageNotFoundError:
            continue  # of an extra
        if installed != tested:
            yield f"{name} {installed} is installed; this release was tested with {tested}"


def crowded_cores() -> Iterator[str]:
    """A line if the ranks of this host have more threads than it has cores."""
    ranks, threads, cores = ranks_of_this_host(), torch.get_num_threads(), available_cores()
    if ranks * threads > cores:
        advice = f"set OMP_NUM_THREADS={max(1, cores // ranks)}"
        yield f"ranks x threads of this host is {ranks} x {threads}, but it has {cores} cores: {advice}"


def small_disk(config: Recipe, trained: int) -> Iterator[str]:
    """A line if the disk cannot hold the checkpoints that a run keeps and the one being written.

    Args:
        trained: number of trained weights over all ranks; frozen ones are not saved.
    """
    run = config.run
    numbers = 1 + 2 * (config.optim.name != "sgd") + (config.ema.decay > 0)  # in fp32: weights, moments, average
    needed = (run.keep_checkpoints + 1) * trained * numbers * 4
    folder = Path(run.dir).absolute()
    free = shutil.disk_usage(next(parent for parent in (folder, *folder.parents) if parent.is_dir())).free
    if free < needed:
        yield (
            f"run.dir {run.dir} has {readable(free)} free; {run.keep_checkpoints + 1} checkpoints take about "
            f"{readable(needed)}: set run.keep_checkpoints, or name another folder"
        )


def missing_home() -> Iterator[str]:
    """A line if the home directory, where libraries keep caches, is not writable."""
    home = Path("~").expanduser() if "HOME" in os.environ else None
    if home is None or not os.access(home, os.W_OK):
        yield f"HOME ({home}) cannot be written: set HF_HOME, MPLCONFIGDIR and data.cache to writable folders"
