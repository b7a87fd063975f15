"""The commands that `tools.torture.kills` interrupts: their inputs, critical moments, and what they must write."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WAN = "package:bpgo_video.tiny/weights/wan"
PROMPTS = ["a red circle moving left", "a blue square moving up", "a green triangle moving right", "a red object"]
RECIPE = """base: tiny_wan_bpgo
run: {dir: run, num_steps: 4, save_every: 1, save_minutes: 0, resume: auto}
data: {shards: shards}
sampler: {num_steps: 4}
rollout: {prompts_per_step: 2, group_size: 4, micro_batch_size: 4}
optim: {updates_per_rollout: 1}
prior: {samples: 4}
evaluation: {every: 0, rewards: {}}
ema: {decay: 0.9}
"""
ANY_TIME = ""
VARYING = ("seconds", "checkpoint", "environment")  # keys of records and summaries that differ between equal runs
BUILD = ("prompts", "build", "--input", "prompts.jsonl", "--policy", WAN, "--max-sequence-length", "16")

Facts = dict[str, Any]  # what must equal the undisturbed run's


@dataclass(frozen=True)
class Job:
    """A command that is killed and repeated, in a folder of its own.

    Attributes:
        share: of the kills.
        facts: of what it wrote.
        moments: globs of files whose appearance a kill may follow; ANY_TIME waits for none.
        given: folders that are copied into the job's before it begins.
        once: the command refuses an output that exists, which is then complete.
    """

    name: str
    share: float
    argv: tuple[str, ...]
    facts: Callable[[Path], Facts]
    moments: tuple[str, ...] = (ANY_TIME,)
    given: Mapping[str, Path] = field(default_factory=dict)
    ranks: int = 1
    once: str = ""

    def begin(self, folder: Path) -> None:
        for name, source in self.given.items():
            shutil.copytree(source, folder / name)

    def is_done(self, folder: Path) -> bool:
        return bool(self.once) and (folder / self.once).exists()


def hashes(folder: Path, pattern: str = "**/*") -> Facts:
    """Hashes of the visible files of a folder."""
    paths = [path for path in sorted(folder.glob(pattern)) if path.is_file() and not path.name.startswith(".")]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def run_facts(folder: Path) -> Facts:
    """Weights, records and summary of a run, without times and versions."""
    run = folder / "run"
    lines = [*(run / "metrics.jsonl").read_text("utf-8").splitlines(), (run / "summary.json").read_text("utf-8")]
    records = [{key: value for key, value in json.loads(line).items() if not key.startswith(VARYING)} for line in lines]
    return {"weights": hashes(run, "export*/**/*.safetensors"), "records": records, "left": leftovers(run)}


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.name.startswith(("partial-", "owner.lease")))


def jobs(base: Path) -> list[Job]:
    """The jobs; the shards and priors in `base` exist, and `base/run` is a finished run."""
    saving = ("run/checkpoints/partial-*", "run/checkpoints/partial-*/*", "run/checkpoints/step-*", "run/metrics.jsonl")
    moments = (ANY_TIME, ANY_TIME, *saving, "run/partial-export/**/*")
    train = ("train", "recipe.yaml")
    shards = {"shards": base / "shards"}
    convert = ("convert", "--checkpoint", str(base / "run"), "--output", "out", "--format", "diffusers")
    return [
        Job("convert", 0.1, convert, lambda at: hashes(at / "out"), (ANY_TIME, "partial-out/**/*"), once="out"),
        Job(
            "prompts build", 0.1, (*BUILD, "--output", "out", "--shard-size", "1"), lambda at: hashes(at / "out"),
            (ANY_TIME, "out/*.tar", "out/.*.partial-*", "out/index.json"),
        ),
        Job(
            "prompts build --overwrite", 0.1, (*BUILD, "--output", "shards", "--shard-size", "2", "--overwrite"),
            lambda at: {**hashes(at / "shards"), "beside": sorted(path.name for path in at.glob(".*-*"))},
            (ANY_TIME, ".shards.new-*/*.tar", ".shards.new-*/index.json", ".shards.old-*"), shards,
        ),
        Job(
            "priors", 0.1, ("priors", "recipe.yaml", "--prior.samples", "6"),
            lambda at: {**hashes(at / "shards" / "priors"), "left": leftovers(at / "shards")},
            (ANY_TIME, "shards/priors/unfinished.jsonl", "shards/priors/*.json"), shards,
        ),
        Job("train", 0.3, train, run_facts, moments),
        Job("train on 2 ranks", 0.3, train, run_facts, moments, ranks=2),
    ]  # fmt: skip
