"""The recipe `sft`, a warm start by flow matching: its tree of sections and their rules."""

from __future__ import annotations

from typing import Literal

from bpgo_video.config.bpgo import Config, DataConfig, PolicyConfig, VideoConfig
from bpgo_video.config.fields import AboveZero, Count, Held, Positive, Real, Unit, section
from bpgo_video.config.rules import Rules, check_rules, common_rules, size_rules
from bpgo_video.config.run import (
    EmaConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrackerName,
    TrackioConfig,
    WandbConfig,
)


@section
class MatchingConfig:
    batch_size: Held = 32
    """Clips of one update, over all ranks."""
    micro_batch_size: Held = 4
    """Clips in one forward pass of a rank; gradients of the micro-batches are accumulated."""
    density: Literal["logit_normal", "uniform"] = "logit_normal"
    """Distribution of the noise levels (`bpgo_video.diffusion.flow_matching.DENSITIES`), before the shift."""
    density_mean: Real = 0.0
    """`logit_normal`: mean of the levels' logit; above 0 for more noise."""
    density_std: AboveZero = 1.0
    """`logit_normal`: standard deviation of the levels' logit."""
    shift: AboveZero | None = None
    """Shift of the sampled levels; None takes the pipeline's own flow_shift."""
    caption_dropout: Unit = 0.1
    """Share of clips that are trained with the shards' negative prompt instead of their caption, which classifier-free
    guidance needs."""


@section
class MatchingEvaluationConfig:
    split: str | None = None
    """Split whose clips are held out; None evaluates nothing."""
    every: Count = 0
    """Steps between held-out evaluations; 0 evaluates before the first and after the last step only."""
    levels: Held = 4
    """Noise levels at which the loss of each clip is measured, evenly spaced before the shift."""
    max_clips: Positive = 256
    """Maximum number of held-out clips, evenly spread over the split."""
    weights: Literal["raw", "ema"] = "raw"
    """Weights that are evaluated; `ema` needs `ema.decay` above 0."""


@section
class SftConfig:
    recipe: Literal["sft"]
    """Kind of run; the other kind is `bpgo`, with other sections."""
    run: RunConfig
    policy: PolicyConfig
    video: VideoConfig
    data: DataConfig
    deepspeed: str
    """DeepSpeed JSON with ZeRO, precision and offload: a file, or the name of a shipped one, such as zero3."""
    sft: MatchingConfig = MatchingConfig()
    parallel: ParallelConfig = ParallelConfig()
    optim: OptimizerConfig = OptimizerConfig()
    ema: EmaConfig = EmaConfig()
    evaluation: MatchingEvaluationConfig = MatchingEvaluationConfig()
    trackers: tuple[TrackerName, ...] = ()
    """Programs that show the run besides its own report: wandb, tensorboard, trackio, or `my_package.module:Class`."""
    wandb: WandbConfig = WandbConfig()
    trackio: TrackioConfig = TrackioConfig()

    @property
    def micro_batch_size(self) -> int:
        """Clips in one forward pass of a rank."""
        return self.sft.micro_batch_size

    @property
    def samples(self) -> tuple[int, str]:
        """Clips of a step, over all ranks, and their description in errors."""
        return self.sft.batch_size, f"sft.batch_size {self.sft.batch_size} clips"

    @property
    def num_updates(self) -> int:
        """Optimizer updates of the whole run."""
        return self.run.num_steps

    @property
    def averages(self) -> int:
        """Averages of the weights that the run keeps."""
        return int(self.ema.decay > 0)

    @property
    def algorithm(self) -> str:
        """Name of the algorithm in summaries."""
        return "sft"


Recipe = Config | SftConfig


def sft_rules(config: SftConfig) -> Rules:
    sft, split = config.sft, config.data.split
    return {
        **size_rules(config.video, sft.micro_batch_size, f"sft.batch_size {sft.batch_size}", sft.batch_size),
        f"sft.batch_size {sft.batch_size} is no multiple of sft.micro_batch_size {sft.micro_batch_size}; change one": (
            sft.batch_size % sft.micro_batch_size
        ),
        f"evaluation.split and data.split are both {split!r}, but held-out clips must not be trained on; name another "
        "split, or null for no evaluation": config.evaluation.split == split,
        **common_rules(config.policy, config.parallel, config.optim, config.ema, config.evaluation.weights),
    }


def check_sft(config: SftConfig) -> None:
    """Raise ConfigError with the first rule that the recipe breaks."""
    check_rules(sft_rules(config))
