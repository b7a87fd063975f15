"""Seconds, MFU and peak memory of the parts of a training step, attention backends and compiled blocks.

MFU is the model's floating-point operations, with attention but without recomputation, over the rate of bf16 matrix
products in the same run. A replayed step counts three forwards. Measurements use the recipe's guidance, micro-batch and
checkpointing under ZeRO-3 on one rank; the comparison of kernels uses one sample without an engine.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_dispatch import attention_backend
from torch import Tensor
from torch.nn.attention import SDPBackend

from bpgo_video.config.bpgo import Config, ConfigError, VideoConfig
from bpgo_video.distributed.engine import Engine
from bpgo_video.planning.footprint import footprint
from bpgo_video.planning.job import Job
from bpgo_video.planning.memory import reckon
from bpgo_video.planning.models import Model, policy_of
from bpgo_video.policies import Policy, load_policy
from bpgo_video.policies.attention_backends import choose_attention
from bpgo_video.policies.networks import blocks_of, compile_blocks
from bpgo_video.randomness import keyed_noise
from bpgo_video.rollouts.denoiser import Denoiser, training_denoiser
from bpgo_video.training.session import build_engine, builder, sampling_policy
from bpgo_video.types import Guidance, Latents
from tools.bench.timing import seconds
from tools.gpu.bench import Bench, random_folder, release, with_blocks
from tools.gpu.stages import Note, free_memory

STEP = 3  # index of the timed denoising step
GUIDED = 2  # rows per sample: with and without the prompt
TIMED_BACKENDS = ("native", "_native_flash", "_native_cudnn", "_native_efficient", "flash", "_flash_3")
UNUSABLE = (
    ConfigError,
    ImportError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)  # raised by unusable backends
NOT_HELD = ("trajectories", "videos to be scored")  # parts of a plan that these measurements exclude
LONGEST = 300  # characters of a reason
WARM_UP = 300  # matrix products, half a second: an idle GPU's clocks are low


@dataclass(frozen=True)
class Timing:
    """Median seconds of a function, and the peak memory of the process meanwhile."""

    seconds: float
    peak_bytes: int


def resident_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


RESET_PEAK: dict[str, Callable[[], object]] = {
    "cuda": lambda: torch.cuda.reset_peak_memory_stats(),
    "cpu": lambda: Path("/proc/self/clear_refs").write_text("5", "utf-8"),
}
READ_PEAK: dict[str, Callable[[], int]] = {
    "cuda": lambda: torch.cuda.max_memory_allocated(),
    "cpu": lambda: resident_bytes("VmHWM"),
}


def measured(bench: Bench, work: Callable[[], object], before: Callable[[], object] = lambda: None) -> Timing:
    """Timing of `work` after a warm-up call; `before` precedes each call and is not measured."""
    times, peaks = [], []
    for _ in range(1 + bench.sizes.rounds):
        before()
        RESET_PEAK[bench.device.type]()
        times.append(seconds(work))
        peaks.append(READ_PEAK[bench.device.type]())
    return Timing(statistics.median(times[1:]), max(peaks[1:]))


def matrix_rate(bench: Bench) -> float:
    """Operations per second of one large bf16 matrix product."""
    size = bench.sizes.matrix
    a, b = (torch.randn(size, size, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(WARM_UP):
        a @ b
    return 2 * size**3 / statistics.median(seconds(lambda: a @ b) for _ in range(30))


def forward_operations(model: Model, video: VideoConfig, text_tokens: int) -> int:
    """Floating-point operations of a forward of one row with attention, counted as `bpgo-video plan` does."""
    policy = policy_of(model, family=None, max_sequence_length=text_tokens)
    return footprint(policy, video, samples=1, dtype=torch.bfloat16).forward.operations


@dataclass(frozen=True)
class Sample:
    """The inputs of one sample's denoising step."""

    denoiser: Denoiser
    latents: Latents
    noise: Latents
    guidance: Guidance

    @classmethod
    def of(cls, bench: Bench, policy: Policy, config: Config) -> Sample:
        shape, device = policy.latent_shape(config.video), bench.device
        text = (config.policy.max_sequence_length, policy.transformer_config["text_dim"])
        latents, noise = (keyed_noise(shape, [("gpu", name)], device) for name in ("latents", "noise"))
        prompt, empty = (keyed_noise(text, [("gpu", name)], device).bfloat16() for name in ("prompt", "empty"))
        guidance = Guidance({"prompt_embeds": prompt}, {"prompt_embeds": empty})
        return cls(training_denoiser(policy, config), latents, noise, guidance)

    @torch.no_grad()
    def velocity(self) -> Tensor:
        """A forward of one row."""
        return replace(self.denoiser, guidance_scale=1.0).velocity(self.latents, STEP, self.guidance)

    @torch.no_grad()
    def step(self) -> tuple[Latents, Tensor]:
        """A rollout step: the next latents and their log-prob."""
        transition = self.denoiser.transition(self.latents, STEP, self.guidance)
        reached = transition.sample(self.noise)
        return reached, transition.log_prob(reached)

    def log_prob(self, reached: Latents) -> Tensor:
        """The log-prob of the same step in replay, with gradients."""
        latents = self.latents.detach().requires_grad_()
        return self.denoiser.transition(latents, STEP, self.guidance).log_prob(reached)

    @torch.no_grad()
    def log_prob_of(self, reached: Latents) -> Tensor:
        """The log-prob of the step in a rollout."""
        return self.denoiser.transition(self.latents, STEP, self.guidance).log_prob(reached)

    def twice(self) -> Sample:
        """The sample repeated, as a micro-batch of two."""
        two = {
            name: {key: value.repeat(2, 1, 1) for key, value in getattr(self.guidance, name).items()}
            for name in ("towards", "away")
        }
        latents, noise = (tensor.repeat(2, 1, 1, 1, 1) for tensor in (self.latents, self.noise))
        return Sample(self.denoiser, latents, noise, Guidance(**two))


Part = Callable[[Bench, Policy, Engine, "Timed"], None]


@dataclass(frozen=True)
class Timed:
    """Results for one model and video size; each addition is recorded under its name."""

    model: Model
    config: Config
    rate: float
    note: Note
    results: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        video = self.config.video
        blocks = self.model.transformer["num_layers"]
        return f"{self.model.name}, {blocks} blocks, {video.height}x{video.width}x{video.num_frames}"

    def add(self, **figures: float) -> None:
        self.results.update(figures)
        self.note(self.name, figures)

    def add_timing(self, name: str, timing: Timing, forwards: int = 0) -> None:
        """Add seconds and peak bytes, and MFU if `forwards`, the number of row forwards, is given."""
        self.add(**{f"{name}_seconds": timing.seconds, f"{name}_peak_bytes": timing.peak_bytes})
        if forwards:
            self.add(**{f"{name}_mfu": forwards * self.results["forward_operations"] / timing.seconds / self.rate})


def time_steps(bench: Bench, model: Model, videos: Sequence[VideoConfig], parts: Sequence[Part], note: Note) -> Timed:
    """Time parts of a training step for each video under the training engine; return the last video's results."""
    recipe, ds_config = bench.sizes.recipe, bench.ds_config()
    config = replace(recipe, policy=replace(recipe.policy, folder=str(random_folder(bench, model))))
    policy = sampling_policy(config, ds_config, bench.mesh, builder(ds_config))
    engine, rate = build_engine(config, policy, ds_config, bench.mesh), matrix_rate(bench)
    try:
        for video in videos:
            timed = Timed(model, replace(config, video=video), rate, note)
            bench.timed.append(timed)
            for part in parts:
                part(bench, policy, engine, timed)
    finally:
        release(engine)
    return timed


def time_rollout(bench: Bench, policy: Policy, engine: Engine, timed: Timed) -> None:
    """Time a forward, and a denoising step with its log-prob, with gathered weights as in rollouts."""
    config, sample = timed.config, Sample.of(bench, policy, timed.config)
    timed.add(forward_operations=forward_operations(timed.model, config.video, config.policy.max_sequence_length))
    with engine.whole_weights():
        timed.add_timing("forward", measured(bench, sample.velocity), forwards=1)
        timed.add_timing("denoise", measured(bench, sample.step), forwards=GUIDED)
    timed.add(video_denoising_seconds=config.sampler.num_steps * timed.results["denoise_seconds"])


def time_decoding(bench: Bench, policy: Policy, engine: Engine, timed: Timed) -> None:
    """Time the VAE, and derive the seconds of a rollout of one video."""
    sample = Sample.of(bench, policy, timed.config)
    timed.add_timing("decode", measured(bench, lambda: policy.decode(sample.latents, sample.guidance.towards)))
    timed.add(video_rollout_seconds=timed.results["video_denoising_seconds"] + timed.results["decode_seconds"])


def time_replay(bench: Bench, policy: Policy, engine: Engine, timed: Timed) -> None:
    """Time a replayed step with its backward, and measure the drift of its log-prob from the rollout's."""
    sample = Sample.of(bench, policy, timed.config)
    with engine.whole_weights():
        reached, recorded = sample.step()
        in_a_pair = sample.twice().log_prob_of(reached.repeat(2, 1, 1, 1, 1))[0]

    def replay() -> Tensor:
        log_prob = sample.log_prob(reached)
        engine.backward(-log_prob.mean(), last=False)
        return log_prob.detach()

    timed.add(
        log_prob_drift=float((replay() - recorded).abs().max()),
        log_prob_drift_in_a_batch_of_two=float((in_a_pair - recorded).abs().max()),
    )
    timed.add_timing("replay", measured(bench, replay), forwards=3 * GUIDED)


def time_update(bench: Bench, policy: Policy, engine: Engine, timed: Timed) -> None:
    """Time the optimizer's update, which does not depend on the video; gradients come from the smallest one."""
    sample = Sample.of(bench, policy, replace(timed.config, video=bench.sizes.videos[0]))

    def gradients() -> None:
        engine.backward(-sample.log_prob(sample.noise).mean(), last=True)

    timed.add_timing("update", measured(bench, engine.step, before=gradients))


def small_model(bench: Bench, note: Note) -> None:
    """Time all parts of a step of the small model."""
    parts = (time_rollout, time_replay, time_update, time_decoding)
    time_steps(bench, bench.sizes.small, bench.sizes.videos, parts, note)


def large_model(bench: Bench, note: Note) -> None:
    """Time the large model with two numbers of blocks, and extrapolate to all its blocks."""
    videos, parts, (few, more) = bench.sizes.videos[-1:], (time_rollout, time_replay, time_update), bench.sizes.blocks
    models = [with_blocks(bench.sizes.large, blocks) for blocks in (few, more)]
    first, second = (time_steps(bench, model, videos, parts, note).results for model in models)
    blocks = bench.sizes.large.transformer["num_layers"]
    for name in ("forward_seconds", "denoise_seconds", "replay_seconds"):
        each = (second[name] - first[name]) / (more - few)
        note(f"{name}, {blocks} blocks", {"each": each, "all": second[name] + (blocks - more) * each})


def memory_plan(bench: Bench, note: Note) -> None:
    """Compare the planned and the measured memory of each timed phase."""
    for timed in bench.timed:
        plan = reckon(Job(timed.config, bench.ds_config(), ranks=1, model=timed.model))
        results = {}
        for phase, parts in plan.phases.items():
            if peak := timed.results.get(f"{phase}_peak_bytes"):
                planned = sum(size for name, size in parts.items() if name not in NOT_HELD)
                results[phase] = {"planned": planned, "measured": peak, "planned_over_measured": planned / peak}
        note(timed.name, results)


@dataclass(frozen=True)
class PlainModel:
    """The small model without an engine, so that a failing kernel does not affect the next one."""

    bench: Bench
    config: Config
    policy: Policy

    @classmethod
    def of(cls, bench: Bench) -> PlainModel:
        recipe, folder = bench.sizes.recipe, random_folder(bench, bench.sizes.small)
        config = replace(recipe, sampler=replace(recipe.sampler, guidance_scale=1.0))
        policy = load_policy(
            str(folder), components=("transformer",), max_sequence_length=recipe.policy.max_sequence_length,
            dtype=torch.bfloat16, device=bench.device,
        )  # fmt: skip
        for transformer in policy.transformers.values():
            transformer.enable_gradient_checkpointing()
        return cls(bench, config, policy)

    def sample(self, video: VideoConfig) -> Sample:
        return Sample.of(self.bench, self.policy, replace(self.config, video=video))

    def figures(self, sample: Sample) -> dict[str, Any]:
        """Seconds of a forward and of a replayed step, whether gradients are finite, and the drift of the log-prob."""
        transformers = self.policy.transformers
        reached, recorded = sample.step()

        def replay() -> Tensor:
            transformers.zero_grad(set_to_none=True)
            log_prob = sample.log_prob(reached)
            log_prob.mean().backward()
            return log_prob.detach()

        drift = float((replay() - recorded).abs().max())
        finite = all(bool(parameter.grad.isfinite().all()) for parameter in transformers.parameters())
        times = {"forward_seconds": measured(self.bench, sample.velocity).seconds}
        times["replay_seconds"] = measured(self.bench, replay).seconds
        transformers.zero_grad(set_to_none=True)
        return {"holds": finite, "finite_gradients": finite, "log_prob_drift": drift, **times}


def relative_to(results: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    """The results with their seconds relative to those of the default."""
    names = ("forward_seconds", "replay_seconds")
    return {**results, **{name.replace("seconds", "over_default"): results[name] / default[name] for name in names}}


def attention(bench: Bench, note: Note) -> None:
    """Compare each backend with torch's choice: seconds, gradients, and the difference of the velocity."""
    plain_model = PlainModel.of(bench)
    for video in bench.sizes.videos:
        sample = plain_model.sample(video)
        note(f"torch chooses, {video.num_frames} frames", chosen_kernels(plain_model, sample))
        results: dict[str, Any] = {}
        with attention_backend("native"):  # diffusers keeps one backend per process, which is restored here
            for name in TIMED_BACKENDS:
                results[name] = result_or_reason(partial(backend_figures, plain_model, sample, name, results))
                note(f"{video.num_frames} frames", {name: results[name]})


def backend_figures(plain_model: PlainModel, sample: Sample, name: str, others: Mapping[str, Any]) -> dict[str, Any]:
    choose_attention(plain_model.policy.transformers, "native")
    velocity = sample.velocity()
    choose_attention(plain_model.policy.transformers, name)
    difference = float((sample.velocity() - velocity).norm() / velocity.norm())
    figures = {"velocity_difference": difference, **plain_model.figures(sample)}
    return relative_to(figures, others.get("native", figures))


def chosen_kernels(plain_model: PlainModel, sample: Sample) -> dict[str, str]:
    """Kernels that torch's scaled_dot_product_attention selects for the sample's tokens, in a rollout and in replay."""
    settings = plain_model.policy.transformer_config
    tokens = sample.latents[0, 0].numel() // math.prod(settings["patch_size"])
    shape = (1, tokens, settings["num_attention_heads"], settings["attention_head_dim"])
    heads = torch.zeros(shape, dtype=torch.bfloat16, device=sample.latents.device)
    chosen = {}
    for name, trains in (("rollout", False), ("replay", True)):
        with torch.set_grad_enabled(trains):
            query = heads.requires_grad_(trains).transpose(1, 2)  # the layout that diffusers passes
            chosen[name] = SDPBackend(torch._fused_sdp_choice(query, query, query)).name
    return chosen


def compiled(bench: Bench, note: Note) -> None:
    """Compare compiled blocks with eager ones."""
    plain_model = PlainModel.of(bench)
    sample = plain_model.sample(bench.sizes.videos[-1])
    default = plain_model.figures(sample)
    note("blocks as they are", default)
    for transformer in plain_model.policy.transformers.values():
        compile_blocks(transformer, blocks_of(transformer, plain_model.policy.block_names))
    with torch.compiler.set_stance(bench.sizes.stance):
        note("compiled blocks", {"first_forward_seconds": seconds(sample.velocity)})
        note("compiled blocks", relative_to(plain_model.figures(sample), default))


def result_or_reason(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The results of `work`, or the reason why it cannot run here."""
    try:
        return work()
    except UNUSABLE as error:
        results = {"cannot": f"{type(error).__name__}: {error}"[:LONGEST]}
    free_memory()
    return results
