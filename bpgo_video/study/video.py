"""The video study: runs of the embedded policy on a noisy reward, each arm on the same seeds, by `bpgo-video train`.

A run is a recipe, derived from a shipped one, and a run folder of its own: a study that was cut off goes on where its
runs stopped.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from tqdm import tqdm

from bpgo_video.config.reading import read_yaml
from bpgo_video.documents import read_json, to_yaml
from bpgo_video.errors import InputError
from bpgo_video.files import atomic_file
from bpgo_video.study.preregistration import VideoArm, VideoStudy
from bpgo_video.study.results import StudyFolder

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
LAST_LINES = 12  # of a failed run's log, in the error


@dataclass(frozen=True)
class VideoRun:
    """A line of the results.

    Attributes:
        before, after: held-out score by the reward without noise that is never trained on.
        videos: that were sampled for training.
        reward_calls: scorings of a training video.
        seconds: of the whole run, on a machine that may have other load.
    """

    arm: str
    seed: int
    before: float
    after: float
    videos: int
    reward_calls: int
    seconds: float

    @property
    def gain(self) -> float:
        return self.after - self.before


def recipe_of(plan: VideoStudy, arm: VideoArm, shards: Path) -> dict[str, Any]:
    """The recipe of an arm: the shipped one on the noisy reward, without an anchor, at GRPO's step size."""
    clear, ambiguous = plan.noise
    noisy = {"model": plan.reward, **plan.options, "clear": clear, "ambiguous": ambiguous}
    reward: dict[str, Any] = {
        "model": "bpgo_video.study.noisy:NoisyReward",
        "options": {**noisy, "shared": plan.shared, "seed": 0},
        "rescorings": [{"seed": number} for number in range(1, arm.scorings)],
    }
    return {
        "base": f"{plan.recipe}.yaml",
        "run": {"num_steps": plan.steps, "save_every": plan.steps},
        "data": {"shards": str(shards.resolve())},
        "rewards": {"noisy": reward},
        "prior": {"kind": "none"},
        "bpgo": {"alpha": 0.0, "zeta": 0.0, "match_rms": True, **arm.bpgo},
        "rollout": {"prompts_per_step": arm.prompts_per_step},
        "evaluation": {"every": 0, "videos": 0, "samples_per_prompt": plan.heldout_samples},
    }


def settings_of(plan: VideoStudy) -> dict[str, Any]:
    """Everything that a run depends on."""
    compared = ("seeds", "first_seed", "equivalence")  # later calls may compare other seeds
    return {"kind": "video", **{name: value for name, value in asdict(plan).items() if name not in compared}}


def run_study(plan: VideoStudy, output: Path, shards: Path, processes: int) -> list[VideoRun]:
    """All runs of the plan, those of the folder's earlier calls included; each on one rank."""
    folder = StudyFolder(output, VideoRun, settings_of(plan))
    done = {(line.arm, line.seed) for line in folder.lines}
    jobs = [job for job in jobs_of(plan) if job not in done]
    with ThreadPoolExecutor(processes) as pool:
        started = [pool.submit(run, plan, name, seed, output, shards) for name, seed in jobs]
        try:
            for future in tqdm(started, desc="runs", disable=None):
                folder.add(future.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return folder.lines


def jobs_of(plan: VideoStudy) -> Iterator[tuple[str, int]]:
    """Arm and seed of each run: all arms of a seed before the next seed."""
    for seed in range(plan.first_seed, plan.first_seed + plan.seeds):
        for name in plan.arms:
            yield name, seed


def run(plan: VideoStudy, name: str, seed: int, output: Path, shards: Path) -> VideoRun:
    """One run, continued if it was cut off.

    Raises:
        InputError: it failed; has the end of its log.
    """
    arm, run_dir = plan.arms[name], output / "runs" / f"{name}-{seed}"
    recipe, log = run_dir.with_suffix(".yaml"), run_dir.with_suffix(".log")
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(recipe) as aside:
        aside.write_text(to_yaml(recipe_of(plan, arm, shards)), "utf-8")
    command = [sys.executable, "-m", "bpgo_video", "train", str(recipe), "--ranks", "1", "--run.resume", "auto"]
    with log.open("ab") as stream:
        code = subprocess.run(
            [*command, "--run.dir", str(run_dir), "--run.seed", str(seed)],
            env={**ENVIRONMENT, **os.environ}, stdout=stream, stderr=subprocess.STDOUT,
        ).returncode  # fmt: skip
    if code:
        last = log.read_text("utf-8", errors="replace").splitlines()[-LAST_LINES:]
        raise InputError(f"the run of {name} with seed {seed} failed with code {code}; {log} ends:\n" + "\n".join(last))
    summary = read_json(TypeAdapter(dict[str, Any]), run_dir / "summary.json", "delete the folder to repeat the run")
    videos = plan.steps * arm.prompts_per_step * read_yaml(recipe).rollout.group_size
    return VideoRun(
        name, seed, summary["heldout_before"], summary["heldout_after"], videos, videos * arm.scorings,
        summary["seconds"]["total"],
    )  # fmt: skip
