"""What can be configured? One tree of frozen dataclasses, and the rules that tie its values together.

Every number has one home: batch, optimiser and schedule here; ZeRO, precision and offload in the DeepSpeed JSON that
`deepspeed` names.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from bpgo_video.config.fields import STRICT, BelowOne, NonNegative, Positive, Unit
from bpgo_video.config.learner import (
    AdvantageConfig,
    BPGOConfig,
    CreditConfig,
    PriorConfig,
    ReliabilityConfig,
    RewardConfig,
)
from bpgo_video.config.run import EmaConfig, OptimiserConfig, ParallelConfig, RunConfig, WandbConfig
from bpgo_video.paths import SHARD_CACHE

FAMILY_OPTIONS = ("embedded_guidance", "decode_timestep", "decode_noise_scale")


def options_of(settings: object) -> dict[str, float]:
    """Settings of one family alone, of a recipe's or a generation's, where they are set."""
    found = {name: getattr(settings, name) for name in FAMILY_OPTIONS}
    return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True, config=STRICT)
class LoraConfig:
    rank: Annotated[int, Field(ge=0)] = 0
    """0 trains all weights instead of adapters."""
    alpha: Positive = 32
    """The adapters' output is scaled by alpha/rank."""
    target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Which linear layers of the transformer get adapters, by the ends of their names."""


@dataclass(frozen=True, config=STRICT)
class PolicyConfig:
    folder: str
    """A diffusers pipeline: local folder, hub id, or `package:module/folder`."""
    max_sequence_length: Positive
    """Text tokens; Wan pads without a mask, so this is part of the policy's identity (512 for Wan2.1)."""
    family: str | None = None
    """Which policy class; None takes what the folder's model_index.json says. Another pipeline of the same weights by
    diffusers' name (WanImageToVideoPipeline), or a class of your own as 'my_pkg.module:Name' (docs/new_family.md)."""
    trained: tuple[str, ...] = ()
    """Which transformers, where a pipeline has several (Wan 2.2: `transformer` at high noise, `transformer_2` at low);
    empty trains all. Denoising steps of the others follow the ODE."""
    lora: LoraConfig = LoraConfig()
    """Train adapters and keep the base weights frozen, or train everything (rank 0, the default)."""
    gradient_checkpointing: bool = False
    """Recompute activations in replay: less memory, about a third more time."""
    compile_blocks: bool = False
    """Compile the transformers' repeated blocks with torch.compile."""
    attention_backend: str | None = None
    """How attention is computed, by diffusers' names (`native`, `_native_cudnn`, `flash`, `_flash_3` ...); None leaves
    diffusers' choice, torch's scaled_dot_product_attention. A backend without gradients cannot train."""
    vae_tiling: bool = False
    """Encode and decode videos in overlapping tiles: a fraction of the memory, longer, and tiles are blended where they
    meet."""
    vae_slicing: bool = False
    """Encode and decode one video at a time: the memory of one, whatever the micro-batch."""
    frozen_rest_on: Literal["device", "cpu"] = "device"
    """Where VAE and image encoder are while they are not at work: `cpu` frees their memory, and moves them there and
    back with every micro-batch."""
    embedded_guidance: NonNegative | None = None
    """HunyuanVideo: the guidance that its distilled transformer is told, in one pass; None takes the pipeline's 6.
    Classifier-free guidance on top is `sampler.guidance_scale`."""
    decode_timestep: Unit | None = None
    """LTX-Video from 0.9.1 on, whose VAE takes out noise that is left: at which level; None takes the pipeline's 0,
    diffusers' documentation recommends 0.05."""
    decode_noise_scale: Unit | None = None
    """LTX-Video: how much noise is added for it; None takes decode_timestep."""

    @property
    def options(self) -> dict[str, float]:
        """The settings above that are one family's own, where they are set."""
        return options_of(self)


@dataclass(frozen=True, config=STRICT)
class VideoConfig:
    num_frames: Positive
    """Frames of a video; of what the policy's VAE can make, such as 4 n + 1 of Wan's."""
    height: Positive
    """Pixels."""
    width: Positive
    """Pixels."""
    fps: Annotated[float, Field(gt=0.0)]
    """Frames a second: what rewards and files take a video to have."""


@dataclass(frozen=True, config=STRICT)
class SamplerConfig:
    name: Literal["flow_sde", "dance_sde", "cps", "sage", "truncated"] = "flow_sde"
    """Transition of the trained steps (`bpgo_video.diffusion.sde.SAMPLERS`); the other steps follow the ODE."""
    num_steps: Annotated[int, Field(ge=2)] = 16
    """Denoising steps of a rollout."""
    eta: Annotated[float, Field(gt=0.0)] = 0.7
    """Noise level of the transition."""
    guidance_scale: Annotated[float, Field(ge=1.0)] = 1.0
    """Classifier-free guidance in rollout and replay alike; 1 switches it off."""
    guidance_scale_2: Annotated[float, Field(ge=1.0)] | None = None
    """Of the low-noise transformer, where a pipeline has two (Wan 2.2); None takes guidance_scale."""
    shift: Annotated[float, Field(gt=0.0)] | None = None
    """Shift of the sigma schedule; None takes the pipeline's own schedule."""
    latents_dtype: Literal["float32", "bfloat16"] = "float32"
    """Latents are rounded to this before their log-prob is taken, so that replay sees the same numbers."""
    train_steps: Literal["all", "random", "window", "random_window"] = "all"
    """Which steps are stochastic and trained; the last one never is. `random` draws a share in each rollout; a window
    is a run of neighbouring steps, in a place of its own or drawn in each rollout."""
    train_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of the steps but the last that are trained, at least one: the window's length, too. Of a pipeline's two
    transformers with one trained (`policy.trained`), that one's steps are meant here and below."""
    window_start: Annotated[int, Field(ge=0)] = 0
    """`window`: its first step; 0 is the noisiest."""
    window_every: Annotated[int, Field(ge=0)] = 0
    """`window`: it moves on by one step every so many training steps, and starts over after the end; 0 keeps it."""
    share_steps: Literal["batch", "group"] = "batch"
    """Random steps are drawn once for all prompts of a training step, or for each prompt, whose group shares them."""
    solver: Literal["euler", "adams_bashforth"] = "euler"
    """How the untrained steps follow the ODE: first order, or second order at the same cost."""

    @property
    def trained_count(self) -> int:
        """How many steps of a rollout are trained, where all but the last can be."""
        return self.trained_of(self.num_steps - 1)

    def trained_of(self, trainable: int) -> int:
        """How many of the steps that can be trained are."""
        share = 1.0 if self.train_steps == "all" else self.train_fraction
        return max(1, round(share * trainable))


@dataclass(frozen=True, config=STRICT)
class RolloutConfig:
    prompts_per_step: Positive = 2
    """Prompts (groups) of one step, over all ranks."""
    group_size: Annotated[int, Field(ge=2)] = 8
    """Samples of one prompt, G."""
    micro_batch_size: Positive = 8
    """Samples that one rank denoises, decodes and replays at once."""
    same_start: bool = False
    """Start all samples of a prompt from the same noise (DanceGRPO, arXiv 2505.07818): their rewards then differ by the
    trained steps alone."""
    parameters: Literal["auto", "gathered", "sharded"] = "auto"
    """Under ZeRO-3: `gathered` keeps all weights on every rank for the length of a rollout, `sharded` fetches each
    block for every denoising step; `auto` gathers where the weights take at most half of the memory free by then."""
    score_ahead: Annotated[int, Field(ge=0)] = 2
    """Chunks of videos that may wait for their scores, or be scored, while the next one is sampled; 0 scores in line.
    The same bits either way; each takes the memory of a micro-batch's videos."""
    offload_trajectories: bool = False
    """Keep trajectories on the CPU between rollout and replay, which fetches one step of them at a time."""


@dataclass(frozen=True, config=STRICT)
class LossConfig:
    objective: Literal["policy_gradient", "awm", "nft"] = "policy_gradient"
    """What is minimised: the surrogate over the rollout's own transitions, or advantage weighted matching or
    DiffusionNFT on its final videos. These two sample by the ODE and learn at the noise levels of the trained steps."""
    nft_beta: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """`nft`: how far its two implicit policies lie from the old one."""
    clip_range: tuple[BelowOne, NonNegative] = (1e-3, 1e-3)
    """The ratio is clipped to [1 - low, 1 + high]; log-probs are means over latent dimensions, so this is small."""
    advantage_clip: Annotated[float, Field(gt=0.0)] = 5.0
    """Advantages are clipped to this magnitude, after the trust weight."""
    trust_region: Literal["clip", "divergence_mask"] = "clip"
    """What bounds a step: the ratio's clip, or a limit on the divergence of the transitions (DPPO)."""
    divergence_limit: Annotated[float, Field(gt=0.0)] = 1e-5
    """`divergence_mask`: where |d mean|^2 / (2 std^2) reaches this, a sample moves no further outwards."""
    ratio: Literal["plain", "guard"] = "plain"
    """`guard` centres the log ratio and gives it one scale at every noise level (GRPO-Guard)."""
    kl_weight: NonNegative = 0.0
    """Weight of the divergence from a reference policy; 0 keeps none."""
    kl_reference: Literal["start", "ema", "previous"] = "start"
    """Which: the starting policy (adapters off, or a frozen copy), the average of the weights (`ema.decay`), or the
    policy that sampled the rollout."""
    kl_space: Literal["velocity", "mean"] = "velocity"
    """Where the divergence is measured: between velocities, or between the means of transitions, over their std."""
    step_weights: Literal["none", "flash", "longcat", "guard", "tempflow"] = "none"
    """How much each denoising step counts in the loss (`bpgo_video.diffusion.steps.STEP_WEIGHTS`), with a mean of 1."""


@dataclass(frozen=True, config=STRICT)
class OptimConfig(OptimiserConfig):
    updates_per_rollout: Positive = 2
    """The trained steps are dealt to this many updates, all against the log-probs of the rollout."""


@dataclass(frozen=True, config=STRICT)
class DataConfig:
    shards: str
    """Prompt shards that bpgo-video prompts wrote: a folder, glob, brace range or URL."""
    split: str = "train"
    """Which of the shards' splits is learned from."""
    cache: str = SHARD_CACHE
    """Where the shards behind a URL are copied to, and where their priors lie."""


@dataclass(frozen=True, config=STRICT)
class EvaluationConfig:
    every: Annotated[int, Field(ge=0)] = 0
    """Steps between held-out evaluations; 0 evaluates before the first and after the last step only."""
    split: str = "heldout"
    """Which of the shards' splits is held out."""
    rewards: dict[str, RewardConfig] = dataclasses.field(default_factory=dict)
    """Scored on held-out prompts and never trained on; the first one is the run's measure. Empty: no evaluation."""
    samples_per_prompt: Positive = 4
    """Videos of each held-out prompt."""
    max_prompts: Positive = 256
    """Held-out prompts at most, evenly spread over the split."""
    num_steps: Annotated[int, Field(ge=1)] = 16
    """ODE steps of a held-out sample."""
    solver: Literal["euler", "adams_bashforth", "shipped"] = "euler"
    """How it follows the ODE: first order, second order at the same cost, or by the pipeline's own scheduler (UniPC for
    Wan), as `bpgo-video generate` does."""
    shift: Annotated[float, Field(gt=0.0)] | None = None
    """Shift of its sigma schedule; None takes the sampler's."""
    guidance_scale: Annotated[float, Field(ge=1.0)] = 1.0
    """Classifier-free guidance of a held-out sample; 1 switches it off."""
    guidance_scale_2: Annotated[float, Field(ge=1.0)] | None = None
    """As sampler.guidance_scale_2."""
    videos: Annotated[int, Field(ge=0)] = 8
    """Held-out videos written at every evaluation, before and after for the report."""
    weights: Literal["raw", "ema", "both"] = "raw"
    """Which weights are evaluated; `ema` and `both` need `ema.decay` above 0. `both` measures the run by the raw ones
    and logs the average's scores beside them, as `heldout_ema/NAME`."""

    def shift_or(self, sampler: SamplerConfig) -> float | None:
        """The shift of the schedule; None takes the pipeline's own."""
        return sampler.shift if self.shift is None else self.shift

    @property
    def measured(self) -> tuple[str, ...]:
        """Kinds of weights; the run is measured by the first."""
        return ("raw", "ema") if self.weights == "both" else (self.weights,)


@dataclass(frozen=True, config=STRICT)
class Config:
    run: RunConfig
    policy: PolicyConfig
    video: VideoConfig
    data: DataConfig
    deepspeed: str
    """DeepSpeed JSON with ZeRO, precision and offload: a file, or the name of a shipped one, such as zero3."""
    rewards: dict[str, RewardConfig]
    """What the policy is trained on, by a name of your choice."""
    sampler: SamplerConfig = SamplerConfig()
    rollout: RolloutConfig = RolloutConfig()
    parallel: ParallelConfig = ParallelConfig()
    prior: PriorConfig = PriorConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    credit: CreditConfig = CreditConfig()
    reliability: ReliabilityConfig = ReliabilityConfig()
    bpgo: BPGOConfig = BPGOConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    ema: EmaConfig = EmaConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    wandb: WandbConfig = WandbConfig()
    recipe: Literal["bpgo"] = "bpgo"
    """What kind of run this is; other kinds have other sections (`sft`: bpgo_video/config/sft.py)."""

    @property
    def micro_batch_size(self) -> int:
        """Samples that one rank sees at once."""
        return self.rollout.micro_batch_size

    @property
    def num_updates(self) -> int:
        """Of the optimiser, in the whole run."""
        return self.run.num_steps * self.optim.updates_per_rollout

    @property
    def algorithm(self) -> str:
        return "bpgo" if self.bpgo.trusts or self.bpgo.zeta != 0 else "grpo"


class ConfigError(ValueError):
    """The configuration breaks a rule; the message says which one and what to do."""

    exit_code: ClassVar[int] = 2
