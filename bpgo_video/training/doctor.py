"""Checks of a recipe before a long run, from the inputs to one update.

The checks run the functions of training on one step, on the recipe's own ranks. They stop at the first failure, since
each check relies on those before it. Nothing is saved.
"""

from __future__ import annotations

import io
import math
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from rich import box
from rich.console import Console
from rich.table import Table

from bpgo_video.config.bpgo import Config
from bpgo_video.distributed.heartbeat import Heartbeat
from bpgo_video.learner.bpgo import GroupAdvantages
from bpgo_video.planning.deployment import differences
from bpgo_video.planning.job import readable
from bpgo_video.policies.networks import Transformers, from_pretrained, networks_of
from bpgo_video.randomness import keyed_noise
from bpgo_video.rewards.reward import source_of
from bpgo_video.rollouts.conditioning import cast, guidance_of
from bpgo_video.rollouts.denoiser import training_denoiser
from bpgo_video.rollouts.updates import Objective, optimise, ratio_error
from bpgo_video.training.estimation import estimate_advantages
from bpgo_video.training.inputs import describe_policy
from bpgo_video.training.installation import warnings
from bpgo_video.training.loop import Stopwatch
from bpgo_video.training.metrics import reduce_metrics
from bpgo_video.training.rl import PHASES, build_objective
from bpgo_video.training.sampling import sample_and_score
from bpgo_video.training.session import Session
from bpgo_video.training.summary import AGREEMENT, ALIKE, OPPOSED, VALIDITY
from bpgo_video.training.tiles import tile_differences
from bpgo_video.types import PromptBatch, Rewards, Trajectory

NOISE_LEVELS = (0.7, 0.99, 0.05)  # the first one at which a transformer computes is used for it
VELOCITY_BOUND = {torch.float32: 1e-4, torch.bfloat16: 0.1}  # relative; small models are .004 to .010 off in bf16
ODE_BOUND = 1e-4  # of latents of unit size, in fp32
TILED_SHARE = 0.25  # of a reward's spread within groups
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
    denoiser = replace(training_denoiser(session.policy, config), guidance_every=1, ode_attention=None)
    device = session.mesh.device
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


def rewards_agree(examination: Examination) -> Result:
    """How far rewards agree on the samples of a prompt, with each other and with watched ones; always holds."""
    assert examination.advantages is not None
    words, config = [], examination.session.config
    for key, value in examination.advantages.metrics.items():
        for prefix, advice in ((AGREEMENT, remark(float(value))), (VALIDITY, "")):
            if key.startswith(prefix):
                words.append(f"{key.removeprefix(prefix).replace('+', ' and ')} {value:.2f}{advice}")
    found = [f"{', '.join(words)} (mean correlation within {config.rollout.prompts_per_step} groups)"] if words else []
    if len(config.trained_rewards) == 1:
        (name,) = config.trained_rewards
        found.append(
            f"{name} is the only reward that trains: a second, independent one gains more than any trust does where "
            "rewards err (docs/study.md)"
        )
    return True, "; ".join(found)


def remark(agreement: float) -> str:
    """What to do about an agreement that is extreme; empty for others."""
    if agreement > ALIKE:
        return ": the second adds little; replace it by a model of another kind"
    return ": they cancel each other; lower the weight of one" if agreement < OPPOSED else ""


def shortcuts_are_small(examination: Examination) -> Result | None:
    """How far the shortcuts of untrained steps move samples and rewards, with the same noise; always holds."""
    session, rollout = examination.session, examination.session.config.rollout
    if not rollout.takes_shortcuts:
        return None
    config = replace(session.config, rollout=replace(rollout, guidance_every=1, attention_backend=None))
    watch = Stopwatch(examination.watch.heartbeat, 0)
    exact, rewards = sample_and_score(replace(session, config=config), examination.prompts, 0, watch)
    distances = [
        ((one.latents[:, -1] - other.latents[:, -1]).norm() / other.latents[:, -1].norm()).float()
        for one, other in zip(examination.trajectories, exact, strict=True)
    ]
    distance = reduce_metrics({"distance": torch.stack(distances).mean()})["distance"]
    words = f"final latents differ by {distance:.2g} of their size from those without shortcuts"
    assert examination.rewards is not None
    for name, expected in rewards.by_name.items():
        found = examination.rewards.by_name[name]
        error = float((found - expected).double().std()) / found.numel() ** 0.5
        means = float(found.mean()), float(expected.mean())
        spreads = float(found.std(dim=1).mean()), float(expected.std(dim=1).mean())
        words += (
            f"; {name} {means[0]:.4g} in place of {means[1]:.4g} (± {error:.2g}), "
            f"within groups ± {spreads[0]:.2g} in place of {spreads[1]:.2g}"
        )
    return True, words


def tiles_change_little(examination: Examination) -> Result | None:
    """How far decoding in tiles moves rewards, next to their spread within groups; always holds."""
    session, rewards = examination.session, examination.rewards
    alone = [name for name, reward in session.suite.rewards.items() if not reward.groupwise]
    if not session.config.policy.vae_tiling or not alone:
        return None
    assert rewards is not None
    try:
        found = tile_differences(session, examination.prompts, examination.trajectories[0])
    except torch.OutOfMemoryError:
        found = {name: torch.tensor([torch.nan]) for name in alone}
    sizes = reduce_metrics({name: found[name].abs().mean() for name in alone})
    if any(math.isnan(size) for size in sizes.values()):
        return True, "a whole video does not fit on some rank, so what tiles do to rewards is not known"
    shares = {name: size / float(rewards.by_name[name].std(dim=1).mean()) for name, size in sizes.items()}
    each = "; ".join(f"{name} {sizes[name]:.2g}, {share:.0%} of its spread" for name, share in shares.items())
    words = f"rewards differ from those of videos decoded whole: {each} within groups"
    if max(shares.values()) > TILED_SHARE:
        words += ": tiles blur what the reward compares. Set policy.vae_tiling: false, if need be with vae_slicing"
    return True, words


def ratio_is_one(examination: Examination) -> Result | None:
    """In a replay without an update every ratio is 1, up to the precision's noise."""
    if not examination.session.config.loss.has_ratio:
        return None
    objective = examination.objective
    objective.prepare(examination.trajectories, 2)
    errors = [
        ratio_error(objective.loss(part, index).metrics).detach()
        for trajectory in examination.trajectories
        for index in objective.passes(trajectory)
        for part in objective.parts(trajectory, index)
    ]
    worst = reduce_metrics({"worst_max": torch.stack(errors).amax()})["worst_max"]  # nan stays nan, unlike in max()
    if worst == 0:
        words = "exactly 1 before the first update"
        if examination.session.config.rollout.sample_ahead:
            words += "; not so in most steps of the run, whose rollouts are one step older (rollout.sample_ahead)"
        if examination.session.config.loss.old_decay:
            words += "; not so in later steps, which an average of the weights samples (loss.old_decay)"
        return True, words
    clip = min(examination.session.config.loss.clip_range)
    words = f"off 1 by up to {worst:.2g} before any update, with a clip range of {clip:g}"
    if worst < NOISE_SHARE * clip:
        return True, f"{words}: noise of the precision, well inside"
    return False, f"{words}: replay differs from the rollout. Use fp32 latents, or a larger micro-batch or clip range"


def gradient_flows(examination: Examination) -> Result:
    """The updates of one step have a finite gradient that is not 0."""
    session, optim = examination.session, examination.session.config.optim
    with examination.watch.phase("update"):
        objective, batches = examination.objective.arranged(examination.trajectories, session.mesh)
        stats = optimise(session.engine, objective, batches, optim.updates_per_rollout)
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
    steps, step = session.config.run.num_steps, sum(seconds[name] for name in PHASES)  # scoring overlaps with them
    if session.config.rollout.sample_ahead:
        step = max(seconds["reward_work"], seconds["rollout"] + seconds["update"])
    minutes = steps * step / 60
    whole = f"{minutes / 60:.1f} hours" if minutes >= 60 else f"{minutes:.1f} minutes"
    words = f"{parts} (a first step: later ones are faster); {steps} steps in about {whole}; "
    return True, f"{words}at most {readable(peak)} on a rank"


CHECKS: dict[str, Callable[[Examination], Result | None]] = {  # None: the recipe does not use it
    "velocity": velocity_is_the_pipelines,
    "ODE": ode_is_diffusers,
    "rewards": rewards_vary,
    "agreement": rewards_agree,
    "shortcuts": shortcuts_are_small,
    "tiles": tiles_change_little,
    "ratio": ratio_is_one,
    "gradient": gradient_flows,
    "cost": time_and_memory,
}


def examine(session: Session, prompts: PromptBatch, heartbeat: Heartbeat) -> list[Finding]:
    """Run the checks up to the first failure; all ranks together, with the same findings."""
    examination = Examination(session, prompts, Stopwatch(heartbeat, 0))
    findings: list[Finding] = []
    for name, check in CHECKS.items():
        result = check(examination)
        findings += [Finding(name, *result)] if result else []
        if not all(finding.holds for finding in findings):
            break
    return findings


def diagnose(session: Session, prompts: PromptBatch, heartbeat: Heartbeat) -> bool:
    """Run the checks and print the findings; whether all hold. Warnings about the installation do not count."""
    started = time.perf_counter()
    if session.mesh.is_main:
        deployed = differences(session.config, session.policy)
        for warning in [*warnings(session), *dependent_measure(session.config), *deployed]:
            print(f"warning: {warning}", flush=True)
    findings = examine(session, prompts, heartbeat)
    if session.mesh.is_main:
        print(as_table(findings, time.perf_counter() - started), flush=True)
    return all(finding.holds for finding in findings)


def dependent_measure(config: Config) -> list[str]:
    """A line if the run's measure scores with what a training reward scores with."""
    for measure, reward in list(config.evaluation.rewards.items())[:1]:
        source = source_of(measure, reward)
        same = [name for name, trains in config.trained_rewards.items() if source_of(name, trains) == source]
        if same:
            return [
                f"evaluation.rewards.{measure}, the run's measure, scores with {source}, as training reward {same[0]} "
                "does: what that overlooks raises both, and neither verdict nor alarm shows it; put one of another "
                "network first"
            ]
    return []


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
