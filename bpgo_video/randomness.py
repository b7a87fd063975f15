"""Random numbers that are a function of a key, never of a rank or of a global generator's state.

Every draw has a key of (seed, purpose, step, prompt id, sample index, denoising step). Results therefore do not depend
on the world size, on resuming, on the overlap of rollout and reward, or on evaluation.
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
    """A CPU generator seeded with a hash of the key."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def keyed_noise(shape: Sequence[int], keys: Sequence[tuple[int | str, ...]], device: torch.device | str) -> Tensor:
    """Standard normal noise, one row per key: [len(keys), *shape], fp32.

    Drawn on the CPU: a row has the same numbers on any hardware and in any batch.
    """
    rows = [torch.randn(tuple(shape), generator=generator_of(*key)) for key in keys]
    return torch.stack(rows).to(device)


class FixedDraws(TorchFunctionMode):
    """A context in which draws of this thread without a generator repeat the same numbers every time.

    LTX-Video 0.9.1's VAE adds noise within its layers. The mode leaves torch's global generators alone, since rewards
    may draw from them in another thread at the same time.
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
    """A block after which the global generators of Python, NumPy and torch have the state that they had before.

    For code without keys: a user's reward may draw freely, and an evaluation must not change what is trained.
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
    """`isolated` with seed 0: every block draws the same numbers, if no other thread draws at the same time."""
    with isolated():
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        yield
