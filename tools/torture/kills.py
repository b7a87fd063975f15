"""SIGKILL at random moments: does the same command then finish, with the result of an undisturbed run bit for bit?

    python -m tools.torture.kills --seed 0 --count 50

Kills training (one rank, or two of which one or both die), conversion, priors, and building and replacing shards: at
any time, and where files take their place. A chain of kills interrupts one run again and again; then the command runs
to its end and is compared. Processes are forks of one that has imported everything. The exit code is 0 only if every
chain held.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from tools.torture.commands import ANY_TIME, RECIPE, Job, jobs
from tools.torture.launching import LIMIT, Launch, import_everything, prepare
from tools.torture.tally import MISTAKES, Tallies, Tally, main_of

LAUNCHER_SECONDS = 1.0  # after which a launcher terminates the other ranks
AFTER = 0.03  # seconds at most between a change to files and a kill meant to follow it


class Torture:
    """Kills a job in chains, and compares the end of each chain with the undisturbed run."""

    def __init__(self, job: Job, base: Path, draws: random.Random) -> None:
        self.job, self.base, self.draws, self.tally, self.chains = (
            job,
            base,
            draws,
            Tally(mistakes=("detected", *MISTAKES)),
            0,
        )
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
        while self.tally.tried < kills:
            folder, chain = self.new_folder(), self.draws.randint(1, 6)
            while chain and self.tally.tried < kills and not self.job.is_done(folder):
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
        self.tally.tried += 1
        self.tally.at[moment or "any time"] += 1
        seconds = launch.end(LAUNCHER_SECONDS)
        for rank in launch.running:  # as launchers do: ranks that have not met do not watch each other yet
            os.kill(rank, signal.SIGTERM)
        self.tally.slowest = max(self.tally.slowest, seconds + launch.end(LIMIT))
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
    found, paths = set(), folder.glob(pattern)
    while True:
        try:
            path = next(paths)
            found.add((str(path), path.stat().st_mtime_ns))
        except StopIteration:
            return found
        except FileNotFoundError:  # renamed meanwhile; a folder ends the search
            continue


def run(seed: int, count: int) -> Tallies:
    """Kill every job, `count` times in all."""
    import_everything()
    tallies: dict[str, Tally] = {}
    with tempfile.TemporaryDirectory(prefix="kills-") as name:
        base = Path(name)
        prepare(base)
        for job in jobs(base):
            tally = Torture(job, base, random.Random(f"{seed} {job.name}")).run(max(1, round(count * job.share)))
            tallies[f"kill {job.name}"] = tally
            print(f"{job.name}: {tally.tried} kills, {dict(tally.outcomes)}", flush=True)
    return tallies


if __name__ == "__main__":
    sys.exit(main_of(run, __doc__, 50))
