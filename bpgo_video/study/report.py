"""The surrogate study's results as tables: REPORT.md with plots, and every number in comparison.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any

import numpy as np
from jaxtyping import Float

from bpgo_video.study.comparison import Difference, corrected, difference
from bpgo_video.study.jobs import Run
from bpgo_video.study.preregistration import GRPO, Demand, Surrogate

Gains = Float[np.ndarray, "seeds"]


@dataclass(frozen=True)
class Compared:
    """The runs of the compared seeds.

    Attributes:
        regimes, arms: with runs, in the order of the settings.
        gains: of each seed, by regime and arm; where all seeds ran.
        cells: against GRPO, corrected over all of them; the arms but GRPO.
        demands: each demand with its regime and the difference that was found.
        cost: of each arm: scorings of a video, and seconds of judges and learner for a thousand groups, the median
            over runs.
        rates: GRPO's learning rate by regime.
    """

    regimes: list[str]
    arms: list[str]
    gains: Mapping[tuple[str, str], Gains]
    cells: Mapping[tuple[str, str], Difference]
    demands: Sequence[tuple[Demand, str, Difference]]
    cost: Mapping[str, tuple[float, float]]
    rates: Mapping[str, float]


def compare(plan: Surrogate, names: Mapping[str, Sequence[str]], lines: Iterable[Run]) -> Compared:
    """Compare all arms that ran on all seeds of the plan.

    Args:
        names: of the `regimes` and `arms` that the folder has.
    """
    seeds = range(plan.first_seed, plan.first_seed + plan.seeds)
    runs: dict[tuple[str, str], dict[int, Run]] = {}
    for line in lines:
        if line.seed in seeds:
            runs.setdefault((line.regime, line.arm), {})[line.seed] = line
    order = [(regime, arm) for regime in names["regimes"] for arm in names["arms"]]
    whole = {key: [runs[key][seed] for seed in seeds] for key in order if len(runs.get(key, ())) == len(seeds)}
    gains = {key: np.array([run.outcome.gain for run in of]) for key, of in whole.items()}

    def against(regime: str, arm: str, other: str) -> Difference:
        return difference(gains[regime, arm], gains[regime, other], gains[regime, GRPO], plan.equivalence)

    cells = corrected({(regime, arm): against(regime, arm, GRPO) for regime, arm in gains if arm != GRPO})
    demands = [
        (demand, regime, against(regime, demand.arm, demand.minus))
        for demand in plan.demands
        for regime in demand.regimes
        if (regime, demand.arm) in gains and (regime, demand.minus) in gains
    ]
    groups = plan.world.steps * plan.world.prompts_per_step / 1000
    of_arms = {arm: [run for (_, name), of in whole.items() if name == arm for run in of] for arm in names["arms"]}
    return Compared(
        regimes=[regime for regime in names["regimes"] if (regime, GRPO) in gains],
        arms=[arm for arm, of in of_arms.items() if of],
        gains=gains,
        cells=cells,
        demands=demands,
        cost={
            arm: (fmean(run.outcome.scorings for run in of), median(run.outcome.seconds for run in of) / groups)
            for arm, of in of_arms.items()
            if of
        },
        rates={regime: of[0].learning_rate for (regime, _), of in whole.items()},
    )


def met(demand: Demand, found: Difference) -> bool:
    """Whether a difference is as the pre-registration expects."""
    above = demand.above is None or found.mean >= demand.above
    below = demand.below is None or found.mean <= demand.below
    return above and below and (not demand.interval or found.low > 0 or found.high < 0)


def cell_text(cell: Difference | None) -> str:
    """`+3.9*`: shown to gain more; `-.5†`: less; `≈`: equivalent to GRPO."""
    if cell is None:
        return ""
    mark = {1: "*", -1: "†", 0: ""}[cell.shown]
    return f"{number(cell.mean)}{mark}{' ≈' if cell.equivalent else ''}"


def number(value: float, decimals: int = 2) -> str:
    """A signed number without a leading zero."""
    text = f"{value:+.{decimals}f}"
    return "0" if float(text) == 0 else text.replace("+0.", "+.").replace("-0.", "-.")


def as_markdown(plan: Surrogate, compared: Compared, heading: Mapping[str, str]) -> str:
    """The report: what was compared, gains, demands and costs."""
    parts = [
        "# Surrogate study of trust",
        "\n".join(f"- {name}: {text}" for name, text in heading.items()),
        f"Gain against GRPO, in % of GRPO's own gain in the regime: mean over {plan.seeds} seeds from "
        f"{plan.first_seed}. `*` shown to be above 0, `†` below 0 (signed-rank test with Holm's correction over the "
        "table, and the bootstrap interval), `≈` shown to be within "
        f"± {plan.equivalence:g} % (TOST). comparison.json has all intervals.",
        gains_table(compared),
        "![Gains](gains.svg)",
        "![Intervals](intervals.svg)",
    ]
    if compared.demands:
        parts += ["## What it was expected to show", demands_table(compared)]
    return "\n\n".join([*parts, "## Cost", cost_table(compared)]) + "\n"


def gains_table(compared: Compared) -> str:
    rows = [
        ("GRPO's gain", *(f"{compared.gains[regime, GRPO].mean():.3f}" for regime in compared.regimes)),
        ("its learning rate", *(f"{compared.rates[regime]:g}" for regime in compared.regimes)),
    ]
    rows += [
        (f"`{arm}`", *(cell_text(compared.cells.get((regime, arm))) for regime in compared.regimes))
        for arm in compared.arms
        if arm != GRPO
    ]
    return table(("arm", *(regime.replace("_", " ") for regime in compared.regimes)), rows)


def demands_table(compared: Compared) -> str:
    rows = []
    for demand, regime, found in compared.demands:
        bounds = [f">= {number(demand.above)}"] if demand.above is not None else []
        bounds += [f"<= {number(demand.below)}"] if demand.below is not None else []
        bounds += ["interval excludes 0"] if demand.interval else []
        interval = f"{number(found.mean)} [{number(found.low)}, {number(found.high)}]"
        name = f"`{demand.arm}` minus `{demand.minus}`"
        rows.append(
            (name, regime.replace("_", " "), ", ".join(bounds), interval, "yes" if met(demand, found) else "NO")
        )
    return table(("difference", "regime", "expected", "found", "as expected"), rows)


def cost_table(compared: Compared) -> str:
    _, grpo = compared.cost[GRPO]
    rows = [
        (f"`{arm}`", f"{calls:.2f}", f"{seconds:.2f}", f"{seconds / grpo:.2f}")
        for arm, (calls, seconds) in compared.cost.items()
    ]
    head = ("arm", "scorings of a video", "seconds of judges and learner, a thousand groups", "relative to GRPO")
    return table(head, rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def as_json(compared: Compared) -> dict[str, Any]:
    """Everything, for further analysis."""
    return {
        "gains": [
            {"regime": regime, "arm": arm, "gains": gains.tolist()} for (regime, arm), gains in compared.gains.items()
        ],
        "against_grpo": [
            {"regime": regime, "arm": arm, **finite(asdict(cell))} for (regime, arm), cell in compared.cells.items()
        ],
        "demands": [
            {**asdict(demand), "regimes": [regime], **finite(asdict(found)), "met": met(demand, found)}
            for demand, regime, found in compared.demands
        ],
        "cost": {arm: {"scorings": calls, "seconds": seconds} for arm, (calls, seconds) in compared.cost.items()},
    }


def finite(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if np.isfinite(value) else None for name, value in values.items()}
