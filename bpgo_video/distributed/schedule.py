"""How does the learning rate move? A warm-up, then one of a table of curves; pure functions of the update's number."""

from __future__ import annotations

import math
from collections.abc import Callable

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}


def learning_rate_factor(name: str, warmup_updates: int, total_updates: int) -> Callable[[int], float]:
    """update -> factor on the learning rate: (update + 1)/warmup_updates at first, then SCHEDULES[name] to the end."""
    curve = SCHEDULES[name]

    def factor(update: int) -> float:
        if update < warmup_updates:
            return (update + 1) / warmup_updates
        return curve(min(1.0, (update - warmup_updates) / max(1, total_updates - warmup_updates)))

    return factor
