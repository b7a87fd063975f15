"""Writing the files of a checkpoint while training goes on, from copies of their content in host memory.

`SaveFiles` receives the files that a rank saves. With copies, it copies their tensors to buffers that it keeps from one
checkpoint to the next, in pinned memory if they are on a GPU, and a thread writes them. Without, it writes them as they
come. The copies take as much host memory as the rank's files take on disk.
"""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from tqdm import tqdm

from bpgo_video.distributed.manifest import File, file_of, write_file
from bpgo_video.distributed.memory import available_memory, ranks_of_this_host

LARGEST_SHARE = 0.5  # of the memory that is available to a rank

T = TypeVar("T")
Sink = Callable[[Any, Path], object]  # receives a file's content (see `write_file`) and path


def _is_leaf(content: Any) -> bool:
    return isinstance(content, torch.Size)  # would come back as a tuple


class HostCopies:
    """Copies of tensors in host memory; the buffers are used again for the next copies."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, int], Tensor] = {}  # by file name, and number among its tensors

    def missing(self, name: str, content: Any) -> int:
        """Bytes that a copy would allocate."""
        tensors = [leaf for leaf in tree_flatten(content, _is_leaf)[0] if isinstance(leaf, Tensor)]
        return sum(tensor.nbytes for number, tensor in enumerate(tensors) if not self._fits(name, number, tensor))

    def of(self, name: str, content: Any) -> Any:
        """The content with copied tensors and containers."""
        leaves, form = tree_flatten(content, _is_leaf)
        numbers = count()
        return tree_unflatten(
            [self._copy(name, next(numbers), leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves], form
        )

    def _fits(self, name: str, number: int, tensor: Tensor) -> bool:
        buffer = self._buffers.get((name, number))
        return buffer is not None and (buffer.shape, buffer.dtype) == (tensor.shape, tensor.dtype)

    def _copy(self, name: str, number: int, tensor: Tensor) -> Tensor:
        if not self._fits(name, number, tensor):
            pinned = tensor.device.type == "cuda"
            self._buffers[name, number] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
        return self._buffers[name, number].copy_(tensor.detach(), non_blocking=True)


class SaveFiles:
    """The files of one rank, of one checkpoint after another.

    Args:
        copies: whether files are written later, by a thread.
    """

    def __init__(self, copies: bool) -> None:
        self._copies = HostCopies() if copies else None
        self._queue: list[tuple[Any, Path]] = []
        self._files: dict[Path, File] = {}

    def put(self, content: Any, path: Path) -> None:
        """Write a file now, or copy its content for `write`. A copy that does not fit into memory is not made."""
        if self._copies is not None and self._affordable(self._copies.missing(path.name, content)):
            self._queue.append((self._copies.of(path.name, content), path))
        else:
            self._files[path] = write_file(content, path)

    def _affordable(self, missing: int) -> bool:
        available = available_memory() // ranks_of_this_host()
        if missing <= LARGEST_SHARE * available:
            return True
        tqdm.write(
            f"{socket.gethostname()}: training waits for its checkpoints to be written, since a copy of "
            f"{missing / 1e9:,.1f} GB needs more than half of the {available / 1e9:,.1f} GB that this rank has left",
            file=sys.stderr,
        )
        return False

    def write(self, others: Callable[[], list[Path]]) -> Future[dict[Path, File]]:
        """Write what is left; the entries of all files that were put, and of further ones of this rank.

        Args:
            others: the rank's files on disk, called once all are written.
        """
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the copies are complete
        queue, files = self._queue, self._files
        self._queue, self._files = [], {}

        def work() -> dict[Path, File]:
            files.update({path: write_file(content, path) for content, path in queue})
            files.update({path: file_of(path) for path in others() if path not in files})
            return files

        return begin(work, in_thread=self._copies is not None)


def begin(work: Callable[[], T], in_thread: bool) -> Future[T]:
    """The future result of `work`, or its exception."""
    future: Future[T] = Future()

    def body() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # raised by result()
            future.set_exception(error)

    if in_thread:  # no pool: an interpreter waits for a pool's threads before it exits
        threading.Thread(target=body, name="checkpoint", daemon=True).start()
    else:
        body()
    return future
