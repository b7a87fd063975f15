"""Writing the files of a checkpoint while training goes on, from copies of their content in host memory.

`SaveFiles` receives the files that a rank saves. With copies, a thread copies their tensors to buffers that are kept
from one checkpoint to the next, in pinned memory if they are on a GPU, and writes them. The next update waits for the
copies, which a rollout hides. Without, it writes files as they come. The copies take as much host memory as the rank's
files take on disk.
"""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Content:
    """The content of a file: its containers as they are now, and its tensors, which may change."""

    path: Path
    leaves: list[Any]
    form: Any

    @classmethod
    def of(cls, content: Any, path: Path) -> Content:
        return cls(path, *tree_flatten(content, _is_leaf))

    @property
    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    def with_tensors(self, tensors: Iterable[Tensor]) -> Any:
        """The content with others in place of its tensors, in their order."""
        others = iter(tensors)
        return tree_unflatten([next(others) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves], self.form)


class HostCopies:
    """Copies of tensors in host memory; the buffers are used again for the next copies."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, int], Tensor] = {}  # by file name, and number among its tensors

    def missing(self, content: Content) -> int:
        """Bytes that a copy would allocate."""
        name = content.path.name
        return sum(one.nbytes for number, one in enumerate(content.tensors) if not self._fits(name, number, one))

    def of(self, content: Content) -> Any:
        """The content with copied tensors; on a GPU, complete when the current stream is."""
        return content.with_tensors(
            [self._copy(content.path.name, number, tensor) for number, tensor in enumerate(content.tensors)]
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

    Attributes:
        waited: seconds that updates have waited for copies since the last `write`.
    """

    def __init__(self, copies: bool) -> None:
        self._copies = HostCopies() if copies else None
        self._queue: list[Content] = []
        self._files: dict[Path, File] = {}
        self._copied = threading.Event()
        self._copied.set()
        self.waited = 0.0

    def put(self, content: Any, path: Path) -> None:
        """Write a file now, or keep its content for `write`. A copy that does not fit into memory is not made."""
        kept = Content.of(content, path)
        if self._copies is not None and self._affordable(self._copies.missing(kept)):
            self._queue.append(kept)
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
        """Copy and write what was kept; the entries of all files that were put, and of further ones of this rank.

        Until `wait_for_copies` returns, the tensors that were put must not change.

        Args:
            others: the rank's files on disk, called once all are written.
        """
        queue, files, copies = self._queue, self._files, self._copies
        self._queue, self._files, self.waited = [], {}, 0.0
        ready = torch.cuda.current_stream().record_event() if torch.cuda.is_available() else None
        self._copied.clear()

        def work() -> dict[Path, File]:
            try:
                with _beside(ready):
                    copied = [(copies.of(content), content.path) for content in queue] if copies else []
            finally:
                self._copied.set()
            files.update({path: write_file(content, path) for content, path in copied})
            files.update({path: file_of(path) for path in others() if path not in files})
            return files

        return begin(work, in_thread=copies is not None)

    def wait_for_copies(self) -> None:
        """Call it before any tensor changes that was put."""
        began = time.perf_counter()
        self._copied.wait()
        self.waited += time.perf_counter() - began


@contextmanager
def _beside(ready: Any) -> Iterator[None]:
    """On a GPU, a stream of its own that starts at the event `ready`; complete at the end of the block."""
    if ready is None:
        yield
        return
    with torch.cuda.stream(torch.cuda.Stream()) as _:
        torch.cuda.current_stream().wait_event(ready)
        yield
        torch.cuda.current_stream().synchronize()


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
