"""What does a forward keep by a mask that has no values? Every token: the most that it can have to hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
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
