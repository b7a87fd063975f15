"""Offloading of reward models: their weights stay on the CPU while nothing is scored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from types import ModuleType
from weakref import WeakKeyDictionary

import torch
from torch import nn

from bpgo_video.rewards.base import RewardModel

MAX_DEPTH = 4  # of attributes of attributes that are searched for modules
DEVICES: WeakKeyDictionary[nn.Module, torch.device] = WeakKeyDictionary()  # of the modules that are offloaded now


def modules_of(model: RewardModel) -> list[nn.Module]:
    """The model itself if it is a module, else the modules that it holds, each once."""
    return list({id(module): module for module in _modules_in(model, MAX_DEPTH)}.values())


def _modules_in(thing: object, depth: int) -> Iterator[nn.Module]:
    if isinstance(thing, nn.Module):
        yield thing
    elif depth and not isinstance(thing, type | ModuleType | str | bytes):
        by_name = thing if isinstance(thing, Mapping) else getattr(thing, "__dict__", {})
        for part in list(thing if isinstance(thing, Sequence) else by_name.values()):
            yield from _modules_in(part, depth - 1)


def to_cpu(models: Iterable[RewardModel]) -> None:
    """
    Raises:
        ValueError: a model holds no module that could be moved.
    """
    for model in models:
        modules = modules_of(model)
        if not modules:
            raise ValueError(f"{type(model).__name__} holds no torch.nn.Module to offload; set offload: false")
        for module in modules:
            tensor = next(chain(module.parameters(), module.buffers()), None)
            if tensor is not None:
                DEVICES.setdefault(module, tensor.device)  # two of these models may share it
            module.to("cpu")


def to_device(models: Iterable[RewardModel]) -> None:
    """Moves offloaded modules back; others stay where they are."""
    for model in models:
        for module in modules_of(model):
            if module in DEVICES:
                module.to(DEVICES.pop(module))


@contextmanager
def on_device(models: Iterable[RewardModel], offloaded: Iterable[RewardModel]) -> Iterator[None]:
    """All `models` on their devices inside the block; `offloaded` ones go to the CPU after it, unless it failed.

    `models` are all of a suite, since a model may share a network with one that another suite offloads.
    """
    to_device(models)
    yield
    to_cpu(offloaded)
