"""The recipe `bpgo`: its tree of sections.

Each number is stated in one place: batch, optimizer and schedule here; ZeRO, precision and offload in the DeepSpeed
JSON that `deepspeed` names.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from bpgo_video.config.fields import (
    AboveZero,
    AtLeastOne,
    Count,
    Held,
    Positive,
    Sigmas,
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
from bpgo_video.config.policy import PolicyConfig, VideoConfig
from bpgo_video.config.run import (
    EmaConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrackerName,
    TrackioConfig,
    WandbConfig,
)
from bpgo_video.config.sampling import RolloutConfig, SamplerConfig
from bpgo_video.errors import InputError
from bpgo_video.files import SHARD_CACHE


class ConfigError(InputError):
    """The configuration breaks a rule; the message names the rule and what to change."""


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
    sigmas: Sigmas = ()
    """Noise levels at which the steps start, as sampler.sigmas; empty takes the sampler's."""
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

    def sigmas_or(self, sampler: SamplerConfig) -> Sigmas:
        """Noise levels at which the steps start; empty is a schedule with a shift."""
        return self.sigmas or (sampler.sigmas if self.shift is None else ())

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
    def averages(self) -> int:
        """Averages of the weights that the run keeps."""
        return (self.ema.decay > 0) + (self.loss.old_decay > 0)

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
