"""Sections that every kind of recipe has: run, parallelism, optimizer, average of the weights, trackers."""

from __future__ import annotations

from typing import Annotated, Literal

from bpgo_video.config.fields import (
    AboveZero,
    AtLeastOne,
    BelowOne,
    Count,
    Held,
    NonNegative,
    OrFunction,
    Positive,
    Seed,
    Switch,
    Unit,
    section,
)

TrackerName = Annotated[Literal["wandb", "tensorboard", "trackio"], OrFunction]


@section
class RunConfig:
    dir: str
    """Folder for the run's files; an existing one is never overwritten."""
    num_steps: Positive = 100
    """Training steps of the whole run. In reinforcement learning a step is a rollout with
    `optim.updates_per_rollout` updates; in a warm start it is one update."""
    seed: Seed = 0
    """Every random draw is a function of this, the step, the prompt's id and the sample's index."""
    resume: Literal["never", "auto"] = "never"
    """`auto` continues from the newest complete checkpoint in `dir`, or starts if there is none."""
    resume_optimizer: Literal["keep", "fresh"] = "keep"
    """`fresh` resumes the weights, their average, the data position and the schedule, and resets the optimizer's
    moments."""
    save_every: Positive = 50
    """Steps between checkpoints; the last step is always saved."""
    save_minutes: NonNegative = 30.0
    """A checkpoint is also written after the first step that ends this many minutes after the last one, by rank 0's
    clock; 0 counts steps alone."""
    save_async: bool = True
    """Write checkpoints while training goes on, from a copy in host memory that is as large as the checkpoint's part of
    the host; the copy is left out where it needs more than half of the free memory."""
    keep_checkpoints: Positive = 2
    """Number of newest checkpoints that are kept; older ones are deleted."""
    keep_every: Count = 0
    """Checkpoints of steps that are a multiple of this are never deleted; 0 keeps none of them."""
    max_restarts: Count = 0
    """With `--ranks N`: how often ranks that failed unexpectedly are started again from the newest checkpoint. A
    newer checkpoint sets the count back to 0; wrong input and stops by the user start nothing."""


def is_due(steps: int, every: int) -> bool:
    """Whether something done every `every` steps is due after `steps`; 0 means never."""
    return every > 0 and steps % every == 0


def pauses_after(steps: int, run: RunConfig, evaluated_every: int) -> bool:
    """Whether a run is saved, evaluated or finished after so many steps."""
    return steps == run.num_steps or is_due(steps, run.save_every) or is_due(steps, evaluated_every)


@section
class ParallelConfig:
    sequence: Held = 1
    """Ranks that share the tokens of each sample (Ulysses). It must divide the number of ranks and of the policy's
    attention heads. Groups of that many neighbouring ranks are data-parallel to each other."""
    heartbeat_timeout: AtLeastOne = 45.0
    """Seconds without a heartbeat after which a rank counts as dead and the others end. Raise it if code holds Python's
    interpreter lock for longer; slow rewards need no change."""


@section
class OptimizerConfig:
    name: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or gradient descent without momentum."""
    learning_rate: AboveZero = 1e-5
    """Learning rate after the warm-up, before the schedule lowers it."""
    betas: tuple[Unit, Unit] = (0.9, 0.999)
    """`adamw`: decay of the averages of the gradient and of its square."""
    eps: AboveZero = 1e-8
    """`adamw`: added to the root of the averaged square."""
    weight_decay: NonNegative = 0.0
    """Each update subtracts this times the learning rate times the weights."""
    max_grad_norm: NonNegative = 1.0
    """Gradients are clipped to this norm over all weights; 0 does not clip."""
    max_skipped: Count = 3
    """An update whose gradient is not finite is skipped, on all ranks; the run ends after more than this many in a
    row."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up; linear and cosine end at 0."""
    warmup_updates: Count = 0
    """Updates in which the learning rate rises linearly from 0."""
    parameters: Literal["auto", "gathered", "sharded"] = "auto"
    """ZeRO-3: `gathered` keeps all weights on every rank while an update's gradients are computed; `sharded` fetches
    each block in every forward and backward; `auto` gathers if the weights take at most half of the free memory, and on
    a GPU only if the first update, which runs sharded, left room for them. The results are the same."""
    average: Literal["micro_batch", "update"] = "micro_batch"
    """ZeRO-3: when ranks average their gradients, after each micro-batch or once an update. `update` needs `parameters:
    gathered` and 4 bytes per trained weight on every rank; sums are rounded in another order."""


@section
class EmaConfig:
    decay: BelowOne = 0.0
    """Share that the moving average of the trained weights keeps in each update; 0 keeps no average."""
    warmup: Switch = True
    """Use a decay of (1 + n) / (10 + n) after n updates while that is smaller, so that the average of a short run moves
    away from the starting weights."""


@section
class WandbConfig:
    project: str | None = None
    """Project that wandb logs to; a recipe that sets it need not name wandb in `trackers`. None takes WANDB_PROJECT."""
    name: str | None = None
    """Name of the run in the project; None lets wandb choose one."""
    mode: Literal["online", "offline"] | None = None
    """None is online if an API key is set, and offline otherwise."""


@section
class TrackioConfig:
    project: str = "bpgo-video"
    """Project that trackio logs to."""
    space: str | None = None
    """Hugging Face Space, ORG/NAME, that shows the run; None keeps it on this machine."""
