"""The recipe `bpgo`: its tree of sections.

Each number is stated in one place: batch, optimizer and schedule here; ZeRO, precision and offload in the DeepSpeed
JSON that `deepspeed` names.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import Field

from bpgo_video.config.fields import (
    HELD,
    AboveZero,
    AtLeastOne,
    Count,
    Held,
    NonNegative,
    OrFunction,
    Positive,
    Several,
    Share,
    Switch,
    Unit,
    section,
)
from bpgo_video.config.learner import (
    AdvantageConfig,
    BPGOConfig,
    CreditConfig,
    LossConfig,
    PriorConfig,
    ReliabilityConfig,
    RewardConfig,
)
from bpgo_video.config.run import (
    EmaConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrackerName,
    TrackioConfig,
    WandbConfig,
)
from bpgo_video.errors import InputError
from bpgo_video.files import SHARD_CACHE

FAMILY_OPTIONS = ("embedded_guidance", "decode_timestep", "decode_noise_scale")


class ConfigError(InputError):
    """The configuration breaks a rule; the message names the rule and what to change."""


def options_of(settings: object) -> dict[str, float]:
    """The FAMILY_OPTIONS that are set in a recipe's `policy` or in a generation's settings."""
    values = {name: getattr(settings, name) for name in FAMILY_OPTIONS}
    return {name: value for name, value in values.items() if value is not None}


@section
class LoraConfig:
    rank: Annotated[Count, Field(le=HELD)] = 0
    """Rank of the adapters; 0 trains all weights and uses no adapters."""
    alpha: Positive = 32
    """The adapters' output is multiplied by alpha/rank."""
    target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Ends of the names of the transformer's linear layers that get adapters."""


@section
class PolicyConfig:
    folder: str
    """A diffusers pipeline: local folder, hub id, or `package:module/folder`."""
    max_sequence_length: Held
    """Text tokens. Wan pads without a mask, so its output depends on this (512 for Wan2.1)."""
    family: str | None = None
    """Policy class; None takes what the folder's model_index.json names. Give another pipeline of the same weights by
    diffusers' name (WanImageToVideoPipeline), or your own class as 'my_pkg.module:Name' (docs/new_family.md)."""
    trained: tuple[str, ...] = ()
    """Transformers to train if a pipeline has several (Wan 2.2: `transformer` at high noise, `transformer_2` at low);
    empty trains all. The denoising steps of the others follow the ODE."""
    lora: LoraConfig = LoraConfig()
    """Train adapters and keep the base weights frozen, or train all weights (rank 0, the default)."""
    gradient_checkpointing: Switch = False
    """Recompute activations in the replay: less memory, about a third more time."""
    checkpointed_share: Share = 1.0
    """Share of the transformer's blocks that `gradient_checkpointing` computes again, evenly spread over its depth. The
    others keep their activations; `bpgo-video plan` names the smallest share that fits."""
    compile_blocks: Switch = False
    """Compile the transformers' repeated blocks with torch.compile."""
    attention_backend: str | None = None
    """Attention implementation, by diffusers' names (`native`, `_native_cudnn`, `flash`, `_flash_3` ...); None takes
    diffusers' default, torch's scaled_dot_product_attention. A backend without gradients cannot train."""
    vae_tiling: Switch = False
    """Encode and decode videos in overlapping tiles: much less memory, more time; tiles are blended where they meet."""
    vae_slicing: Switch = False
    """Encode and decode one video at a time: the memory of one, whatever the micro-batch."""
    vae_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision in which the VAE decodes videos and encodes images. `bfloat16` takes half of the memory and less time,
    but changes pixels, and with them rewards. Video shards and generation stay in float32."""
    frozen_rest_on: Literal["device", "cpu"] = "device"
    """Where the VAE and the image encoder are while unused: `cpu` frees their memory, and copies them to the device and
    back for every micro-batch."""
    embedded_guidance: NonNegative | None = None
    """HunyuanVideo and FLUX.1: guidance input of a distilled transformer, in one pass; None takes the pipeline's 6 or
    3.5. It is independent of classifier-free guidance, `sampler.guidance_scale`."""
    decode_timestep: Unit | None = None
    """LTX-Video from 0.9.1 on: noise level at which its VAE, which removes remaining noise, decodes. None takes the
    pipeline's 0; diffusers' documentation recommends 0.05."""
    decode_noise_scale: Unit | None = None
    """LTX-Video: amount of noise added before decoding; None takes decode_timestep."""

    @property
    def checkpointed(self) -> float:
        """Share of the blocks that the backward computes again."""
        return self.checkpointed_share if self.gradient_checkpointing else 0.0

    @property
    def options(self) -> dict[str, float]:
        """The FAMILY_OPTIONS that are set."""
        return options_of(self)


@section
class VideoConfig:
    num_frames: Held
    """Frames of a video; a number that the policy's VAE can make, such as 4 n + 1 for Wan."""
    height: Held
    """Pixels."""
    width: Held
    """Pixels."""
    fps: AboveZero
    """Frames per second, for rewards and files."""


@section
class SamplerConfig:
    name: Annotated[Literal["flow_sde", "dance_sde", "cps", "sage", "truncated"], OrFunction] = "flow_sde"
    """Transition of the trained steps (`bpgo_video.diffusion.sde.SAMPLERS`); the other steps follow the ODE."""
    num_steps: Several = 16
    """Denoising steps of a rollout."""
    eta: AboveZero = 0.7
    """Noise level of the transition."""
    guidance_scale: AtLeastOne = 1.0
    """Classifier-free guidance in rollout and replay; 1 uses none."""
    guidance_scale_2: AtLeastOne | None = None
    """Guidance scale of the low-noise transformer if a pipeline has two (Wan 2.2); None takes guidance_scale."""
    shift: AboveZero | None = None
    """Shift of the sigma schedule; None takes the pipeline's own schedule."""
    latents_dtype: Literal["float32", "bfloat16"] = "float32"
    """Latents are rounded to this before their log-prob is computed, so that the replay uses the same numbers."""
    train_steps: Literal["all", "random", "window", "random_window"] = "all"
    """Denoising steps that are stochastic and trained; the last step never is. `random` chooses a share of them in each
    rollout; `window` is a run of neighbouring steps from `window_start`, `random_window` one at a random position."""
    train_fraction: Share = 1.0
    """Share of the steps but the last that are trained, at least one; also the length of a window. If only one of two
    transformers is trained (`policy.trained`), this and the next keys count that transformer's steps."""
    window_start: Count = 0
    """`window`: its first step; 0 is the noisiest."""
    window_every: Count = 0
    """`window`: training steps after which it moves on by one step; it starts again after the end. 0 never moves it."""
    share_steps: Literal["batch", "group"] = "batch"
    """Random steps are chosen once for all prompts of a training step (`batch`), or once for each prompt (`group`)."""
    solver: Annotated[Literal["euler", "adams_bashforth"], OrFunction] = "euler"
    """ODE solver of the untrained steps: first order, or second order at the same cost."""

    @property
    def trained_count(self) -> int:
        """Trained steps of a rollout in which all steps but the last can be trained."""
        return self.trained_of(self.num_steps - 1)

    def trained_of(self, trainable: int) -> int:
        """Trained steps of a rollout in which `trainable` steps can be trained."""
        share = 1.0 if self.train_steps == "all" else self.train_fraction
        return max(1, round(share * trainable))


@section
class RolloutConfig:
    prompts_per_step: Held = 2
    """Prompts (groups) of one training step, over all ranks."""
    group_size: Several = 8
    """G, the samples of one prompt."""
    micro_batch_size: Held = 8
    """Samples that one rank denoises, decodes and replays at once."""
    same_start: Switch = False
    """Start all samples of a prompt from the same noise (DanceGRPO, arXiv 2505.07818): only the trained steps make
    their rewards differ."""
    branches: tuple[Positive, ...] = ()
    """Sample trees (BranchGRPO, arXiv 2509.06040): children of each node at the first, second ... trained step, with
    `same_start`; their product is the group's size. [4, 2] makes 4 nodes, then 8 samples. What samples share is
    computed and replayed once, with the mean of their advantages. Empty: samples split at every trained step."""
    parameters: Literal["auto", "gathered", "sharded"] = "auto"
    """ZeRO-3: `gathered` keeps all weights on every rank during a rollout; `sharded` fetches each block in every
    denoising step; `auto` gathers if the weights take at most half of the free memory."""
    guidance_every: Positive = 1
    """Steps that are not trained compute the negative prompt's half of the guidance once in so many of them, and use
    its distance from the other half in between: at 2 a quarter less work. Other videos are sampled, and the ratio stays
    1; bpgo-video doctor measures the difference."""
    attention_backend: str | None = None
    """Attention of the steps that are not trained, such as `sage`, which has no gradient; None takes
    policy.attention_backend. Other videos are sampled, as above."""
    score_ahead: Count = 2
    """Chunks of videos that may wait for their scores while the next one is sampled; 0 scores in line. The results are
    the same; each chunk takes the memory of a micro-batch's videos."""
    sample_ahead: Switch = False
    """Sample the next step's videos before this step's update, so that rewards score while the policy samples and
    trains: for rewards that take longer than that. Rollouts are then one step old (their first ratio is not 1), except
    after checkpoints and evaluations. A step's videos may wait for their scores, in place of `score_ahead` chunks."""
    offload_trajectories: Switch = False
    """Keep trajectories on the CPU between rollout and replay, which fetches one step of them at a time."""

    @property
    def takes_shortcuts(self) -> bool:
        """Whether untrained steps are computed more cheaply than trained ones."""
        return self.guidance_every > 1 or self.attention_backend is not None


@section
class OptimConfig(OptimizerConfig):
    updates_per_rollout: Positive = 2
    """Optimizer updates per rollout; each replays its share of the trained steps, against the rollout's log-probs."""


@section
class DataConfig:
    shards: str
    """Prompt shards that bpgo-video prompts wrote: a folder, glob, brace range or URL."""
    split: str = "train"
    """Split of the shards that is trained on."""
    cache: str = SHARD_CACHE
    """Folder for copies of the shards of a URL, and for their priors."""


@section
class EvaluationConfig:
    every: Count = 0
    """Steps between held-out evaluations; 0 evaluates before the first and after the last step only."""
    split: str = "heldout"
    """Split of the shards that is held out."""
    rewards: dict[str, RewardConfig] = dataclasses.field(default_factory=dict)
    """Rewards of held-out prompts, never trained on; the first one is the run's measure. Empty: no evaluation."""
    samples_per_prompt: Held = 4
    """Videos of each held-out prompt."""
    max_prompts: Positive = 256
    """Maximum number of held-out prompts, evenly spread over the split."""
    num_steps: Held = 16
    """ODE steps of a held-out sample."""
    solver: Literal["euler", "adams_bashforth", "shipped"] = "euler"
    """ODE solver: first order, second order at the same cost, or the pipeline's own scheduler (UniPC for Wan), as in
    `bpgo-video generate`."""
    shift: AboveZero | None = None
    """Shift of the sigma schedule; None takes the sampler's."""
    guidance_scale: AtLeastOne = 1.0
    """Classifier-free guidance of a held-out sample; 1 uses none."""
    guidance_scale_2: AtLeastOne | None = None
    """Guidance scale of the low-noise transformer, as sampler.guidance_scale_2."""
    videos: Count = 8
    """Held-out videos that every evaluation writes, for the report's comparison of before and after."""
    weights: Literal["raw", "ema", "both"] = "raw"
    """Weights that are evaluated; `ema` and `both` need `ema.decay` above 0. `both` measures the run by the raw weights
    and logs the average's scores as `heldout_ema/NAME`."""

    alarm: Literal["none", "warn", "stop", "kl"] = "warn"
    """What to do when the trained reward rises while a held-out one falls, by a test over the run's evaluations: say so
    once per reward (`warn`), also end the run with its results (`stop`), or also multiply loss.kl_weight by
    `alarm_kl_factor` (`kl`), again at each further fall."""
    alarm_kl_factor: AtLeastOne = 4.0
    """`kl`: factor of loss.kl_weight at an alarm."""

    def shift_or(self, sampler: SamplerConfig) -> float | None:
        """Shift of the sigma schedule; None is the pipeline's own schedule."""
        return sampler.shift if self.shift is None else self.shift

    @property
    def measured(self) -> tuple[str, ...]:
        """Kinds of weights that are evaluated; the first is the run's measure."""
        return ("raw", "ema") if self.weights == "both" else (self.weights,)


@section
class Config:
    run: RunConfig
    policy: PolicyConfig
    video: VideoConfig
    data: DataConfig
    deepspeed: str
    """DeepSpeed JSON with ZeRO, precision and offload: a file, or the name of a shipped one, such as zero3."""
    rewards: dict[str, RewardConfig]
    """Rewards that the policy is trained on, by names of your choice."""
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
    trackers: tuple[TrackerName, ...] = ()
    """Programs that show the run besides its own report: wandb, tensorboard, trackio, or `my_package.module:Class`."""
    wandb: WandbConfig = WandbConfig()
    trackio: TrackioConfig = TrackioConfig()
    recipe: Literal["bpgo"] = "bpgo"
    """Kind of run; the other kind is `sft`, with other sections."""

    @property
    def micro_batch_size(self) -> int:
        """Samples in one forward pass of a rank."""
        return self.rollout.micro_batch_size

    @property
    def samples(self) -> tuple[int, str]:
        """Samples of a step, over all ranks, and their description in errors."""
        prompts, group = self.rollout.prompts_per_step, self.rollout.group_size
        return prompts * group, f"prompts_per_step x group_size = {prompts} x {group} = {prompts * group} samples"

    @property
    def num_updates(self) -> int:
        """Optimizer updates of the whole run."""
        return self.run.num_steps * self.optim.updates_per_rollout

    @property
    def trained_rewards(self) -> dict[str, RewardConfig]:
        """The rewards of weight above 0; the others are watched."""
        return {name: reward for name, reward in self.rewards.items() if reward.weight > 0}

    @property
    def trusts(self) -> dict[str, Any]:
        """The trust of each reward that has one of its own."""
        return {name: reward.trust for name, reward in self.rewards.items() if reward.trust is not None}

    @property
    def bpgo_by_reward(self) -> dict[str, BPGOConfig]:
        """BPGO's settings for each reward that trains, with its own trust."""
        own, trained = self.trusts, self.trained_rewards
        return {name: dataclasses.replace(self.bpgo, trust=own.get(name, self.bpgo.trust)) for name in trained}

    @property
    def uses_trust(self) -> bool:
        """Whether groups have different weights, by some reward."""
        return any(bpgo.uses_trust for bpgo in self.bpgo_by_reward.values())

    @property
    def needs_prior(self) -> bool:
        """Whether some reward is compared with an anchor."""
        return any(bpgo.needs_prior for bpgo in self.bpgo_by_reward.values())

    @property
    def rescored(self) -> tuple[str, ...]:
        """Rewards that score videos several times."""
        return tuple(name for name, reward in self.rewards.items() if reward.rescorings)

    @property
    def algorithm(self) -> str:
        """Name of the algorithm in summaries: grpo where neither trust nor transformation is used."""
        return "bpgo" if self.uses_trust or self.needs_prior else "grpo"
