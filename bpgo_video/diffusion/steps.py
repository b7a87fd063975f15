"""Denoising steps of a rollout: which ones are trained, their weights in the loss, and their split over updates.

The last step is never trained: it ends at sigma = 0, where its density is degenerate or its noise would show in the
video.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import comb

import torch
from jaxtyping import Float
from torch import Tensor

from bpgo_video.diffusion.sde import Sampler, Step
from bpgo_video.types import Table

StepSelection = Callable[[int, int, int, torch.Generator], tuple[int, ...]]  # (num_steps, count, start, generator)
StepWeight = Callable[[Sampler, Step, float], Tensor]


def all_steps(num_steps: int, count: int, start: int, generator: torch.Generator) -> tuple[int, ...]:
    """Every step but the last; ignores count and start."""
    return tuple(range(_trainable(num_steps)))


def random_steps(num_steps: int, count: int, start: int, generator: torch.Generator) -> tuple[int, ...]:
    """`count` steps drawn without replacement, never the last (DanceGRPO, arXiv 2505.07818, trains 60 %)."""
    order = torch.randperm(_trainable(num_steps, count), generator=generator, device=generator.device)
    return tuple(sorted(order[:count].tolist()))


def window(num_steps: int, count: int, start: int, generator: torch.Generator) -> tuple[int, ...]:
    """`count` consecutive steps from `start` on (MixGRPO, arXiv 2507.21802); wraps around after the last window."""
    starts = _trainable(num_steps, count) - count + 1
    return tuple(range(start % starts, start % starts + count))


def random_window(num_steps: int, count: int, start: int, generator: torch.Generator) -> tuple[int, ...]:
    """`count` consecutive steps from a uniformly drawn start; ignores `start`."""
    starts = _trainable(num_steps, count) - count + 1
    first = int(torch.randint(starts, (1,), generator=generator, device=generator.device))
    return tuple(range(first, first + count))


def _trainable(num_steps: int, count: int = 1) -> int:
    if num_steps < 2:
        raise ValueError(f"num_steps={num_steps}: the last step is never trained, so a rollout needs 2 steps or more")
    if not 1 <= count < num_steps:
        raise ValueError(f"count={count}: of {num_steps} denoising steps, 1 to {num_steps - 1} can be trained")
    return num_steps - 1


STEP_SELECTIONS: dict[str, StepSelection] = {
    "all": all_steps,
    "random": random_steps,
    "window": window,
    "random_window": random_window,
}


def trained_before(selection: str, num_steps: int, count: int, start: int, step: int) -> list[float]:
    """The probabilities that 0, 1, 2 ... of the trained steps come before `step`, over the draws of a selection.

    random: C(m, k) C(n - m, count - k) / C(n, count), m = min(step, n), n = num_steps - 1

    Args:
        selection: a key of STEP_SELECTIONS; the next three arguments are the function's.
    """
    trainable = _trainable(num_steps, count)
    if selection == "random":
        before = min(step, trainable)
        ways = [comb(before, k) * comb(trainable - before, count - k) for k in range(count + 1)]
        return [way / comb(trainable, count) for way in ways]
    if selection == "random_window":
        draws = [tuple(range(first, first + count)) for first in range(trainable - count + 1)]
    else:
        draws = [STEP_SELECTIONS[selection](num_steps, count, start, torch.Generator())]
    found = [sum(index < step for index in draw) for draw in draws]
    return [found.count(k) / len(found) for k in range(len(draws[0]) + 1)]


def precedes_trained(selection: str, num_steps: int, count: int, start: int, step: int) -> float:
    """The probability that `step` comes before the first trained step; its arguments are those of `trained_before`."""
    return trained_before(selection, num_steps, count, start, step + 1)[0]


def even_weight(sampler: Sampler, step: Step, eta: float) -> Float[Tensor, ""]:
    """1. Steps at high noise, whose log-prob moves most, dominate the loss."""
    return torch.ones_like(step.sigma)


def flash_weight(sampler: Sampler, step: Step, eta: float) -> Float[Tensor, ""]:
    """1/lambda,   lambda = |d mean / d velocity| / std: how far the log-prob moves with the velocity (Flash-GRPO)

    The mean is linear in the velocity: at velocity 1 and latents 0 it is the derivative.
    """
    one = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)
    transition = sampler(one, torch.zeros_like(one), step, eta)
    return transition.std / transition.mean.abs().squeeze()


def longcat_weight(sampler: Sampler, step: Step, eta: float) -> Float[Tensor, ""]:
    """sqrt(sigma / ((1 - sigma_g) |dt|)) (LongCat-Video, arXiv 2510.22200)"""
    return (step.sigma / ((1 - step.sigma_g) * -step.dt)).sqrt()


def guard_weight(sampler: Sampler, step: Step, eta: float) -> Float[Tensor, ""]:
    """1/|dt| (GRPO-Guard, arXiv 2510.22319), meant for its normalised ratio."""
    return -1 / step.dt


def tempflow_weight(sampler: Sampler, step: Step, eta: float) -> Float[Tensor, ""]:
    """The step's std: steps that explore more count more (TempFlow-GRPO, arXiv 2508.04324)."""
    return sampler(torch.zeros(1, 1, 1, 1, 1), torch.zeros(1, 1, 1, 1, 1), step, eta).std


STEP_WEIGHTS: Table[StepWeight] = Table(
    {
        "none": even_weight,
        "flash": flash_weight,
        "longcat": longcat_weight,
        "guard": guard_weight,
        "tempflow": tempflow_weight,
    }
)


def step_weights(
    name: str, sampler: Sampler, steps: Sequence[Step], eta: float, trainable: Sequence[int] = ()
) -> list[float]:
    """The loss weight of each step but the last, with mean 1 over the trainable steps.

    The mean is over all trainable steps, not over those that one rollout trains: a step has the same weight in every
    rollout.

    Args:
        name: a key of STEP_WEIGHTS.
        trainable: indices of steps; empty means all but the last.

    Raises:
        ValueError: a weight is not finite and positive.
    """
    weights = torch.stack([STEP_WEIGHTS[name](sampler, step, eta).double() for step in steps[:-1]])
    if not bool((weights.isfinite() & (weights > 0)).all()):
        raise ValueError(f"step weights {name!r} are {weights.tolist()}; they must be finite and above 0")
    return (weights / weights[list(trainable) or slice(None)].mean()).tolist()


def split_updates(trained_steps: Sequence[int], updates_per_rollout: int) -> list[tuple[int, ...]]:
    """Distribute the trained steps round-robin over the optimizer updates of one rollout.

    Every update gets a spread of noise levels: (0, 1, 2, 3, 4) over 2 updates is [(0, 2, 4), (1, 3)].

    Raises:
        ValueError: there are more updates than trained steps.
    """
    if not 1 <= updates_per_rollout <= len(trained_steps):
        raise ValueError(
            f"updates_per_rollout={updates_per_rollout} with {len(trained_steps)} trained steps: each update needs a "
            f"step; lower updates_per_rollout to 1..{len(trained_steps)}, or train more denoising steps"
        )
    return [tuple(trained_steps[update::updates_per_rollout]) for update in range(updates_per_rollout)]
