"""The lease on a folder: one owner, refusals, takeovers on this and on other machines, and an owner that lost it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from bpgo_video.config.rules import OWNER
from bpgo_video.processes import start_time
from bpgo_video.training import lease
from bpgo_video.training.lease import INTERVAL, PATIENCE, Lease, OwnedError, owner_in, refuse_owned, this_process

ELSEWHERE = replace(this_process(), token="other", host="node-7", pid=77, machine="another boot")
KILLED = """
import os, signal, sys
from pathlib import Path
from bpgo_video.training.lease import Lease
Lease(Path(sys.argv[1])).acquire()
os.kill(os.getpid(), signal.SIGKILL)
"""


class Time:
    """A clock that only sleeping advances; what happens meanwhile is a function of the time."""

    def __init__(self, meanwhile: Callable[[float], object] = lambda now: None) -> None:
        self.now, self._meanwhile = 0.0, meanwhile

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self._meanwhile(self.now)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / OWNER


def write(path: Path, owner: lease.Owner) -> None:
    path.write_text(json.dumps(asdict(owner)))


def lease_of(path: Path, time: Time | None = None) -> Lease:
    time = time or Time()
    return Lease(path, time.clock, time.sleep)


def test_a_second_launch_is_refused_until_the_first_releases(path: Path) -> None:
    with lease_of(path) as first:
        first.acquire()
        named = rf"in use by process {os.getpid()} on .+, since \d{{4}}-.+: .* kill {os.getpid()}\), or name another"
        with pytest.raises(OwnedError, match=named):
            lease_of(path).acquire()
        with pytest.raises(OwnedError, match=named):
            refuse_owned(path)
    assert not path.exists()
    refuse_owned(path)
    with lease_of(path) as second:
        second.acquire()
    assert list(path.parent.iterdir()) == []


def test_the_lease_of_a_killed_process_is_taken_over_at_once(path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False).returncode == -9
    refuse_owned(path)
    time = Time()
    with lease_of(path, time) as second:
        second.acquire()
        assert owner_in(path.read_text()).pid == os.getpid()  # type: ignore[union-attr]
    assert time.now == lease.SETTLING
    assert "takes over " in capfd.readouterr().out


def test_a_later_process_with_the_same_pid_is_not_the_owner(path: Path) -> None:
    write(path, replace(this_process(), started=f"{start_time(os.getpid())}0"))
    with lease_of(path) as own:
        own.acquire()


def test_an_owner_on_another_machine_is_waited_for_and_refuses_when_it_renews(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(path, ELSEWHERE)
    refuse_owned(path)
    time = Time(lambda now: now >= INTERVAL and write(path, replace(ELSEWHERE, renewals=1)))
    with pytest.raises(OwnedError, match="process 77 on node-7"):
        lease_of(path, time).acquire()
    assert time.now == INTERVAL
    assert "belongs to process 77 on node-7" in capsys.readouterr().out


@pytest.mark.parametrize("content", [json.dumps(asdict(ELSEWHERE)), "", '{"token": "cut'])
def test_an_owner_on_another_machine_that_does_not_renew_loses_the_lease(path: Path, content: str) -> None:
    path.write_text(content)
    time = Time()
    with lease_of(path, time) as own:
        own.acquire()
        assert time.now >= PATIENCE
        assert own.renew() is None


def test_a_lease_that_is_released_while_another_waits_is_free(path: Path) -> None:
    write(path, ELSEWHERE)
    time = Time(lambda now: path.unlink(missing_ok=True) if now < 2 else None)
    with lease_of(path, time) as own:
        own.acquire()
    assert time.now < PATIENCE


def test_of_two_launches_that_take_over_together_the_last_to_write_has_the_lease(path: Path) -> None:
    write(path, replace(this_process(), started="gone"))
    winner = this_process()
    time = Time(lambda now: write(path, winner))
    with pytest.raises(OwnedError):
        lease_of(path, time).acquire()
    assert owner_in(path.read_text()) == winner


@pytest.mark.parametrize("taken", [True, False])
def test_an_owner_that_lost_its_lease_ends_and_leaves_it_to_the_next(path: Path, taken: bool) -> None:
    losses: list[str] = []
    with lease_of(path) as own:
        own.on_loss = lambda error: losses.append(str(error))
        own.acquire()
        own.check()
        assert own.renew() is None
        assert not losses
        path.unlink()
        if taken:
            write(path, ELSEWHERE)
        own.check()
        assert own.renew() is not None
    assert len(losses) == 1
    assert ("lost to process 77 on node-7" if taken else "was removed") in losses[0]
    assert path.exists() == taken


def test_an_owner_frozen_in_the_middle_of_a_renewal_counts_as_lost(path: Path) -> None:
    time = Time()
    with lease_of(path, time) as own:
        own.acquire()
        write_it = own._write

        def frozen() -> None:
            time.now += PATIENCE + 1
            write_it()

        own._write = frozen  # type: ignore[method-assign]
        assert "frozen" in str(own.renew())


def test_nothing_is_renewed_after_the_release(path: Path) -> None:
    with lease_of(path) as own:
        own.acquire()
    assert own.renew() is None
    assert not path.exists()
    own.check()


def test_a_renewal_changes_the_content(path: Path) -> None:
    with lease_of(path) as own:
        own.acquire()
        before = path.read_text()
        own.renew()
        assert path.read_text() != before
        assert list(path.parent.iterdir()) == [path]
