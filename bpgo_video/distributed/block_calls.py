"""How must a transformer call its blocks for ZeRO-3 to free their weights in time? With tensors by position.

DeepSpeed frees a block's weights in a backward pass when the gradients of its positional inputs are there. A block that
is called by keyword has none: its weights would be gone before its own backward pass, which then fails.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn


def call_by_position(module: nn.Module, block_classes: tuple[type[nn.Module], ...]) -> None:
    """Let every block of these classes see its inputs by position; to be called before DeepSpeed adds its hooks."""
    for block in module.modules():
        if isinstance(block, block_classes):
            block.register_forward_pre_hook(_by_position, with_kwargs=True)


def _by_position(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    bound = inspect.signature(block.forward).bind(*args, **kwargs)
    return bound.args, bound.kwargs
