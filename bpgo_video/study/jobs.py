"""The runs of the surrogate study: which are missing in a folder, on several processes, and their settings."""

from __future__ import annotations

import multiprocessing
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from tqdm import tqdm

from bpgo_video.config.reading import PACKAGE
from bpgo_video.errors import InputError
from bpgo_video.files import fingerprint_of
from bpgo_video.study.preregistration import GRPO, Arm, Regime, Surrogate, WorldSizes
from bpgo_video.study.results import StudyFolder
from bpgo_video.study.surrogate import Outcome, run_arm

CODE = [  # what the results depend on
    *("randomness.py", "types.py", "config/learner.py", "learner/*.py"),
    *(f"study/{name}.py" for name in ("arms", "draws", "judges", "reliability", "surrogate", "world")),
]
Job = tuple[str, str, float, int]  # regime, arm, GRPO's learning rate, seed


@dataclass(frozen=True)
class Run:
    """A line of the results.

    Attributes:
        learning_rate: GRPO's; the arm may multiply it.
    """

    regime: str
    arm: str
    learning_rate: float
    seed: int
    outcome: Outcome

    @property
    def job(self) -> Job:
        return self.regime, self.arm, self.learning_rate, self.seed


def settings_of(plan: Surrogate) -> dict[str, Any]:
    """Everything that a run of the study depends on, and the seeds that are compared."""
    return {
        "kind": "surrogate",
        "seeds": plan.seeds,
        "first_seed": plan.first_seed,
        "equivalence": plan.equivalence,
        "world": asdict(plan.world),
        "tuning": asdict(plan.tuning),
        "regimes": {name: asdict(regime) for name, regime in plan.regimes.items()},
        "arms": {name: asdict(arm) for name, arm in plan.arms.items()},
        "code": fingerprint_of(PACKAGE, CODE),
    }


def check_seeds(plan: Surrogate) -> None:
    """Raise InputError if a seed that is compared was used to tune the learning rate."""
    tuned, compared = (range(part.first_seed, part.first_seed + part.seeds) for part in (plan.tuning, plan))
    if tuned.start < compared.stop and compared.start < tuned.stop:
        raise InputError(
            f"seeds {compared.start} to {compared.stop - 1} overlap with those of tuning, {tuned.start} to "
            f"{tuned.stop - 1}: GRPO's learning rate has to be tuned on other seeds; change --first-seed"
        )


def run_study(plan: Surrogate, folder: Path, processes: int) -> StudyFolder[Run]:
    """Tune GRPO's learning rate in each regime, and run every arm on every seed, but for runs that the folder has."""
    check_seeds(plan)
    results = StudyFolder(folder, Run, settings_of(plan))
    execute(tuning_jobs(plan), plan, results, processes, "tuning")
    rates = tuned_rates(plan, results.lines)
    seeds = range(plan.first_seed, plan.first_seed + plan.seeds)
    jobs = [(regime, arm, rates[regime], seed) for regime in plan.regimes for seed in seeds for arm in plan.arms]
    execute(jobs, plan, results, processes, "study")
    return results


def tuning_jobs(plan: Surrogate) -> list[Job]:
    seeds = range(plan.tuning.first_seed, plan.tuning.first_seed + plan.tuning.seeds)
    return [
        (regime, GRPO, rate, seed) for regime in plan.regimes for seed in seeds for rate in plan.tuning.learning_rates
    ]


def tuned_rates(plan: Surrogate, lines: Iterable[Run]) -> dict[str, float]:
    """The learning rate with the highest mean gain of GRPO in each regime."""
    gains: dict[tuple[str, float], list[float]] = defaultdict(list)
    wanted = set(tuning_jobs(plan))
    for line in lines:
        if line.job in wanted:
            gains[line.regime, line.learning_rate].append(line.outcome.gain)
    return {
        regime: max(plan.tuning.learning_rates, key=lambda rate: fmean(gains[regime, rate])) for regime in plan.regimes
    }


def execute(jobs: Sequence[Job], plan: Surrogate, results: StudyFolder[Run], processes: int, title: str) -> None:
    """Run the jobs that the results lack; each result is written as soon as it is there."""
    done = {line.job for line in results.lines}
    missing = [job for job in jobs if job not in done]
    work = partial(run_job, plan.world, dict(plan.regimes), dict(plan.arms))
    with tqdm(total=len(jobs), initial=len(jobs) - len(missing), desc=title, unit="run") as bar:
        for line in spread(work, missing, processes):
            results.add(line)
            bar.update()


def spread(work: Callable[[Job], Run], jobs: Sequence[Job], processes: int) -> Iterator[Run]:
    """The results of jobs in the order in which they end, each process on one core."""
    if processes == 1 or len(jobs) < 2:
        torch.set_num_threads(1)
        yield from map(work, jobs)
        return
    with multiprocessing.get_context("spawn").Pool(processes, torch.set_num_threads, (1,)) as pool:
        yield from pool.imap_unordered(work, jobs)


def run_job(sizes: WorldSizes, regimes: Mapping[str, Regime], arms: Mapping[str, Arm], job: Job) -> Run:
    regime, arm, rate, seed = job
    return Run(*job, run_arm(sizes, regimes[regime], arms[arm], rate, seed))
