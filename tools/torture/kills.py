"""SIGKILL at random moments: does the same command then finish, with the result of an undisturbed run bit for bit?

    python -m tools.torture.kills --seed 0 --count 50

Kills training (one rank, or two of which one or both die), conversion, priors, and building and replacing shards: at
any time, and where files take their place. A chain of kills interrupts one run again and again; then the command runs
to its end and is compared. Processes are forks of one that has imported everything. The exit code is 0 only if every
chain held.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tools.torture.commands import ANY_TIME, BUILD, PROMPTS, RECIPE, Job, hashes, jobs

MODULES = ("commands.runs", "commands.convert", "commands.prompts", "training.rl", "training.estimation", "data.writer")
AFTER = 0.03  # seconds at most between a change to files and a kill meant to follow it
LIMIT = 60.0  # seconds for the other ranks to end
BAD = ("detected", "silent", "traceback", "slow")


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


@dataclass
class Tally:
    """What happened to a job: kills by moment and by outcome."""

    kills: int = 0
    at: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0


class Torture:
    """Kills a job in chains, and compares the end of each chain with the undisturbed run."""

    def __init__(self, job: Job, base: Path, draws: random.Random) -> None:
        self.job, self.base, self.draws, self.tally, self.chains = job, base, draws, Tally(), 0
        folder = self.new_folder()
        launch = Launch(job, folder)
        self.seconds = launch.end()
        if set(launch.codes.values()) != {0}:
            raise RuntimeError(f"{job.name} fails undisturbed:\n{(folder / 'log').read_text('utf-8')}")
        self.expected, self.folder = job.facts(folder), folder

    def new_folder(self) -> Path:
        folder = self.base / f"{self.job.name.replace(' ', '-')}-{self.chains}"
        folder.mkdir()
        (folder / "recipe.yaml").write_text(RECIPE, "utf-8")
        for name in ("shards", "prompts.jsonl"):
            if (self.base / name).exists():
                (folder / name).symlink_to(self.base / name)
        for name in self.job.given:
            (folder / name).unlink(missing_ok=True)
        self.job.begin(folder)
        self.chains += 1
        return folder

    def run(self, kills: int) -> Tally:
        while self.tally.kills < kills:
            folder, chain = self.new_folder(), self.draws.randint(1, 6)
            while chain and self.tally.kills < kills and not self.job.is_done(folder):
                if not self.kill_once(folder):
                    break
                chain -= 1
            self.compare(folder)
        return self.tally

    def kill_once(self, folder: Path) -> bool:
        """Start the command and kill it, unless it ends before."""
        moment, launch = self.draws.choice(self.job.moments), Launch(self.job, folder)
        if moment == ANY_TIME:
            at = launch.started + self.draws.uniform(0, self.seconds)
            launch.wait_until(lambda: time.monotonic() >= at)
        else:
            before = seen(folder, moment)
            launch.wait_until(lambda: bool(seen(folder, moment) - before), 10 * LIMIT)
            time.sleep(self.draws.uniform(0, AFTER))
        if not launch.is_running():
            return False
        ranks = list(launch.codes)
        victims = self.draws.choice([ranks, *([rank] for rank in ranks if self.job.ranks > 1)])
        launch.kill([rank for rank in victims if rank in launch.running])
        self.tally.kills += 1
        self.tally.at[moment or "any time"] += 1
        self.tally.slowest = max(self.tally.slowest, launch.end(LIMIT))
        if launch.is_running():
            launch.kill(launch.running)
            launch.end()
            self.tally.outcomes["slow"] += 1
        return True

    def compare(self, folder: Path) -> None:
        """Let the command finish, and judge the chain of kills before."""
        codes = {0}
        if not self.job.is_done(folder):
            launch = Launch(self.job, folder)
            launch.end()
            codes = set(launch.codes.values())
        log = (folder / "log").read_text("utf-8", "replace")
        if "Traceback" in log:
            outcome = "traceback"
        elif codes != {0}:
            outcome = "detected"
        else:
            outcome = "held" if self.job.facts(folder) == self.expected else "silent"
        self.tally.outcomes[outcome] += 1
        if outcome == "held":
            shutil.rmtree(folder)
        else:
            print(f"{outcome}: {folder}, exit codes {codes}\n{log[-3000:]}", flush=True)


def seen(folder: Path, pattern: str) -> set[tuple[str, int]]:
    """The paths that match, with the times of their last change."""
    found = set()
    for path in folder.glob(pattern):
        try:
            found.add((str(path), path.stat().st_mtime_ns))
        except FileNotFoundError:  # renamed meanwhile
            continue
    return found


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


def table(tallies: Mapping[str, Tally]) -> Table:
    shown = Table("command", "kills", "chains held", *BAD, "slowest end", "kills by moment")
    for name, tally in tallies.items():
        at = ", ".join(f"{moment} {count}" for moment, count in tally.at.most_common())
        outcomes = [str(tally.outcomes[outcome]) for outcome in ("held", *BAD)]
        shown.add_row(name, str(tally.kills), *outcomes, f"{tally.slowest:.1f} s", at)
    return shown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=50, help="kills in all (%(default)s)")
    parser.add_argument("--only", default="", help="the jobs whose names contain this")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for name in MODULES:
        import_module(f"bpgo_video.{name}")
    tallies: dict[str, Tally] = {}
    with tempfile.TemporaryDirectory(prefix="kills-") as name:
        base = Path(name)
        prepare(base)
        for job in jobs(base):
            if args.only in job.name:
                draws = random.Random(f"{args.seed} {job.name}")
                tallies[job.name] = Torture(job, base, draws).run(max(1, round(args.count * job.share)))
                print(f"{job.name}: {tallies[job.name].kills} kills, {dict(tallies[job.name].outcomes)}", flush=True)
    Console(width=160).print(table(tallies))
    return int(any(tally.outcomes[outcome] for tally in tallies.values() for outcome in BAD))


if __name__ == "__main__":
    sys.exit(main())
