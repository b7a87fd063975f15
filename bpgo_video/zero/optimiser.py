"""Which optimiser of torch turns gradients into steps? DeepSpeed parts its state over the ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from bpgo_video.config.run import OptimiserConfig


def optimiser_of(parts: Sequence[nn.Module], optim: OptimiserConfig) -> torch.optim.Optimizer:
    """A parameter group for each part."""
    trained = [{"params": [p for p in part.parameters() if p.requires_grad]} for part in parts]
    if optim.name == "sgd":
        return torch.optim.SGD(trained, lr=optim.learning_rate, weight_decay=optim.weight_decay)
    return torch.optim.AdamW(
        trained, lr=optim.learning_rate, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
    )
