"""Who is dead and who is slow: counters on the watcher's clock, processes of one machine, one verdict for all."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from bpgo_video.distributed.liveness import Beat, Liveness, Member, Verdict, introduce
from bpgo_video.distributed.processes import Process, is_running, this_process

TIMEOUT = 10.0


@dataclass
class SharedStore:
    """What torch.distributed.Store does for one process."""

    held: dict[str, str] = field(default_factory=dict)

    def set(self, key: str, value: str, /) -> None:
        self.held[key] = value

    def multi_get(self, keys: list[str], /) -> list[bytes]:
        return [self.held[key].encode() for key in keys]

    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes:
        if self.held.get(key, "") == expected:
            self.held[key] = desired
        return self.held[key].encode()


class World:
    """Ranks without processes: time and deaths are told to it."""

    def __init__(self, machines: list[str]):
        self.store, self.now, self.killed = SharedStore(), 0.0, set[int]()
        members = [
            Member(rank, f"host{rank}", Process(machine, 100 + rank, "")) for rank, machine in enumerate(machines)
        ]
        self.store.set("verdict", "")
        self.ranks = [
            Liveness(self.store, member.rank, members, TIMEOUT, lambda: self.now, self.runs) for member in members
        ]
        self.beats = [Beat() for _ in members]
        self.beat(*range(len(members)))

    def runs(self, process: Process) -> bool:
        return process.pid - 100 not in self.killed

    def beat(self, *ranks: int, **changes: object) -> None:
        for rank in ranks:
            self.beats[rank] = replace(self.beats[rank], count=self.beats[rank].count + 1, **changes)
            self.ranks[rank].tell(self.beats[rank])

    def judge(self) -> list[Verdict | None]:
        return [rank.judge() for rank in self.ranks]

    def later(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def world() -> Callable[..., World]:
    return lambda *machines: World(list(machines))


def test_a_rank_whose_counter_stands_still_is_dead_and_all_hear_where_it_was(world: Callable[..., World]) -> None:
    ranks = world("a", "b", "c")
    ranks.beat(2, phase="reward", step=12)
    assert ranks.judge() == [None] * 3
    for _ in range(5):
        ranks.later(2)
        ranks.beat(0, 1)
        assert ranks.judge() == [None] * 3, "silent, but not longer than the timeout"
    ranks.later(2)
    ranks.beat(0, 1)
    verdicts = ranks.judge()[:2]
    assert verdicts[0] == verdicts[1]
    assert verdicts[0] == Verdict(
        2, "rank 2 (host2, pid 102) has been silent for 12 s; it was in phase reward of step 12"
    )


def test_a_slow_phase_is_no_death_while_the_thread_beats(world: Callable[..., World]) -> None:
    ranks = world("a", "b")
    ranks.beat(1, phase="reward", step=0)
    for _ in range(100):
        ranks.later(TIMEOUT / 4)
        ranks.beat(0, 1)
        assert ranks.judge() == [None, None]


def test_the_others_conclude_that_a_silent_rank_0_is_dead(world: Callable[..., World]) -> None:
    ranks = world("a", "b", "c")
    ranks.beat(0, phase="checkpoint", step=3)
    ranks.judge()
    ranks.later(TIMEOUT + 1)
    ranks.beat(1, 2)
    first, second = ranks.ranks[1].judge(), ranks.ranks[2].judge()
    assert first is not None
    assert first == second
    assert first.rank == 0
    assert "in phase checkpoint of step 3" in first.text


def test_the_death_of_rank_0_is_told_without_its_store(world: Callable[..., World]) -> None:
    ranks = world("a", "a")
    ranks.beat(0, phase="rollout", step=1)
    ranks.judge()
    ranks.killed.add(0)
    ranks.store.held.clear()
    verdict = ranks.ranks[1].judge()
    assert verdict is not None
    assert verdict.text == "rank 0 (host0, pid 100) died; when last heard, it was in phase rollout of step 1"
    assert "or cannot be reached" in ranks.ranks[1].without_store().text


def test_a_watcher_that_was_held_up_does_not_blame_those_it_could_not_see(world: Callable[..., World]) -> None:
    ranks = world("a", "b", "c")
    ranks.judge()
    ranks.later(100)
    ranks.beat(0, 1, 2)
    assert ranks.judge() == [None] * 3


def test_a_dead_process_of_the_same_machine_is_known_at_once(world: Callable[..., World]) -> None:
    ranks = world("a", "b", "b")
    ranks.beat(2, phase="update", step=7)
    ranks.killed.add(2)
    assert ranks.ranks[0].judge() is None, "another machine cannot see it"
    verdict = ranks.ranks[1].judge()
    assert verdict == Verdict(2, "rank 2 (host2, pid 102) died in phase update of step 7")
    assert ranks.ranks[0].judge() == verdict


def test_processes_are_not_looked_at_where_the_machine_is_unknown(world: Callable[..., World]) -> None:
    ranks = world("", "", "")
    ranks.killed |= {0, 1, 2}
    assert ranks.judge() == [None] * 3


def test_a_rank_that_has_left_is_not_dead(world: Callable[..., World]) -> None:
    ranks = world("a", "a", "b")
    ranks.beat(1, 2, left=True)
    ranks.killed |= {1, 2}
    assert ranks.ranks[0].remaining() == []
    for _ in range(2):
        assert ranks.ranks[0].judge() is None
        ranks.later(TIMEOUT + 1)


def test_rank_0_waits_for_nobody_who_cannot_leave(world: Callable[..., World]) -> None:
    ranks = world("a", "b", "c")
    assert ranks.ranks[0].remaining() == [1, 2]
    assert ranks.ranks[0].remaining(Verdict(2, "")) == [1]
    ranks.beat(1, left=True)
    assert ranks.ranks[0].remaining(Verdict(2, "")) == []


def test_the_first_verdict_stands(world: Callable[..., World]) -> None:
    ranks = world("a", "b", "c")
    first = ranks.ranks[1].pronounce(1, "failed in phase reward of step 2: RuntimeError: no")
    assert ranks.ranks[2].pronounce(2, "failed, too") == first
    assert ranks.judge() == [first] * 3
    assert first.text == "rank 1 (host1, pid 101) failed in phase reward of step 2: RuntimeError: no"


def test_members_know_each_other_after_the_introduction() -> None:
    store = SharedStore()
    members = [Member(rank, "host", Process("machine", rank, "then")) for rank in (0, 1)]
    store.set("member-1", '{"rank": 1, "host": "host", "process": {"machine": "machine", "pid": 1, "started": "then"}}')
    assert introduce(store, members[0], 2) == members


@pytest.mark.skipif(not this_process().machine, reason="no /proc that tells the machine")
def test_a_process_runs_until_it_ends_even_before_its_parent_has_noticed() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    stat = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
    process = Process("", child.pid, stat[19])
    assert is_running(process)
    assert not is_running(replace(process, started="0")), "a later process with the same number"
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie from here on
    assert not is_running(process)
    child.wait()
    assert not is_running(process)
    assert is_running(this_process())
