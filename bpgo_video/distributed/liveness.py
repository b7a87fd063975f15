"""Which rank has died? What every rank says of itself in a store that all share, and what follows from it.

    member-R   who rank R is: host, process
    beat-R     a counter that grows while rank R lives, and where R stands: phase and step
    verdict    empty, or the first rank that died or failed, in words for the user

Rank 0 watches all beats, the others watch rank 0's and the verdict: one small request each, whatever the world's size.
Ranks on one machine also look at each other's processes. Hosts' clocks differ, so a rank is silent when its counter
stands still on the clock of the one who watches.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol, runtime_checkable

from bpgo_video.distributed.processes import Process, is_running

VERDICT = "verdict"


@runtime_checkable
class Store(Protocol):
    """What is needed of torch.distributed.Store; `multi_get` waits for keys that are not there yet."""

    def set(self, key: str, value: str, /) -> None: ...

    def multi_get(self, keys: list[str], /) -> list[bytes]: ...

    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes: ...


@dataclass(frozen=True)
class Member:
    """A rank, as its message names it."""

    rank: int
    host: str
    process: Process

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, pid {self.process.pid})"


@dataclass(frozen=True)
class Beat:
    """One sign of life.

    Attributes:
        count: grows with every beat.
        phase, step: what the rank's main thread does; no step outside the loop.
        left: the rank is done; its silence is no death.
    """

    count: int = 0
    phase: str = "start"
    step: int | None = None
    left: bool = False

    @property
    def where(self) -> str:
        return f"in phase {self.phase}" + ("" if self.step is None else f" of step {self.step}")


@dataclass(frozen=True)
class Verdict:
    """The rank that ended first, and how."""

    rank: int
    text: str


def introduce(store: Store, me: Member, world_size: int) -> list[Member]:
    """Tell the others who this rank is; all members, once every rank has done so."""
    if me.rank == 0:
        store.set(VERDICT, "")
    store.set(f"beat-{me.rank}", json.dumps(asdict(Beat())))
    store.set(f"member-{me.rank}", json.dumps(asdict(me)))
    told = [json.loads(text) for text in store.multi_get([f"member-{rank}" for rank in range(world_size)])]
    return [Member(member["rank"], member["host"], Process(**member["process"])) for member in told]


class Liveness:
    """What one rank knows of the others.

    Args:
        timeout: seconds without a beat after which a rank counts as dead.
        clock: seconds of this rank's own.
        running: whether a process of this machine runs.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        members: Sequence[Member],
        timeout: float,
        clock: Callable[[], float] = time.monotonic,
        running: Callable[[Process], bool] = is_running,
    ):
        self._store, self._rank, self._members, self._timeout = store, rank, members, timeout
        self._clock, self._running = clock, running
        self._watched = [member.rank for member in members if member.rank != rank] if rank == 0 else [0]
        machine = members[rank].process.machine
        self._neighbours = [
            member.rank for member in members if machine and member.process.machine == machine and member.rank != rank
        ]
        self._last = {member.rank: Beat() for member in members}
        self._changed = dict.fromkeys(self._watched, clock())

    def tell(self, beat: Beat) -> None:
        self._store.set(f"beat-{self._rank}", json.dumps(asdict(beat)))

    def judge(self) -> Verdict | None:
        """The rank that ended first, if one has; the same answer on all ranks while the store stands.

        Raises:
            DistError: the store does not answer; then `without_store` is the verdict.
        """
        return self._dead_neighbour() or self._told() or self._silent()

    def without_store(self, what: str = "died or cannot be reached") -> Verdict:
        """The store lives in rank 0's process: where it is gone, each rank concludes for itself that rank 0 is."""
        return Verdict(0, f"{self._members[0]} {what}; when last heard, it was {self._last[0].where}")

    def pronounce(self, rank: int, what: str) -> Verdict:
        """Put a verdict where all ranks see it, unless there is one; the one that stands."""
        mine = json.dumps(asdict(Verdict(rank, f"{self._members[rank]} {what}")))
        return Verdict(**json.loads(self._store.compare_set(VERDICT, "", mine)))

    def remaining(self, gone: Verdict | None = None) -> list[int]:
        """The ranks watched that have not left, other than the one that the verdict is about."""
        beats = self._read(self._watched)
        return [rank for rank, beat in beats.items() if not (beat.left or (gone and gone.rank == rank))]

    def _read(self, ranks: Sequence[int]) -> dict[int, Beat]:
        texts = self._store.multi_get([f"beat-{rank}" for rank in ranks])
        return {rank: Beat(**json.loads(text)) for rank, text in zip(ranks, texts, strict=True)}

    def _dead_neighbour(self) -> Verdict | None:
        for rank in [rank for rank in self._neighbours if not self._running(self._members[rank].process)]:
            if rank == 0:  # the store went with it; asking would only bring a C++ stack trace to the screen
                return self.without_store("died")
            beat = self._read([rank])[rank]
            if not beat.left:
                return self.pronounce(rank, f"died {beat.where}")
            self._neighbours.remove(rank)
        return None

    def _told(self) -> Verdict | None:
        (text,) = self._store.multi_get([VERDICT])
        return Verdict(**json.loads(text)) if text else None

    def _silent(self) -> Verdict | None:
        now = self._clock()
        for rank, beat in self._read(self._watched).items():
            if beat.left or beat.count != self._last[rank].count:
                self._changed[rank] = now
            elif now - self._changed[rank] > self._timeout:
                silence = f"has been silent for {now - self._changed[rank]:.0f} s; it was {beat.where}"
                return self.pronounce(rank, silence)
            self._last[rank] = beat
        return None
