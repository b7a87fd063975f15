"""Do all ranks see the same, and may all go on? Asked before anything is computed or written, over all nodes.

A mistake on one node alone (a missing file, another version) would leave the other ranks waiting for it in their first
collective, and files that differ without an error would train something that nobody asked for.
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
PAUSE = 0.5  # seconds between looks


def from_all(value: T, mesh: Mesh) -> list[T]:
    """The value of every rank, in their order."""
    values: list[Any] = [value] * mesh.world_size
    if mesh.world_size > 1:
        dist.all_gather_object(values, value)
    return values


def from_main(value: T, mesh: Mesh) -> T:
    """The value of rank 0."""
    return from_all(value, mesh)[0]


@contextmanager
def all_or_none(mesh: Mesh) -> Iterator[None]:
    """Every rank passes the block, or none: where it raises on one rank, all raise.

    The block must not communicate.

    Raises:
        ConfigError: it raised on other ranks only; with the first one's host and message.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as own:  # whatever it is: the others wait in the next line, and it is raised behind that
        error = own
    verdicts = from_all((socket.gethostname(), error and f"{error}"), mesh)
    if error is not None:
        raise error
    failed = [(rank, host, message) for rank, (host, message) in enumerate(verdicts) if message is not None]
    if failed:
        rank, host, message = failed[0]
        others = f" (and {len(failed) - 1} more of {mesh.world_size} ranks)" if len(failed) > 1 else ""
        raise ConfigError(f"rank {rank} on {host}{others}: {message}")


def rank0_first(work: Callable[[], object], mesh: Mesh, sign: Path) -> None:
    """Rank 0 does its work for as long as that takes, then all go on; where it raises, all raise.

    The others wait for a folder to appear, and not in a collective, which gives up after half an hour.

    Args:
        sign: the folder, which all ranks see; it is left.
    """
    with all_or_none(mesh):
        if mesh.is_main:
            try:
                work()
            finally:
                sign.mkdir(parents=True)
        while not sign.exists():
            time.sleep(PAUSE)


def same_everywhere(values: Mapping[str, str], mesh: Mesh) -> None:
    """Every rank has the same `values`, which are told apart by their hashes.

    Raises:
        ConfigError: on every rank; names the first host that differs from rank 0's, and in what.
    """
    hashes = {name: hashlib.sha256(value.encode()).hexdigest() for name, value in values.items()}
    everyone = from_all((socket.gethostname(), hashes), mesh)
    main_host, expected = everyone[0]
    for rank, (host, found) in enumerate(everyone):
        if other := [name for name in expected if found[name] != expected[name]]:
            raise ConfigError(
                f"rank {rank} on {host} differs from rank 0 on {main_host} in: {', '.join(other)}; every node "
                "needs the same command, files and packages: see docs/multi_node.md"
            )
