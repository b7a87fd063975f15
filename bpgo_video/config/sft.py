"""What can be configured of a warm start? The tree of an `sft` recipe; sections that other recipes have are theirs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from bpgo_video.config.bpgo import (
    Config,
    ConfigError,
    DataConfig,
    PolicyConfig,
    VideoConfig,
)
from bpgo_video.config.fields import STRICT, Positive, Unit
from bpgo_video.config.rules import check_division, compiling_rules
from bpgo_video.config.run import EmaConfig, OptimiserConfig, ParallelConfig, RunConfig, WandbConfig


@dataclass(frozen=True, config=STRICT)
class MatchingConfig:
    batch_size: Positive = 32
    """Clips of one update, over all ranks."""
    micro_batch_size: Positive = 4
    """Clips that one rank sees at once; the gradients of its micro-batches are accumulated."""
    density: Literal["logit_normal", "uniform"] = "logit_normal"
    """How noise levels are drawn (`bpgo_video.diffusion.flow_matching.DENSITIES`), before the shift."""
    density_mean: float = 0.0
    """`logit_normal`: mean of the levels' logit; above 0 for more noise."""
    density_std: Annotated[float, Field(gt=0.0)] = 1.0
    """`logit_normal`: its standard deviation."""
    shift: Annotated[float, Field(gt=0.0)] | None = None
    """Shift of the levels that were drawn; None takes the pipeline's own flow_shift."""
    caption_dropout: Unit = 0.1
    """Share of clips that are learned under the shards' negative prompt instead of their caption: classifier-free
    guidance needs some."""


@dataclass(frozen=True, config=STRICT)
class MatchingEvaluationConfig:
    split: str | None = None
    """Clips whose loss is measured and never learned from; None measures nothing."""
    every: Annotated[int, Field(ge=0)] = 0
    """Steps between held-out evaluations; 0 evaluates before the first and after the last step only."""
    levels: Positive = 4
    """Noise levels at which each clip is seen, evenly spread before the shift."""
    max_clips: Positive = 256
    """Clips of that split at most, evenly spread over it."""
    weights: Literal["raw", "ema"] = "raw"
    """Which weights are evaluated; `ema` needs `ema.decay` above 0."""


@dataclass(frozen=True, config=STRICT)
class SftConfig:
    recipe: Literal["sft"]
    """What kind of run this is; see `bpgo` for the other."""
    run: RunConfig
    policy: PolicyConfig
    video: VideoConfig
    data: DataConfig
    deepspeed: str
    """DeepSpeed JSON with ZeRO, precision and offload: a file, or the name of a shipped one, such as zero3."""
    sft: MatchingConfig = MatchingConfig()
    parallel: ParallelConfig = ParallelConfig()
    optim: OptimiserConfig = OptimiserConfig()
    ema: EmaConfig = EmaConfig()
    evaluation: MatchingEvaluationConfig = MatchingEvaluationConfig()
    wandb: WandbConfig = WandbConfig()

    @property
    def micro_batch_size(self) -> int:
        """Clips that one rank sees at once."""
        return self.sft.micro_batch_size

    @property
    def num_updates(self) -> int:
        """Of the optimiser, in the whole run."""
        return self.run.num_steps

    @property
    def algorithm(self) -> str:
        return "sft"


Recipe = Config | SftConfig


def broken_rules(config: SftConfig) -> Iterator[str]:
    sft = config.sft
    yield from compiling_rules(config.policy, config.parallel)
    if sft.batch_size % sft.micro_batch_size:
        yield (
            f"sft.batch_size {sft.batch_size} is no multiple of sft.micro_batch_size {sft.micro_batch_size}; change one"
        )
    if config.evaluation.weights == "ema" and config.ema.decay == 0:
        yield (
            "evaluation.weights is 'ema' with ema.decay = 0, which keeps no average; set ema.decay, or evaluate the "
            "'raw' weights"
        )
    if config.evaluation.split == config.data.split:
        yield (
            f"evaluation.split and data.split are both {config.data.split!r}: what is learned from is not held out; "
            "name another split, or null for no evaluation"
        )


def check_sft(config: SftConfig) -> None:
    """Whether the values go together. Raises ConfigError at the first rule that is broken."""
    for message in broken_rules(config):
        raise ConfigError(message)


def check_sft_world(config: SftConfig, world_size: int) -> None:
    """Every rank gets the same whole number of micro-batches. Raises ConfigError, as `check_division`."""
    check_division(config, world_size, config.sft.batch_size, f"sft.batch_size {config.sft.batch_size} clips")
