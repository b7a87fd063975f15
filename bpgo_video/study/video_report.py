"""The video study as a table: gains of each arm, paired by seed, and what they cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import numpy as np

from bpgo_video.study.comparison import Difference, corrected, difference
from bpgo_video.study.preregistration import GRPO, VideoStudy
from bpgo_video.study.report import Gains, cell_text, finite, number, table
from bpgo_video.study.video import VideoRun


@dataclass(frozen=True)
class ArmResult:
    """An arm on all seeds of the plan.

    Attributes:
        found: against GRPO, in % of its mean gain; None for GRPO itself.
    """

    arm: str
    runs: list[VideoRun]
    found: Difference | None

    @property
    def gains(self) -> Gains:
        return np.array([run.gain for run in self.runs])


def compare(plan: VideoStudy, lines: Iterable[VideoRun]) -> list[ArmResult]:
    """The arms that ran on all seeds of the plan, in its order."""
    runs = {(line.arm, line.seed): line for line in lines}
    seeds = range(plan.first_seed, plan.first_seed + plan.seeds)
    whole = {
        arm: [runs[arm, seed] for seed in seeds] for arm in plan.arms if all((arm, seed) in runs for seed in seeds)
    }
    gains = {arm: np.array([run.gain for run in of]) for arm, of in whole.items()}
    cells = corrected(
        {
            (plan.recipe, arm): difference(gains[arm], gains[GRPO], gains[GRPO], plan.equivalence)
            for arm in gains
            if arm != GRPO
        }
    )
    return [ArmResult(arm, of, cells.get((plan.recipe, arm))) for arm, of in whole.items()]


def as_markdown(plan: VideoStudy, results: Iterable[ArmResult], heading: Mapping[str, str]) -> str:
    clear, ambiguous = plan.noise
    parts = [
        "# Video study of trust",
        "\n".join(f"- {name}: {text}" for name, text in heading.items()),
        f"Recipe `{plan.recipe}`, {plan.steps} steps, on `{plan.reward}` plus errors with a standard deviation of "
        f"{clear:g} for clear prompts and {ambiguous:g} for ambiguous ones; {plan.seeds} paired seeds from "
        f"{plan.first_seed}. Gain: held-out score, after minus before, by the reward that is never trained on; mean ± "
        "standard error over seeds. Difference: from `grpo`, in % of its gain, with the 95 % interval; `*` shown to be "
        f"above 0, `†` below (signed-rank test with Holm's correction), `≈` within ± {plan.equivalence:g} % (TOST).",
        results_table(results),
    ]
    return "\n\n".join(parts) + "\n"


def results_table(results: Iterable[ArmResult]) -> str:
    rows = []
    for result in results:
        error = result.gains.std(ddof=1) / len(result.gains) ** 0.5 if len(result.gains) > 1 else float("nan")
        found, runs = result.found, result.runs
        versus = "" if found is None else f"{cell_text(found)} [{number(found.low)}, {number(found.high)}]"
        costs = (fmean(run.videos for run in runs), fmean(run.reward_calls for run in runs))
        minutes = fmean(run.seconds for run in runs) / 60
        gain = f"{number(result.gains.mean(), 3)} ± {error:.3f}".replace("± 0.", "± .")
        rows.append((f"`{result.arm}`", gain, versus, *(f"{cost:,.0f}" for cost in costs), f"{minutes:.1f}"))
    return table(("arm", "gain", "difference, %", "training videos", "scorings of them", "minutes"), rows)


def as_json(results: Iterable[ArmResult]) -> dict[str, Any]:
    return {
        "arms": [
            {
                "arm": result.arm,
                "runs": [asdict(run) for run in result.runs],
                "against_grpo": None if result.found is None else finite(asdict(result.found)),
            }
            for result in results
        ]
    }
