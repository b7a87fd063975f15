"""The watchdog: dead and slow ranks, one verdict for all ranks, and the classification of exceptions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from bpgo_video.distributed import heartbeat
from bpgo_video.distributed.heartbeat import Beat, Heartbeat, Liveness, Member, Verdict, is_consequence
from bpgo_video.distributed.mesh import Mesh, OtherRankError

TIMEOUT = 10.0
GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1941"


class World:
    """Simulated ranks: the test sets the time and kills ranks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, machines: tuple[str, ...]):
        self.store, self.now, self.killed = dist.HashStore(), 0.0, set[int]()
        monkeypatch.setattr(heartbeat, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(heartbeat, "start_time", lambda pid: None if pid - 100 in self.killed else "then")
        members = [Member(rank, f"host{rank}", machine, 100 + rank, "then") for rank, machine in enumerate(machines)]
        for member in members:
            self.store.set(f"member-{member.rank}", json.dumps(asdict(member)))
            self.store.set(f"beat-{member.rank}", json.dumps(asdict(Beat())))
        self.ranks = [Liveness(self.store, member, len(members), TIMEOUT) for member in members]
        self.members = members
        self.beats = [Beat() for _ in members]
        self.beat(*range(len(members)))

    def beat(self, *ranks: int, **changes: object) -> None:
        for rank in ranks:
            self.beats[rank] = replace(self.beats[rank], count=self.beats[rank].count + 1, **changes)
            self.ranks[rank].publish(self.beats[rank])

    def check(self) -> list[Verdict | None]:
        return [rank.check() for rank in self.ranks]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Callable[..., World]:
    return lambda *machines: World(monkeypatch, machines)


def test_ranks_learn_about_each_other(world: Callable[..., World]) -> None:
    ranks = world("a", "b")
    assert all(rank.members == ranks.members for rank in ranks.ranks)


def test_a_rank_whose_counter_stops_is_dead_and_its_phase_is_reported(world: Callable[..., World]) -> None:
    ranks = world("a", "b", "c")
    ranks.beat(2, phase="reward", step=12)
    assert ranks.check() == [None] * 3
    for _ in range(5):
        ranks.now += 2
        ranks.beat(0, 1)
        assert ranks.check() == [None] * 3, "silent, but not longer than the timeout"
    ranks.now += 2
    ranks.beat(0, 1)
    expected = Verdict(2, "rank 2 (host2, pid 102) has been silent for 12 s; it was in phase reward of step 12")
    assert ranks.check()[:2] == [expected] * 2


def test_a_slow_phase_is_not_a_death_while_the_heartbeat_continues(world: Callable[..., World]) -> None:
    ranks = world("a", "b")
    ranks.beat(1, phase="reward", step=0)
    for _ in range(100):
        ranks.now += TIMEOUT / 4
        ranks.beat(0, 1)
        assert ranks.check() == [None, None]


def test_other_ranks_conclude_that_a_silent_rank_0_is_dead(world: Callable[..., World]) -> None:
    ranks = world("a", "b", "c")
    ranks.beat(0, phase="checkpoint", step=3)
    ranks.check()
    ranks.now += TIMEOUT + 1
    ranks.beat(1, 2)
    first, second = ranks.ranks[1].check(), ranks.ranks[2].check()
    assert first is not None
    assert first == second
    assert first.rank == 0
    assert "in phase checkpoint of step 3" in first.text


def test_the_death_of_rank_0_is_reported_without_its_store(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = world("a", "a")
    ranks.beat(0, phase="rollout", step=1)
    ranks.check()
    ranks.killed.add(0)
    monkeypatch.setattr(ranks.ranks[1], "_store", None)
    verdict = ranks.ranks[1].check()
    assert verdict is not None
    assert verdict.text == "rank 0 (host0, pid 100) died; when last heard, it was in phase rollout of step 1"
    assert "or cannot be reached" in ranks.ranks[1].store_lost().text


def test_a_suspended_watchdog_does_not_blame_other_ranks(world: Callable[..., World]) -> None:
    ranks = world("a", "b", "c")
    ranks.check()
    ranks.now += 100
    ranks.beat(0, 1, 2)
    assert ranks.check() == [None] * 3


def test_a_dead_process_on_the_same_machine_is_detected_at_once(world: Callable[..., World]) -> None:
    ranks = world("a", "b", "b")
    ranks.beat(2, phase="update", step=7)
    ranks.killed.add(2)
    assert ranks.ranks[0].check() is None, "processes of another machine are not visible"
    verdict = ranks.ranks[1].check()
    assert verdict == Verdict(2, "rank 2 (host2, pid 102) died in phase update of step 7")
    assert ranks.ranks[0].check() == verdict


def test_processes_are_not_checked_where_the_machine_is_unknown(world: Callable[..., World]) -> None:
    ranks = world("", "", "")
    ranks.killed |= {0, 1, 2}
    assert ranks.check() == [None] * 3


def test_a_rank_that_has_left_is_not_dead(world: Callable[..., World]) -> None:
    ranks = world("a", "a", "b")
    ranks.beat(1, 2, left=True)
    ranks.killed |= {1, 2}
    assert ranks.ranks[0].remaining() == []
    for _ in range(2):
        assert ranks.ranks[0].check() is None
        ranks.now += TIMEOUT + 1


def test_rank_0_does_not_wait_for_a_rank_that_cannot_leave(world: Callable[..., World]) -> None:
    ranks = world("a", "b", "c")
    assert ranks.ranks[0].remaining() == [1, 2]
    assert ranks.ranks[0].remaining(Verdict(2, "")) == [1]
    ranks.beat(1, left=True)
    assert ranks.ranks[0].remaining(Verdict(2, "")) == []


def test_the_first_verdict_is_final(world: Callable[..., World]) -> None:
    ranks = world("a", "b", "c")
    first = Verdict(1, "failed in phase reward of step 2: RuntimeError: no", code=2)
    assert ranks.ranks[1].report(first) == first
    assert ranks.ranks[2].report(Verdict(2, "failed, too")) == first
    assert ranks.check() == [first] * 3


@pytest.mark.skipif(not heartbeat.machine(), reason="no /proc that names the machine")
def test_a_zombie_process_counts_as_ended() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started, own = heartbeat.start_time(child.pid), heartbeat.start_time(os.getpid())
    assert started == heartbeat.start_time(child.pid)
    assert started is not None
    assert own is not None
    assert int(own) < int(started), "a later process with the same pid would have a different start time"
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie from here on
    assert heartbeat.start_time(child.pid) is None
    child.wait()
    assert heartbeat.start_time(child.pid) is None


def test_a_lost_peer_is_recognised_by_direct_and_chained_errors() -> None:
    assert is_consequence(RuntimeError(GLOO))
    assert is_consequence(torch.distributed.DistNetworkError("Broken pipe"))
    followed = AssertionError("parameter is in flight")
    followed.__context__ = RuntimeError(GLOO)
    assert is_consequence(followed)
    assert is_consequence(OtherRankError("rank 1 on a: no shards"))


def test_other_errors_belong_to_this_rank() -> None:
    assert not is_consequence(RuntimeError("the reward model ran out of patience"))
    assert not is_consequence(ConnectionResetError("Connection reset by peer")), "a connection opened by a reward"
    assert not is_consequence(RuntimeError("reward 'a' failed on prompt 'an igloo in the snow'"))
    assert not is_consequence(KeyboardInterrupt())


def test_a_single_rank_starts_no_threads() -> None:
    before = threading.active_count()
    with Heartbeat(Mesh(0, 1, torch.device("cpu")), timeout=1) as alone:
        alone.enter("reward", 0)
        assert threading.active_count() == before
