"""One changed byte in a file of a checkpoint or of prompt shards: is it found, or without any effect?

    python -m tools.torture.bytes --seed 0 --count 200

Changes a random byte of a random file, with every kind of file equally often. A checkpoint is then converted, or the
run is resumed, which falls back to the checkpoint before. Shards and priors are read as a run reads them, or a run
trains on them. What comes out must equal the undisturbed result to the bit, or be refused with a sentence.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.torture.commands import Facts, Job, hashes, run_facts
from tools.torture.launching import Launch, import_everything, prepare
from tools.torture.tally import Tallies, Tally, main_of

SLOW = 60.0  # seconds


@dataclass(frozen=True)
class Kind:
    """A command that reads the changed file.

    Attributes:
        share: of the changes.
        given: the folder of `base` that is copied and changed.
        files: globs inside it, of which each kind of file matches one.
        job: the command; None reads shards in this process, as a run does.
    """

    name: str
    share: float
    given: str
    files: tuple[str, ...]
    job: Job | None


def kinds() -> list[Kind]:
    folder = "checkpoints/step-000004/"
    written = tuple(
        folder + name for name in ("*model_states.pt", "*optim_states.pt", "ema-rank-*.safetensors", "manifest.json")
    )
    shards = ("prompts-*.tar", "index.json", "negative.safetensors", "priors/*.json")
    convert = ("convert", "--checkpoint", "run", "--output", "out", "--format", "diffusers")
    train = ("train", "recipe.yaml")
    return [
        Kind("convert a checkpoint", 0.25, "run", written, Job("", 0, convert, lambda at: hashes(at / "out"))),
        Kind("resume a run", 0.1, "run", (*written, "checkpoints/latest"), Job("", 0, train, run_facts)),
        Kind("read shards", 0.6, "shards", shards, None),
        Kind("train on shards", 0.05, "shards", shards, Job("", 0, train, run_facts)),
    ]


def run(seed: int, count: int) -> Tallies:
    """Change `count` bytes."""
    import_everything()
    tallies = {}
    with tempfile.TemporaryDirectory(prefix="bytes-") as name:
        base = Path(name)
        prepare(base)
        for kind in kinds():
            torture = Torture(kind, base, random.Random(f"{seed} {kind.name}"))
            tallies[kind.name] = torture.run(max(1, round(count * kind.share)))
            print(f"{kind.name}: {dict(torture.tally.outcomes)}", flush=True)
    return tallies


class Torture:
    """Changes bytes for one kind of command, and compares the result with the undisturbed one."""

    def __init__(self, kind: Kind, base: Path, draws: random.Random) -> None:
        self.kind, self.base, self.draws, self.tally = kind, base, draws, Tally()
        with self.folder() as folder:
            outcome, self.expected, log = self.result(folder)
        if outcome != "ended":
            raise RuntimeError(f"{kind.name} fails undisturbed:\n{log}")

    def folder(self) -> tempfile.TemporaryDirectory[str]:
        return tempfile.TemporaryDirectory(prefix="case-", dir=self.base)

    def run(self, count: int) -> Tally:
        for number in range(count):
            with self.folder() as folder:
                self.case(folder, self.kind.files[number % len(self.kind.files)])
        return self.tally

    def case(self, name: str, pattern: str) -> None:
        """Change one byte of a file, and judge what the command does."""
        change = Change.draw(pattern, self.draws)
        began = time.monotonic()
        outcome, facts, log = self.result(name, change)
        if outcome == "ended":
            outcome = "held" if facts == self.expected else "silent"
        seconds = time.monotonic() - began
        self.tally.add("slow" if seconds > SLOW else outcome, seconds, pattern.rpartition("/")[2])
        if outcome in self.tally.mistakes:
            print(f"{outcome}: {self.kind.name}, {change}\n{log[-2000:]}", flush=True)

    def result(self, name: str, change: Callable[[Path], None] = lambda _: None) -> tuple[str, Facts, str]:
        """How the command ends on a changed copy: the outcome, the facts, and its output."""
        folder = Path(name)
        shutil.copytree(self.base / self.kind.given, folder / self.kind.given)
        for other in ("recipe.yaml", "shards"):
            if not (folder / other).exists():
                (folder / other).symlink_to(self.base / other)
        change(folder / self.kind.given)
        if self.kind.job is None:
            return read_shards(folder / "shards", self.base / "shards")
        launch = Launch(self.kind.job, folder)
        launch.end()
        log, codes = (folder / "log").read_text("utf-8", "replace"), set(launch.codes.values())
        if "Traceback" in log:
            return "traceback", {}, log
        if codes == {0}:
            return "ended", self.kind.job.facts(folder), log
        return ("detected" if codes == {2} and "error: " in log else "unclear"), {}, log


@dataclass(frozen=True)
class Change:
    """One byte of a file that matches a glob, changed to another value; positions are shares of the whole."""

    pattern: str
    which: float
    where: float
    bits: int

    @classmethod
    def draw(cls, pattern: str, draws: random.Random) -> Change:
        return cls(pattern, draws.random(), draws.random(), draws.randint(1, 255))

    def __call__(self, folder: Path) -> None:
        paths = sorted(folder.glob(self.pattern))
        path = paths[int(self.which * len(paths))]
        content = bytearray(path.read_bytes())
        content[int(self.where * len(content))] ^= self.bits
        path.write_bytes(content)


def read_shards(folder: Path, whole: Path) -> tuple[str, Facts, str]:
    """All that a run reads of a folder of shards; `whole` has the names and versions of its priors."""
    from bpgo_video.data.priors import load_priors
    from bpgo_video.data.reader import PromptShards
    from bpgo_video.errors import InputError

    priors = [json.loads(path.read_text("utf-8")) for path in (whole / "priors").glob("*.json")]
    try:
        shards = PromptShards(folder)
        content = [plain(record) for record in shards.records()]
        anchors = load_priors(folder, {prior["reward"]: prior["version"] for prior in priors})
    except InputError as error:
        return "detected", {}, str(error)
    except Exception as error:  # anything else would be a traceback
        return "traceback", {}, repr(error)
    return "ended", {"records": content, "policy": shards.policy, "anchors": anchors}, ""


def plain(record: Any) -> dict[str, Any]:
    """A record with bytes in place of tensors."""
    tensors = {kind: dict(getattr(record, kind)) for kind in ("conditioning", "negative", "clip")}
    content = {kind: {name: one.numpy().tobytes() for name, one in by.items()} for kind, by in tensors.items()}
    return {**vars(record), **content}


if __name__ == "__main__":
    sys.exit(main_of(run, __doc__, 200))
