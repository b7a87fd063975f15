"""Where does a random number come from? From its key alone, never from a rank or a global generator.

Every draw is keyed by (seed, purpose, step, prompt id, sample index, denoising step): results do not depend on the
world size, on resume, on overlap or on evaluation.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

DRAWS = frozenset({torch.randn, torch.rand, torch.normal, torch.randint, torch.randperm})


def generator_of(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by a hash of its key."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def keyed_noise(shape: Sequence[int], keys: Sequence[tuple[int | str, ...]], device: torch.device | str) -> Tensor:
    """Standard normal noise, one row per key: [len(keys), *shape], fp32, the same on every device.

    Drawn on the CPU, so that a row is the same number on any hardware and in any batch.
    """
    rows = [torch.randn(tuple(shape), generator=generator_of(*key)) for key in keys]
    return torch.stack(rows).to(device)


class FixedDraws(TorchFunctionMode):
    """Inside, this thread's draws that name no generator come from one of its own: the same every time.

    LTX-Video 0.9.1's VAE adds noise within its layers. torch's global generators are left to others: rewards may draw
    from them in another thread meanwhile.
    """

    def __init__(self) -> None:
        super().__init__()
        self._generators: dict[torch.device, torch.Generator] = {}

    def __torch_function__(
        self, function: Any, types: Any, arguments: Sequence[Any] = (), named: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(named or {})
        if function in DRAWS and given.get("generator") is None:
            device = torch.device(given.get("device") or torch.get_default_device())
            if device not in self._generators:
                self._generators[device] = torch.Generator(device).manual_seed(0)
            given["generator"] = self._generators[device]
        return function(*arguments, **given)


@contextmanager
def isolated() -> Iterator[None]:
    """Draws inside the block, from the global generators of Python, NumPy and torch, leave no trace behind it.

    Our own draws have keys; a user's reward may draw as it likes, and an evaluation must not change what is trained.
    """
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def reseeded() -> Iterator[None]:
    """`isolated`, and every such block draws the same numbers; for a process in which no other thread draws."""
    with isolated():
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        yield
