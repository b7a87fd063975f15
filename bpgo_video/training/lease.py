"""One owner per folder: a launch holds a lease on the folder that it writes to, and a second one is refused.

    RUN/owner.lease     host, process and a random token of the launch that may write to RUN; renewed by a thread

File locks do not exist on every shared storage, so the lease uses only what NFS has: a file that is created once, and
replaced as a whole. Clocks of hosts differ, so nobody compares times: a lease has expired if its content stays the same
while the observer's own clock advances by PATIENCE. On the owner's machine its process is looked up instead. An owner
that was frozen, and finds another token when it continues, ends before it writes anything else.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from bpgo_video.cli import print_error
from bpgo_video.config.bpgo import ConfigError
from bpgo_video.processes import call_before_end, end_process, machine, start_time

INTERVAL = 30.0  # seconds between renewals
PATIENCE = 3 * INTERVAL  # without a change; longer than an NFS client caches what a name stands for (60 s)
SETTLING = 1.0  # for a launch that takes over at the same moment; the last one to write has the lease
POLL = 1.0


class OwnedError(ConfigError):
    """Another launch owns the folder."""


@dataclass(frozen=True)
class Owner:
    """The process that holds a lease.

    Attributes:
        machine, started: identify the process among all with its pid, see `processes.py`.
        since: when it took the lease, on its own clock; for messages only.
        renewals: changes the content.
    """

    token: str
    host: str
    pid: int
    machine: str
    started: str | None
    since: str
    renewals: int = 0

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    @property
    def is_here(self) -> bool:
        return self.machine != "" and self.machine == machine()

    @property
    def is_running(self) -> bool:
        """Of an owner that is here."""
        return self.started is not None and start_time(self.pid) == self.started


OWNERS = TypeAdapter(Owner)


def this_process() -> Owner:
    pid, since = os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S %Z")
    return Owner(secrets.token_hex(8), socket.gethostname(), pid, machine(), start_time(pid), since)


def content_of(path: Path) -> str | None:
    """The content of a lease; None if there is none."""
    try:
        return path.read_text("utf-8", "replace")
    except FileNotFoundError:
        return None


def owner_in(content: str) -> Owner | None:
    """The owner that a lease names; None if its writing was interrupted."""
    try:
        return OWNERS.validate_json(content)
    except ValidationError:
        return None


def refuse_owned(path: Path) -> None:
    """Raise OwnedError if a running process of this machine holds the lease. Writes nothing and never waits."""
    owner = owner_in(content_of(path) or "")
    if owner is not None and owner.is_here and owner.is_running:
        raise OwnedError(refusal(path, owner))


def refusal(path: Path, owner: Owner | None) -> str:
    who = f"{owner}, since {owner.since}" if owner else "another launch"
    end = f"end that process (on {owner.host}: kill {owner.pid})" if owner else "end that launch"
    return (
        f"{str(path.parent)!r} is in use by {who}; two launches would overwrite each other's files: wait until it has "
        f"finished, {end}, or name another folder"
    )


class Lease:
    """A lease that this process acquires, renews and releases; released at the end of its `with` block.

    Args:
        path: of the file.
        clock: seconds that never go back.
        sleep: waits for seconds.

    Attributes:
        on_loss: ends this launch when another one has taken over; by default this process alone.
    """

    def __init__(
        self,
        path: Path,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self.path, self._clock, self._sleep = path, clock, sleep
        self.on_loss: Callable[[OwnedError], object] = _end
        self._me = this_process()
        self._aside = path.with_name(f".{path.name}.{self._me.token}")
        self._held, self._released, self._writing = False, threading.Event(), threading.Lock()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def acquire(self) -> None:
        """Take the lease, and renew it from now on.

        Raises:
            OwnedError: its owner runs; names it and the way out.
        """
        while not (self._create() or self._take_over()):
            pass
        self._held = True
        call_before_end(self.release)
        threading.Thread(target=self._keep, name="lease", daemon=True).start()

    def check(self) -> None:
        """Before anything is written to the folder: end this launch if another one has taken over."""
        if self._held and (loss := self._loss()):
            self.on_loss(OwnedError(loss))

    def renew(self) -> str | None:
        """Change the lease's content; how it was lost, if it was."""
        with self._writing:
            if not self._held:
                return None
            started, loss = self._clock(), self._loss()
            if loss is None:
                self._me = replace(self._me, renewals=self._me.renewals + 1)
                self._write()
                if self._clock() - started > PATIENCE:
                    return f"{self._lost} while this process was frozen, or its storage"
            return loss

    def release(self) -> None:
        """Remove the lease, if this process has it."""
        with self._writing:
            if self._held and not self._loss():
                self.path.unlink()
            self._held = False
            self._released.set()

    @property
    def _lost(self) -> str:
        return f"this launch ({self._me}) may no longer write to {str(self.path.parent)!r}: the lease was lost"

    def _loss(self) -> str | None:
        content = content_of(self.path)
        owner = owner_in(content or "")
        if owner is not None and owner.token == self._me.token:
            return None
        return f"{self._lost} to {owner}, since {owner.since}" if owner else f"{self._lost}, {self.path} was removed"

    def _create(self) -> bool:
        """Create the file if there is none."""
        try:
            with self.path.open("x", encoding="utf-8") as file:
                file.write(json.dumps(asdict(self._me)))
        except FileExistsError:
            return False
        return True

    def _take_over(self) -> bool:
        """Take the lease of an owner that has ended; whether this process has it now."""
        content = content_of(self.path)
        if content is None:
            return False  # it was just released
        owner = owner_in(content)
        if owner is not None and owner.is_here:
            if owner.is_running:
                raise OwnedError(refusal(self.path, owner))
            how = "has ended without releasing it"
        else:
            how = f"has not renewed it for {PATIENCE:.0f} s"
            if self._changes(content, owner):
                return False
        who = owner or "a launch"
        if content_of(self.path) != content:
            return False
        self._write()
        self._sleep(SETTLING)
        if self._loss():
            return False
        if owner is not None:
            self.path.with_name(f".{self.path.name}.{owner.token}").unlink(missing_ok=True)
        print(f"takes over {str(self.path.parent)!r} from {who}, which {how}", flush=True)
        return True

    def _changes(self, content: str, owner: Owner | None) -> bool:
        """Whether a lease is released within PATIENCE. Raises OwnedError if it is renewed."""
        who = f"{owner} (since {owner.since})" if owner else "a launch"
        where = str(self.path.parent)
        print(f"{where!r} belongs to {who}; waiting up to {PATIENCE:.0f} s to see whether it still runs", flush=True)
        started = self._clock()
        while self._clock() - started < PATIENCE:
            self._sleep(POLL)
            with suppress(FileNotFoundError):
                os.listdir(self.path.parent)  # makes a network file system refresh its cache
            now = content_of(self.path)
            if now is None:
                return True
            if now != content:
                raise OwnedError(refusal(self.path, owner_in(now)))
        return False

    def _write(self) -> None:
        """Replace the file by one that names this process."""
        self._aside.write_text(json.dumps(asdict(self._me)), "utf-8")
        self._aside.replace(self.path)

    def _keep(self) -> None:
        while not self._released.wait(INTERVAL):
            with suppress(OSError):  # storage that does not answer: another try follows
                if loss := self.renew():
                    self.on_loss(OwnedError(loss))


def _end(error: OwnedError) -> None:
    end_process(print_error(error))
