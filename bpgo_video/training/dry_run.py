"""What will a run do, in numbers? Shapes, ranks and passes of a step, checked without any weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from bpgo_video.config.rules import check_world
from bpgo_video.diffusion.steps import split_updates
from bpgo_video.training.plan import Job


@dataclass(frozen=True)
class DryRun:
    """One training step.

    Attributes:
        ranks, groups: GPUs, and groups of them that make samples of their own (one each without sequence groups).
        samples: videos of a step, over all ranks.
        samples_per_group: of these, what one group makes.
        micro_batches: forwards of a denoising step on each rank.
        forwards: of a rollout on each rank.
        passes: forwards and backwards of each update on each rank.
        latents: channels, frames, height, width.
        parameters, trained: elements of all transformers, and those that learn.
    """

    ranks: int
    groups: int
    samples: int
    samples_per_group: int
    micro_batches: int
    forwards: int
    passes: tuple[int, ...]
    latents: tuple[int, int, int, int]
    parameters: int
    trained: int

    def as_text(self) -> str:
        passes = " + ".join(map(str, self.passes))
        return (
            f"{self.ranks} ranks in {self.groups} groups; {self.samples} videos a step, {self.samples_per_group} a "
            f"group in {self.micro_batches} micro-batches\n"
            f"latents {' x '.join(map(str, self.latents))}; {self.forwards} forwards a rollout on each rank, "
            f"{len(self.passes)} updates of {passes} passes\n"
            f"{self.parameters:,} parameters, {self.trained:,} trained"
        )

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def dry_run(job: Job) -> DryRun:
    """The numbers of a job.

    Raises:
        ConfigError: the batch does not divide over the ranks, or the policy makes no such video.
    """
    check_world(job.config, job.ranks)
    config, groups = job.config, job.ranks // job.config.parallel.sequence
    rollout, sampler = config.rollout, config.sampler
    samples = rollout.prompts_per_step * rollout.group_size
    micro_batches = samples // groups // rollout.micro_batch_size
    dealt = split_updates(range(sampler.trained_count), config.optim.updates_per_rollout)
    return DryRun(
        ranks=job.ranks,
        groups=groups,
        samples=samples,
        samples_per_group=samples // groups,
        micro_batches=micro_batches,
        forwards=micro_batches * sampler.num_steps,
        passes=tuple(micro_batches * len(steps) for steps in dealt),
        latents=job.latents,
        parameters=job.weights.elements,
        trained=sum(job.weights.trained),
    )
