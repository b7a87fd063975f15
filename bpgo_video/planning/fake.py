"""Fake tensors: networks run on shapes alone, and what their operations take is counted.

Fake tensors have a shape and a dtype but no storage, so a policy of 14B parameters runs in seconds on any machine: with
its checkpointing, its adapters, and the exchanges of a sequence group.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from bpgo_video.distributed.mesh import Mesh


class Allocations(TorchDispatchMode):
    """Counts, inside its block, each storage that an operation makes until nothing refers to it.

    What a kernel allocates and frees while it runs (workspaces, a tile of softmax) is not counted.

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
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        weakref.finalize(storage, self._free, size).atexit = False
        self.live += size
        self.peak = max(self.peak, self.live)

    def _free(self, size: int) -> None:
        self.live -= size

    def mark(self) -> int:
        """The peak so far; the next one starts from what is live now."""
        peak, self.peak = self.peak, self.live
        return peak


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape))


FORMULAS: dict[Any, Callable[..., Any]] = {  # torch's registry knows attention on GPUs only; fake tensors run the CPU's
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class Counts(TorchDispatchMode):
    """Counts what the operations inside its block take; what is recomputed counts each time.

    torch's FlopCounterMode has the same formulas, but also follows modules, which keeps activations alive.

    Attributes:
        operations: floating-point ones of matrix products, convolutions and attention; a product of two numbers that is
            added to a third is two.
        moved: bytes that operations read and write, views excluded, as if no kernels were fused.
        exchanged: bytes in the buffers that a rank sends to its sequence group, its own part included.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.moved = self.exchanged = 0

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = operation(*args, **(kwargs or {}))
        if operation._overloadpacket in FORMULAS:
            self.operations += int(FORMULAS[operation._overloadpacket](*args, **(kwargs or {}), out_val=result))
        given = {id(tensor): tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        made = [tensor for tensor in tree_leaves(result) if isinstance(tensor, Tensor) and id(tensor) not in given]
        if operation.namespace == "c10d":
            self.exchanged += max(map(_bytes, given.values()), default=0)
        elif made and not operation.is_view:
            self.moved += sum(map(_bytes, (*given.values(), *made)))
        return result


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class EveryTokenReal(TorchFunctionMode):
    """Inside its block, indexing by a mask keeps all rows, indexing by its complement none, and conditions are false.

    Fake masks have no values. HunyuanVideo 1.5 tests whether an image's features are all zero, and sorts real tokens
    before padding.
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
        result = function(*args, **(kwargs or {}))
        if function is Tensor.__invert__:
            result.keeps_none = True
        return result


def make_fake(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Replace a module's meta tensors by fake ones; call it under a FakeTensorMode."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=dtype)
                part._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = fake_of(buffer)
    return module


def fake_of(value: Any) -> Any:
    return torch.empty(value.shape, dtype=value.dtype) if isinstance(value, Tensor) else value


@contextmanager
def alone_in_a_group(ranks: int) -> Iterator[Mesh]:
    """Rank 0 of a sequence group without the other ranks: exchanges have the right shapes and send nothing.

    Raises:
        RuntimeError: this process is a rank of a real group.
    """
    device = torch.device("cpu")
    if ranks == 1:
        yield Mesh(0, 1, device)
        return
    if dist.is_initialized():
        raise RuntimeError("a plan for sequence groups needs its own process; run bpgo-video plan")
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield Mesh(0, ranks, device, ranks, dist.group.WORLD)
    finally:
        dist.destroy_process_group()
