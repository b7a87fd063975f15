"""What of a forward hangs on the values of masks, where there are none? It is taken to keep every token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class EveryTokenReal(TorchFunctionMode):
    """Inside the block, to index by a mask copies all rows, by its complement none, and no condition holds.

    HunyuanVideo 1.5 asks whether an image's features are all zero, and sorts the real tokens of texts and image before
    their padding; shapes alone can tell neither.
    """

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function is Tensor.__bool__:
            return False
        if function is Tensor.__getitem__ and isinstance(args[1], Tensor) and args[1].dtype == torch.bool:
            return args[0][:0] if hasattr(args[1], "keeps_none") else args[0].clone()
        found = function(*args, **(kwargs or {}))
        if function is Tensor.__invert__:
            found.keeps_none = True
        return found


def at_once(vae: nn.Module) -> None:
    """Let HunyuanVideo 1.5's VAE take a mask of its size at once: diffusers fills it row by row, minutes for shapes."""
    for part in vae.modules():
        if hasattr(part, "prepare_causal_attention_mask"):
            part.prepare_causal_attention_mask = _square  # type: ignore[assignment]


def _square(
    n_frame: int, n_hw: int, dtype: torch.dtype, device: torch.device, batch_size: int
) -> Float[Tensor, "samples tokens tokens"]:
    return torch.empty(n_frame * n_hw, n_frame * n_hw, dtype=dtype, device=device).expand(batch_size, -1, -1)
