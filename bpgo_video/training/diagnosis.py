"""What should one know about a run before believing it? Its records in a few sentences, each with a way out.

A finding is a function in FINDINGS of the records of `metrics.jsonl` and of `summary.json`, giving a sentence or None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, median, pstdev, stdev
from typing import Any

from bpgo_video.training.metrics import Number

Records = Sequence[Mapping[str, Number]]
Summary = Mapping[str, Any]

IDLE = 0.02  # a w that never leaves 1 by more than this does nothing
UNIFORM = 0.05  # a standard deviation of w over all groups below which it tells none from another
STEP_SIZES = (0.8, 1.25)
FLAT_SHARE = 0.25
REVERSED_SHARE = 0.01
AGREEMENT = 0.5
NOTHING = "Nothing stands out in trust, step size, groups without signal and held-out scores."


def diagnose(records: Records, summary: Summary) -> list[str]:
    """Sentences on what may mislead; one that says so where there is nothing."""
    if not records:
        return []
    found = [sentence for finding in FINDINGS if (sentence := finding(records, summary)) is not None]
    return found or [NOTHING]


def idle_trust(records: Records, summary: Summary) -> str | None:
    trusting = _trusting(records)
    if not trusting:
        return None
    low, high = min(_values(trusting, "trust_min")), max(_values(trusting, "trust_max"))
    if max(1 - low, high - 1) > IDLE:
        return None
    told = f"Trust did nothing: w stayed within {low:.3f}-{high:.3f}."
    if any(key.startswith("icc/") for key in trusting[0]):
        return f"{told} Every group's two scorings agree equally well."
    spread = _values(records, "reward_std")
    scale = f" Rewards differ by {fmean(spread):.2g} within a group." if spread else ""
    return f"{told}{scale} Set bpgo.standardise: true, or raise bpgo.k."


def trust_as_learning_rate(records: Records, summary: Summary) -> str | None:
    """Of the second half: w starts near 1 and drifts as groups come to beat their anchors."""
    trusting = _trusting(records)
    late = trusting[len(trusting) // 2 :]
    if not late:
        return None
    means = _values(late, "trust_mean")
    within = fmean(value**2 for value in _values(late, "trust_std"))
    mean, spread = fmean(means), math.sqrt(within + pstdev(means) ** 2)
    if abs(mean - 1) < 2 * UNIFORM or spread > UNIFORM:
        return None
    return (
        f"Trust acted as a learning rate: w stayed near {mean:.2f} in every group. Set bpgo.ras_center: batch_mean, or "
        f"compare with GRPO at {mean:.2f} times the learning rate."
    )


def step_size(records: Records, summary: Summary) -> str | None:
    ratios = _values(records, "rms_ratio")
    if not ratios or STEP_SIZES[0] <= (ratio := median(ratios)) <= STEP_SIZES[1]:
        return None
    return (
        f"A step was {ratio:.2f} times GRPO's on the same batch: set bpgo.match_rms: true, or compare with GRPO at "
        "that learning rate, before crediting a gain to trust."
    )


def flat_groups(records: Records, summary: Summary) -> str | None:
    shares = _values(records, "zero_std_share")
    if not shares or (share := fmean(shares)) < FLAT_SHARE:
        return None
    return (
        f"Zero-std groups: {share:.0%}. All rewards of such a group are equal and teach nothing: take larger groups, "
        "more noise (sampler.eta), or a reward that tells samples apart."
    )


def reversed_ranks(records: Records, summary: Summary) -> str | None:
    shares = _values(records, "crt/rank_inversion")
    if not shares or (share := fmean(shares)) < REVERSED_SHARE:
        return None
    return (
        f"The transformation turned round {share:.0%} of the pairs within groups, so that the better sample was taught "
        "as the worse: use bpgo.form: paper with bpgo.standardise: true, or bpgo.zeta: 0."
    )


def disagreement(records: Records, summary: Summary) -> str | None:
    names = sorted({key.removeprefix("icc/") for record in records for key in record if key.startswith("icc/")})
    low = {name: icc for name in names if (icc := fmean(_values(records, f"icc/{name}"))) < AGREEMENT}
    if not low:
        return None
    listed = ", ".join(f"{name} {icc:.2f}" for name, icc in low.items())
    return f"Two scorings of the same videos hardly agree (ICC of {listed}): much of what was taught is noise."


def heldout_fell(records: Records, summary: Summary) -> str | None:
    before, after = summary.get("heldout_before"), summary.get("heldout_after")
    if summary.get("heldout_shown") != -1 or before is None or after is None or not _rose(_values(records, "reward")):
        return None
    return (
        f"Held-out scores fell from {before:.3f} to {after:.3f} while the training reward rose: the policy found what "
        "the reward overlooks. Stop earlier, lower the learning rate, or add a reward."
    )


FINDINGS: tuple[Callable[[Records, Summary], str | None], ...] = (
    heldout_fell,
    idle_trust,
    trust_as_learning_rate,
    step_size,
    flat_groups,
    reversed_ranks,
    disagreement,
)


def _trusting(records: Records) -> Records:
    """The records of steps in which groups were weighed at all."""
    keys = ("trust/hist/00", "trust_mean", "trust_min", "trust_max", "trust_std")
    return [record for record in records if all(key in record for key in keys)]


def _values(records: Records, key: str) -> list[Number]:
    return [record[key] for record in records if key in record]


def _rose(values: Sequence[Number]) -> bool:
    """Whether the last third lies above the first by two standard errors."""
    third = len(values) // 3
    if third < 2:
        return False
    first, last = values[:third], values[-third:]
    return fmean(last) - fmean(first) > 2 * math.sqrt((stdev(first) ** 2 + stdev(last) ** 2) / third)
