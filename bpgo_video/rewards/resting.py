"""Where are a reward model's weights while nothing is scored? On the device, or on the CPU until they are needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from bpgo_video.rewards.base import RewardModel

DEPTH = 3  # model, encoder, backbone, network


def modules_of(model: RewardModel) -> list[nn.Module]:
    """The model itself, or the networks among its parts and theirs.

    Raises:
        ValueError: there are none, so that nothing can be moved.
    """
    found = list(_modules(model, DEPTH))
    if not found:
        raise ValueError(
            f"rests_on is 'cpu', but {type(model).__name__} has no torch.nn.Module among its parts that could be "
            "moved; leave rests_on at 'device'"
        )
    return found


def _modules(part: object, depth: int) -> Iterator[nn.Module]:
    if isinstance(part, nn.Module):
        yield part
    elif depth and hasattr(part, "__dict__"):
        for inner in vars(part).values():
            yield from _modules(inner, depth - 1)


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
