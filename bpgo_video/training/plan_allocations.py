"""How many bytes of tensors are alive at once, at most? Counted at every operation, on real or on fake tensors."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Inside the block, each storage that an operation brings forth counts until nothing refers to it.

    What a kernel takes and gives back while it runs (workspaces, the softmax of an attention that is computed in tiles)
    is not seen.

    Args:
        apart: tensors that are not counted, such as a module's weights.

    Attributes:
        live, peak: bytes now, and the most since the start or since `mark`.
    """

    def __init__(self, apart: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known = weakref.WeakSet(tensor.untyped_storage() for tensor in apart)

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        weakref.finalize(storage, self._forget, size).atexit = False
        self.live += size
        self.peak = max(self.peak, self.live)

    def _forget(self, size: int) -> None:
        self.live -= size

    def mark(self) -> int:
        """The peak so far; it is computed again from what is alive."""
        found, self.peak = self.peak, self.live
        return found
