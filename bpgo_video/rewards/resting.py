"""Where are a reward model's weights while nothing is scored? On the device, or on the CPU until they are needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from bpgo_video.rewards.base import RewardModel


def modules_of(model: RewardModel) -> list[nn.Module]:
    """The model itself or its attributes, as far as they are modules.

    Raises:
        ValueError: there are none, so that nothing can be moved.
    """
    found = [part for part in (model, *vars(model).values()) if isinstance(part, nn.Module)]
    if not found:
        raise ValueError(
            f"rests_on is 'cpu', but {type(model).__name__} has no torch.nn.Module among its attributes that could be "
            "moved; leave rests_on at 'device'"
        )
    return found


def move(models: Iterable[RewardModel], device: torch.device) -> None:
    """Weights keep their bits on the way."""
    for model in models:
        for module in modules_of(model):
            module.to(device)


@contextmanager
def at_work(models: Iterable[RewardModel], device: torch.device) -> Iterator[None]:
    """On `device` inside the block and on the CPU after it, unless it failed."""
    models = list(models)
    move(models, device)
    yield
    move(models, torch.device("cpu"))
