"""torch's optimizers over a policy's trained parameters; DeepSpeed shards their state over the ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import nn

from bpgo_video.config.run import OptimiserConfig


def _by_dtype(part: nn.Module) -> Iterator[Iterator[nn.Parameter]]:
    trained = sorted((p for p in part.parameters() if p.requires_grad), key=lambda p: p.dtype.itemsize)  # stable
    return (parameters for _, parameters in groupby(trained, key=lambda p: p.dtype))


def optimiser_of(parts: Sequence[nn.Module], optim: OptimiserConfig) -> torch.optim.Optimizer:
    """One parameter group for each part and dtype, which DeepSpeed lays into one buffer each.

    Each group names its part's number as `part`. A part's narrowest dtype comes first: DeepSpeed takes the first
    parameter's dtype for the model's.
    """
    trained = [
        {"params": list(parameters), "part": number}
        for number, part in enumerate(parts)
        for parameters in _by_dtype(part)
    ]
    if optim.name == "sgd":
        return torch.optim.SGD(trained, lr=optim.learning_rate, weight_decay=optim.weight_decay)
    return torch.optim.AdamW(
        trained, lr=optim.learning_rate, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
    )
