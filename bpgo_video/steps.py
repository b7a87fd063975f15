"""Which denoising steps are stochastic and trained, and which optimiser update trains which of them?

The last step is never trained: it ends at sigma = 0, where its density is degenerate or pure noise in the
video.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

StepSelection = Callable[[int, float, torch.Generator], tuple[int, ...]]


def all_steps(num_steps: int, fraction: float, generator: torch.Generator) -> tuple[int, ...]:
    """Every step but the last; fraction and generator have no effect."""
    return tuple(range(_trainable(num_steps)))


def random_steps(num_steps: int, fraction: float, generator: torch.Generator) -> tuple[int, ...]:
    """round(fraction (num_steps - 1)), at least one, of the steps but the last, drawn without replacement."""
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction={fraction}: the share of trained steps lies above 0 and at most at 1")
    trainable = _trainable(num_steps)
    count = max(1, round(fraction * trainable))
    order = torch.randperm(trainable, generator=generator, device=generator.device)
    return tuple(sorted(order[:count].tolist()))


STEP_SELECTIONS: dict[str, StepSelection] = {"all": all_steps, "random": random_steps}


def split_updates(trained_steps: Sequence[int], updates_per_rollout: int) -> list[tuple[int, ...]]:
    """Deals the trained steps round-robin to the optimiser updates of one rollout.

    Every update then sees every group of the rollout and a spread of noise levels: (0, 1, 2, 3, 4) over 2
    updates is [(0, 2, 4), (1, 3)].
    """
    if not 1 <= updates_per_rollout <= len(trained_steps):
        raise ValueError(
            f"updates_per_rollout={updates_per_rollout} with {len(trained_steps)} trained steps: "
            f"an update needs a step of its own; lower updates_per_rollout to 1..{len(trained_steps)}, "
            "or train more denoising steps"
        )
    return [tuple(trained_steps[update::updates_per_rollout]) for update in range(updates_per_rollout)]


def _trainable(num_steps: int) -> int:
    if num_steps < 2:
        raise ValueError(f"num_steps={num_steps}: the last step is never trained, so a rollout needs 2 steps or more")
    return num_steps - 1
