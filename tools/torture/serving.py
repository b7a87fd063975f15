"""A reward server in a process that is killed and restarted, for `tools.torture.requests`."""

from __future__ import annotations

import os
import random
import secrets
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil

RECIPE = 'base: tiny_wan_bpgo\nrewards: {fingerprint: {model: "tools.torture.drafts:Fingerprint"}}\n'
FLAGS = ("--reward", "fingerprint", "--token-env", "TORTURE_TOKEN", "--device", "cpu", "--waiting", "4", "--kept", "64")
PORTS = range(20_000, 32_000)  # below those that outgoing connections take while the server is down
START = 60.0  # seconds that a server may take to start


class Server:
    """A reward server in a process, which can be killed and restarted on its port.

    Attributes:
        epoch: counts the kills. What begins and ends in one epoch was not disturbed.
        peak: most memory of any of the processes above that after its start, in bytes.
    """

    def __init__(self, folder: Path) -> None:
        self.token, self.port, self.epoch, self.peak = secrets.token_hex(16), free_port(), 0, 0
        self.up, self.log, self._folder, self._done = threading.Event(), folder / "log", folder, threading.Event()
        os.environ["TORTURE_TOKEN"] = self.token
        (folder / "recipe.yaml").write_text(RECIPE, "utf-8")
        self.start()
        threading.Thread(target=self._watch, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "bpgo_video", "reward-server", "--config", str(self._folder / "recipe.yaml")]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *FLAGS, "--max-megabytes", "2", "--port", str(self.port)],
                stdout=subprocess.PIPE, stderr=log, encoding="utf-8",
            )  # fmt: skip
        if self.url not in (self.process.stdout.readline() if self.process.stdout else ""):
            raise RuntimeError(f"the server does not start:\n{self.log.read_text('utf-8', 'replace')[-3000:]}")
        self.status = psutil.Process(self.process.pid)
        self.memory, self.files = self.status.memory_info().rss, self.status.num_fds()
        self.up.set()

    def restart(self, pause: float) -> None:
        self.up.clear()
        self.epoch += 1
        self.stop()
        time.sleep(pause)
        self.start()

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()

    def close(self) -> None:
        self._done.set()
        self.stop()

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            with suppress(psutil.Error):  # it was killed
                self.peak = max(self.peak, self.status.memory_info().rss - self.memory)


def free_port() -> int:
    for port in secrets.SystemRandom().sample(PORTS, 100):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise RuntimeError(f"no free port among 100 in {PORTS}")


class Kills:
    """Kills the server after random numbers of finished cases; a context manager, which waits for the last one.

    Args:
        clients: what runs the cases; it is shut down if the server does not start again.
    """

    def __init__(self, server: Server, rng: random.Random, count: int, cases: int, clients: Executor) -> None:
        moments = sorted(rng.sample(range(cases), count))
        self._waits = [after - before for before, after in zip([0, *moments], moments, strict=False)]
        self._pauses = [(rng.uniform(0, 0.2), rng.uniform(0, 0.5)) for _ in moments]
        self._server, self._finished, self._killer = server, threading.Semaphore(0), ThreadPoolExecutor(1)
        self._clients = clients

    def count(self, _: object) -> None:
        """Call this when a case has finished."""
        self._finished.release()

    def _kill(self) -> None:
        for wait, (before, down) in zip(self._waits, self._pauses, strict=True):
            for _ in range(wait):
                self._finished.acquire()
            time.sleep(before)
            try:
                self._server.restart(down)
            except RuntimeError:
                self._clients.shutdown(wait=False, cancel_futures=True)
                raise

    def __enter__(self) -> Kills:
        self._killing = self._killer.submit(self._kill)
        return self

    def __exit__(self, *_: object) -> None:
        self._killer.shutdown()
        self._killing.result()
