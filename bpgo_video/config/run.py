"""How can any run be set? Its length, seed and checkpoints, ranks, optimiser, the average of its weights, and wandb."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from bpgo_video.config.fields import STRICT, BelowOne, NonNegative, Positive, Unit


@dataclass(frozen=True, config=STRICT)
class RunConfig:
    dir: str
    """Folder that the run writes; an existing one is never overwritten."""
    num_steps: Positive = 100
    """Training steps in the whole run: rollouts, each followed by `optim.updates_per_rollout` updates; of a warm start,
    updates."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Every random draw is a function of this, the step, the prompt's id and the sample's index."""
    resume: Literal["never", "auto"] = "never"
    """`auto` continues from the newest complete checkpoint in `dir`, or starts where there is none."""
    resume_optimizer: Literal["keep", "fresh"] = "keep"
    """`fresh` resumes weights, their average, data position and schedule, and resets the optimizer's moments: the
    way between ZeRO 3 and the other stages."""
    save_every: Positive = 50
    """Steps between checkpoints; the last step is always saved."""
    keep_checkpoints: Positive = 2
    """Older checkpoints are deleted."""
    keep_every: Annotated[int, Field(ge=0)] = 0
    """Checkpoints of steps that this divides are kept for good; 0 keeps none for good."""


@dataclass(frozen=True, config=STRICT)
class ParallelConfig:
    sequence: Positive = 1
    """Ranks that share the tokens of each sample (Ulysses); divides the ranks and the policy's attention heads. Groups
    of that many neighbouring ranks are data-parallel to each other."""
    heartbeat_timeout: Annotated[float, Field(ge=1.0)] = 45.0
    """Seconds without a sign of life after which a rank counts as dead and the others end; raise it where code keeps
    Python's interpreter lock for longer. A slow reward needs no change."""


@dataclass(frozen=True, config=STRICT)
class OptimiserConfig:
    name: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or plain gradient descent without momentum."""
    learning_rate: Annotated[float, Field(gt=0.0)] = 1e-5
    """After the warm-up, before the schedule lowers it."""
    betas: tuple[Unit, Unit] = (0.9, 0.999)
    """`adamw`: decay of the averages of the gradient and of its square."""
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    """`adamw`: added to the root of the averaged square."""
    weight_decay: NonNegative = 0.0
    """Each update takes this times the learning rate of the weights off them."""
    max_grad_norm: NonNegative = 1.0
    """Gradients are clipped to this norm over all weights; 0 switches clipping off."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What follows the warm-up; linear and cosine end at 0."""
    warmup_updates: Annotated[int, Field(ge=0)] = 0
    """Updates over which the learning rate rises from 0, linearly."""


@dataclass(frozen=True, config=STRICT)
class EmaConfig:
    decay: BelowOne = 0.0
    """Share that the average of the trained weights keeps in each update; 0 keeps no average."""
    warmup: bool = True
    """Keep (1 + n) / (10 + n) after n updates where that is less, so that a short run's average leaves its start."""


@dataclass(frozen=True, config=STRICT)
class WandbConfig:
    project: str | None = None
    """None sends nothing and asks nothing."""
    name: str | None = None
    """Of the run in the project; None lets wandb make one up."""
    mode: Literal["online", "offline"] | None = None
    """None is online where an API key is set, else offline."""
