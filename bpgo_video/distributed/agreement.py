"""Agreement between ranks: gather small values, fail together, compare inputs, let rank 0 work first.

Without agreement, an error on one node (a missing file, another version) leaves the other ranks waiting in their next
collective, and inputs that differ between nodes train a model that no recipe describes.
"""

from __future__ import annotations

import hashlib
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from bpgo_video.config.bpgo import ConfigError
from bpgo_video.distributed.mesh import Mesh

T = TypeVar("T")


class OtherRankError(ConfigError):
    """Another rank failed and tells why; this one had no error."""


POLL_SECONDS = 0.5


def from_all(value: T, mesh: Mesh) -> list[T]:
    """Every rank's value, ordered by rank."""
    values: list[Any] = [value] * mesh.world_size
    if mesh.world_size > 1:
        dist.all_gather_object(values, value)
    return values


def from_main(value: T, mesh: Mesh) -> T:
    """Rank 0's value."""
    return from_all(value, mesh)[0]


@contextmanager
def all_or_none(mesh: Mesh) -> Iterator[None]:
    """Raise on every rank if the block raises on any. The block must not communicate.

    An error that not all ranks have gets a note with its rank and host.

    Raises:
        OtherRankError: the block raised on other ranks only; the message gives the first one's rank, host and error.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:  # the other ranks wait in the next line, so communicate first and raise later
        error = caught
    outcomes = from_all((f"rank {mesh.rank} on {socket.gethostname()}", error and f"{error}"), mesh)
    failed = [(rank, message) for rank, message in outcomes if message is not None]
    others = f" (and {len(failed) - 1} more of {mesh.world_size} ranks)" if len(failed) > 1 else ""
    if error is not None:
        if len(failed) < mesh.world_size:
            error.add_note(f"{outcomes[mesh.rank][0]}{others}")
        raise error
    if failed:
        raise OtherRankError(f"{failed[0][0]}{others}: {failed[0][1]}")


def rank0_first(work: Callable[[], object], mesh: Mesh, marker: Path) -> None:
    """Run `work` on rank 0, however long it takes, while the others wait; if it raises, every rank raises.

    The others poll for the folder `marker` instead of waiting in a collective, which would time out.

    Args:
        marker: a folder that does not exist yet, on storage that all ranks share; it is not removed.
    """
    with all_or_none(mesh):
        if mesh.is_main:
            try:
                work()
            finally:
                marker.mkdir(parents=True)
        while not marker.exists():
            time.sleep(POLL_SECONDS)


def same_everywhere(values: Mapping[str, str], mesh: Mesh) -> None:
    """Check that every rank has the same `values`, by their hashes.

    Raises:
        ConfigError: on every rank; names the first host that differs from rank 0's, and the values that differ.
    """
    hashes = {name: hashlib.sha256(value.encode()).hexdigest() for name, value in values.items()}
    everyone = from_all((socket.gethostname(), hashes), mesh)
    main_host, expected = everyone[0]
    for rank, (host, found) in enumerate(everyone):
        if differing := [name for name in expected if found[name] != expected[name]]:
            raise ConfigError(
                f"rank {rank} on {host} differs from rank 0 on {main_host} in: {', '.join(differing)}; every node "
                "needs the same command, files and packages: see docs/multi_node.md"
            )
