"""Commands as forks of a process that has imported everything, each rank in a process group of its own."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path

from tools.torture.commands import BUILD, PROMPTS, RECIPE, Job, hashes

MODULES = ("commands.runs", "commands.convert", "commands.prompts", "training.rl", "training.estimation", "data.writer")
LIMIT = 60.0  # seconds for the other ranks to end


def import_everything() -> None:
    for name in MODULES:
        import_module(f"bpgo_video.{name}")


class Launch:
    """The ranks of one launch, each a fork that leads a process group of its own."""

    def __init__(self, job: Job, folder: Path) -> None:
        from bpgo_video.cli import free_port

        world = {"WORLD_SIZE": str(job.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        places = [{}] if job.ranks == 1 else [{**world, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(job.ranks)]
        self.started = time.monotonic()
        self.codes: dict[int, int | None] = {fork(job, folder, place): None for place in places}

    def is_running(self) -> bool:
        for child in self.running:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                self.codes[child] = os.waitstatus_to_exitcode(status)
        return bool(self.running)

    @property
    def running(self) -> list[int]:
        return [child for child, code in self.codes.items() if code is None]

    def wait_until(self, met: Callable[[], bool], limit: float = LIMIT) -> None:
        """Wait until all ranks have ended or a condition is met."""
        deadline = time.monotonic() + limit
        while self.is_running() and not met() and time.monotonic() < deadline:
            time.sleep(0.001)

    def end(self, limit: float = 10 * LIMIT) -> float:
        """Wait for the ranks; the seconds that it took."""
        began = time.monotonic()
        self.wait_until(lambda: False, limit)
        return time.monotonic() - began

    def kill(self, victims: Sequence[int]) -> None:
        for child in victims:
            try:
                os.killpg(child, signal.SIGKILL)
            except ProcessLookupError:
                os.kill(child, signal.SIGKILL)  # before it had a group


def fork(job: Job, folder: Path, place: Mapping[str, str]) -> int:
    """Run the job's command in a fork, with its output in folder/log; the child's id."""
    if child := os.fork():
        return child
    code = 1
    try:
        os.setsid()
        os.chdir(folder)
        log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for descriptor in (1, 2):
            os.dup2(log, descriptor)
        os.environ.update(place)
        sys.argv = ["bpgo-video", *job.argv]
        code = import_module("bpgo_video.__main__").main(list(job.argv))
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # what the interpreter would print
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def prepare(base: Path) -> None:
    """Prompts, shards with priors, and a finished run."""
    (base / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS), "utf-8")
    (base / "recipe.yaml").write_text(RECIPE, "utf-8")
    for argv in (
        (*BUILD, "--output", "shards", "--holdout", "0"),
        ("priors", "recipe.yaml"),
        ("train", "recipe.yaml"),
    ):
        launch = Launch(Job(argv[0], 0, argv, hashes), base)
        launch.end()
        if set(launch.codes.values()) != {0}:
            raise RuntimeError((base / "log").read_text("utf-8"))
