"""What can be configured? One tree of frozen dataclasses, and the rules that tie its values together.

Every number has one home: batch, optimiser and schedule here; ZeRO, precision and offload in the DeepSpeed JSON that
`deepspeed` names.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from bpgo_video.config_fields import STRICT, BelowOne, NonNegative, Positive, Unit
from bpgo_video.learner_config import AdvantageConfig, BPGOConfig, PriorConfig, broken_rules

REWARD_NAME = re.compile(r"[\w:-][\w.:-]*")


@dataclass(frozen=True, config=STRICT)
class RunConfig:
    dir: str
    """Folder that the run writes; an existing one is never overwritten."""
    num_steps: Positive = 100
    """Rollouts in the whole run; each is followed by `optim.updates_per_rollout` optimiser updates."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Every random draw is a function of this, the step, the prompt's id and the sample's index."""
    resume: Literal["never", "auto"] = "never"
    """`auto` continues from the newest complete checkpoint in `dir`, or starts where there is none."""
    save_every: Positive = 50
    """Steps between checkpoints; the last step is always saved."""
    keep_checkpoints: Positive = 2
    """Older checkpoints are deleted."""


@dataclass(frozen=True, config=STRICT)
class LoraConfig:
    rank: Annotated[int, Field(ge=0)] = 0
    """0 trains all weights instead of adapters."""
    alpha: Positive = 32
    """The adapters' output is scaled by alpha/rank."""
    target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True, config=STRICT)
class PolicyConfig:
    folder: str
    """A diffusers pipeline: local folder, hub id, or `package:module/folder`."""
    max_sequence_length: Positive
    """Text tokens; Wan pads without a mask, so this is part of the policy's identity (512 for Wan2.1)."""
    lora: LoraConfig = LoraConfig()
    """Train adapters and keep the base weights frozen, or train everything (rank 0, the default)."""
    gradient_checkpointing: bool = False
    """Recompute activations in replay: less memory, about a third more time."""


@dataclass(frozen=True, config=STRICT)
class VideoConfig:
    num_frames: Positive
    height: Positive
    width: Positive
    fps: Annotated[float, Field(gt=0.0)]


@dataclass(frozen=True, config=STRICT)
class SamplerConfig:
    name: Literal["flow_sde", "dance_sde", "cps", "sage", "truncated"] = "flow_sde"
    """Transition of the trained steps (`bpgo_video.sde.SAMPLERS`); the other steps follow the ODE."""
    num_steps: Annotated[int, Field(ge=2)] = 16
    """Denoising steps of a rollout."""
    eta: Annotated[float, Field(gt=0.0)] = 0.7
    """Noise level of the transition."""
    guidance_scale: Annotated[float, Field(ge=1.0)] = 1.0
    """Classifier-free guidance in rollout and replay alike; 1 switches it off."""
    shift: Annotated[float, Field(gt=0.0)] | None = None
    """Shift of the sigma schedule; None takes the pipeline's own flow_shift."""
    latents_dtype: Literal["float32", "bfloat16"] = "float32"
    """Latents are rounded to this before their log-prob is taken, so that replay sees the same numbers."""
    train_steps: Literal["all", "random"] = "all"
    """Which steps are stochastic and trained: all but the last, or a random fraction of these in each rollout."""
    train_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0

    @property
    def trained_count(self) -> int:
        """How many steps of a rollout are trained; the last one never is."""
        share = self.train_fraction if self.train_steps == "random" else 1.0
        return max(1, round(share * (self.num_steps - 1)))


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
    block for every denoising step; `auto` gathers where the weights take at most half of the memory that is free."""


@dataclass(frozen=True, config=STRICT)
class ParallelConfig:
    sequence: Positive = 1
    """Ranks that share the tokens of each sample (Ulysses); divides the ranks and the policy's attention heads. Groups
    of that many neighbouring ranks are data-parallel to each other."""


@dataclass(frozen=True, config=STRICT)
class RewardConfig:
    model: str
    """A name of `bpgo_video.rewards.base.REWARDS`, or a dotted path `my_pkg.rewards:MyReward`."""
    weight: NonNegative = 1.0
    """Share of the combined advantage."""
    aggregate: Literal["mean", "min"] = "mean"
    """How the scores of a video's frames become the video's score."""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Keyword arguments of the reward model's constructor."""
    second: dict[str, Any] | None = None
    """Trust `reliability`: options in place of some of `options` for a second scoring of each video, say other
    `frames`."""


@dataclass(frozen=True, config=STRICT)
class LossConfig:
    clip_range: tuple[BelowOne, NonNegative] = (1e-3, 1e-3)
    """The ratio is clipped to [1 - low, 1 + high]; log-probs are means over latent dimensions, so this is small."""
    advantage_clip: Annotated[float, Field(gt=0.0)] = 5.0
    """Advantages are clipped to this magnitude, after the trust weight."""


@dataclass(frozen=True, config=STRICT)
class OptimConfig:
    name: Literal["adamw", "sgd"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0.0)] = 1e-5
    betas: tuple[Unit, Unit] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    weight_decay: NonNegative = 0.0
    max_grad_norm: NonNegative = 1.0
    """0 switches clipping off."""
    updates_per_rollout: Positive = 2
    """The trained steps are dealt to this many updates, all against the log-probs of the rollout."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What follows the warm-up; linear and cosine end at 0."""
    warmup_updates: Annotated[int, Field(ge=0)] = 0


@dataclass(frozen=True, config=STRICT)
class DataConfig:
    shards: str
    """Folder of prompt shards that tools/make_prompt_shards.py wrote."""
    split: str = "train"


@dataclass(frozen=True, config=STRICT)
class EvaluationConfig:
    every: Annotated[int, Field(ge=0)] = 0
    """Steps between held-out evaluations; 0 evaluates before the first and after the last step only."""
    split: str = "heldout"
    rewards: dict[str, RewardConfig] = dataclasses.field(default_factory=dict)
    """Scored on held-out prompts and never trained on; the first one is the run's measure. Empty: no evaluation."""
    samples_per_prompt: Positive = 4
    max_prompts: Positive = 256
    num_steps: Annotated[int, Field(ge=1)] = 16
    """ODE steps of a held-out sample."""
    guidance_scale: Annotated[float, Field(ge=1.0)] = 1.0
    videos: Annotated[int, Field(ge=0)] = 8
    """Held-out videos written before and after, for the report."""


@dataclass(frozen=True, config=STRICT)
class WandbConfig:
    project: str | None = None
    """None sends nothing and asks nothing."""
    name: str | None = None
    mode: Literal["online", "offline"] | None = None
    """None is online where an API key is set, else offline."""


@dataclass(frozen=True, config=STRICT)
class Config:
    run: RunConfig
    policy: PolicyConfig
    video: VideoConfig
    data: DataConfig
    deepspeed: str
    """DeepSpeed JSON with ZeRO, precision and offload, for example ds_configs/zero3.json."""
    rewards: dict[str, RewardConfig]
    """What the policy is trained on, by a name of your choice."""
    sampler: SamplerConfig = SamplerConfig()
    rollout: RolloutConfig = RolloutConfig()
    parallel: ParallelConfig = ParallelConfig()
    prior: PriorConfig = PriorConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    bpgo: BPGOConfig = BPGOConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    wandb: WandbConfig = WandbConfig()

    @property
    def algorithm(self) -> str:
        return "bpgo" if self.bpgo.trusts or self.bpgo.zeta != 0 else "grpo"

    @property
    def scores_twice(self) -> bool:
        """Whether each video is scored a second time."""
        return self.bpgo.trusts and self.bpgo.trust == "reliability"


class ConfigError(ValueError):
    """The configuration breaks a rule; the message says which one and what to do."""


def check(config: Config) -> None:
    """The rules that tie several keys together.

    Raises:
        ConfigError: states the values, the rule and the way out.
    """
    if not any(reward.weight > 0 for reward in config.rewards.values()):
        raise ConfigError("a policy is trained on at least one reward of weight above 0; rewards has none")
    for name in (*config.rewards, *config.evaluation.rewards):
        if not REWARD_NAME.fullmatch(name):
            raise ConfigError(f"reward name {name!r} must consist of letters, digits and any of . : _ -")
    rollout = config.rollout
    for message in broken_rules(
        config.prior, config.advantage, config.bpgo, rollout.prompts_per_step, rollout.group_size
    ):
        raise ConfigError(message)
    for name, reward in config.rewards.items() if config.scores_twice else ():
        if reward.second is None or {**reward.options, **reward.second} == reward.options:
            raise ConfigError(
                f"bpgo.trust is 'reliability', which compares two scorings, but rewards.{name}.second is "
                f"{reward.second}: give it options that differ from rewards.{name}.options"
            )
    if config.sampler.name == "cps" and config.sampler.eta > 1:
        raise ConfigError(f"sampler.eta is {config.sampler.eta}; cps takes values up to 1")
    trained = config.sampler.trained_count
    if config.optim.updates_per_rollout > trained:
        raise ConfigError(
            f"optim.updates_per_rollout is {config.optim.updates_per_rollout}, but {trained} of "
            f"{config.sampler.num_steps} denoising steps are trained and each update needs one of its own; lower it to "
            f"{trained}, or train more steps"
        )
    leaked = set(config.rewards) & set(config.evaluation.rewards)
    if leaked:
        raise ConfigError(
            f"{sorted(leaked)} are in rewards and in evaluation.rewards; use two names to train on "
            "a reward and also report it on held-out prompts"
        )


def check_world(config: Config, world_size: int) -> None:
    """Every rank gets the same whole number of micro-batches.

    Raises:
        ConfigError: names the numbers and the nearest ones that work.
    """
    rollout, sequence = config.rollout, config.parallel.sequence
    if world_size % sequence:
        raise ConfigError(
            f"parallel.sequence is {sequence}, which does not divide {world_size} ranks into groups; it can be one of "
            f"{[size for size in range(1, world_size + 1) if world_size % size == 0]}"
        )
    samples = rollout.prompts_per_step * rollout.group_size
    groups = world_size // sequence
    unit = groups * rollout.micro_batch_size
    if samples % unit:
        raise ConfigError(
            f"prompts_per_step x group_size = {rollout.prompts_per_step} x {rollout.group_size} = {samples} samples "
            f"do not divide into {groups} {'ranks' if sequence == 1 else 'sequence groups'} x micro_batch_size "
            f"{rollout.micro_batch_size} = {unit}; change one of them so that the samples are a multiple (for example "
            f"{max(unit, samples - samples % unit)})"
        )
