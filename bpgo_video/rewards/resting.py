"""Where are a reward model's weights while nothing is scored? On the device, or on the CPU until they are needed."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from weakref import WeakKeyDictionary

import torch
from torch import nn

from bpgo_video.rewards.base import RewardModel

DEEPEST = 4  # attributes of attributes that are looked through
HOMES: WeakKeyDictionary[nn.Module, torch.device] = WeakKeyDictionary()  # of what rests now; suites may share networks


def modules_of(model: RewardModel) -> list[nn.Module]:
    """The model itself, or the modules among what it holds.

    Raises:
        ValueError: there are none, so that nothing can be moved.
    """
    found = {id(module): module for module in _modules_in(model, DEEPEST)}
    if not found:
        raise ValueError(
            f"rests_on is 'cpu', but {type(model).__name__} holds no torch.nn.Module that could be moved; leave "
            "rests_on at 'device'"
        )
    return list(found.values())


def _modules_in(thing: object, depth: int) -> Iterator[nn.Module]:
    if isinstance(thing, nn.Module):
        yield thing
    elif depth and not isinstance(thing, type | ModuleType):
        for part in _parts_of(thing):
            yield from _modules_in(part, depth - 1)


def _parts_of(thing: object) -> Iterable[object]:
    if isinstance(thing, Mapping):
        return list(thing.values())
    if isinstance(thing, Sequence) and not isinstance(thing, str | bytes):
        return list(thing)
    return list(getattr(thing, "__dict__", {}).values())


def rest(models: Iterable[RewardModel]) -> None:
    """To the CPU, bit by bit the same."""
    for model in models:
        for module in modules_of(model):
            for tensor in itertools.islice(itertools.chain(module.parameters(), module.buffers()), 1):
                HOMES.setdefault(module, tensor.device)  # two of these models may stand on it
            module.to("cpu")


def rise(models: Iterable[RewardModel]) -> None:
    """Back to where they came from; models that do not rest, or whose networks do not, stay where they are."""
    for model in models:
        for module in _modules_in(model, DEEPEST):
            home = HOMES.pop(module, None)
            if home is not None:
                module.to(home)


@contextmanager
def at_work(models: Iterable[RewardModel], resting: Iterable[RewardModel]) -> Iterator[None]:
    """All of them on their devices inside the block; those that rest on the CPU are there after it, unless it failed.

    Args:
        models: of a suite; one may stand on a network that another suite's rests with.
    """
    rise(models)
    yield
    rest(resting)
