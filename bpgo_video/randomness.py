"""Where does a random number come from? From its key alone, never from a rank or a global generator.

Every draw is keyed by (seed, purpose, step, prompt id, sample index, denoising step): results do not depend on the
world size, on resume, on overlap or on evaluation.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


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


@contextmanager
def fixed_draws(device: torch.device | str) -> Iterator[None]:
    """What draws from torch's global generators inside, and takes no other, draws the same every time.

    LTX-Video 0.9.1's VAE adds noise within its layers. The generators go on outside as if nothing had been drawn.
    """
    cuda = [device] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(0)
        yield


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
