"""The verdict on a run, its summary table, and a diagnosis of what may mislead about it.

± is the standard error over samples for these prompts; that of the difference is paired by sample. The verdict and its
interval hold for prompts in general (`bpgo_video/statistics.py`).
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median, pstdev, stdev
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from bpgo_video.rollouts.updates import OLDER
from bpgo_video.statistics import can_show, fewest_prompts, too_few
from bpgo_video.training.metrics import SKIPPED, Number

Records = Sequence[Mapping[str, Number]]  # of metrics.jsonl
Summary = Mapping[str, Any]  # summary.json; missing and null are the same

WIDTH = 110  # characters of printed lines
IDLE = 0.02  # a trust weight that stays this close to 1 has no effect
UNIFORM = 0.05  # standard deviation of w over all groups below which w does not distinguish them
STEP_SIZES = (0.8, 1.25)
FLAT_SHARE = 0.25
REVERSED_SHARE = 0.01
REVERSED = "crt/rank_inversion/"  # key prefix, before the reward's name
LOW_ICC = 0.5  # of scorings
DRIFT = 1.0  # of how videos look, in standard deviations of the videos before training
AGREEMENT = "agreement/"  # key prefix, before the names of two rewards
VALIDITY, TRUST_VALIDITY = "validity/", "trust_validity/"  # key prefixes, before a reward and a watched one
ALIKE = 0.9  # correlation above which the mean of two rewards has 95 % of the variance of one: the second adds little
OPPOSED = -0.2  # correlation below which two rewards cancel a part of each other
NOTHING = "Trust, step size, groups without signal and held-out scores show nothing unusual."


def heldout_difference(summary: Summary) -> float | None:
    """The held-out score after training minus that before; None if one of them is missing."""
    before, after = summary.get("heldout_before"), summary.get("heldout_after")
    return None if before is None or after is None else after - before


def measure(summary: Summary) -> str:
    """The name of the run's measure: the first of `evaluation.rewards` on held-out prompts."""
    return f"held-out {summary.get('heldout_reward') or 'score'}"


def verdict(summary: Summary) -> str | None:
    """Whether training helped, by the test over prompts of `bpgo-video evaluate compare`. None without scores."""
    difference = heldout_difference(summary)
    if difference is None:
        return None
    change = f"from {summary['heldout_before']:.3f} to {summary['heldout_after']:.3f}"
    if summary.get("heldout_shown") is None:
        return f"{measure(summary).capitalize()} went {change} (no test recorded)"
    prompts, low_high = summary["heldout_prompts"], summary.get("heldout_interval") or ()
    interval = f" [{', '.join(f'{end:+.3f}' for end in low_high)}]" if low_high else ""
    numbers = f"{change}, {difference:+.3f}{interval} over {prompts:,} prompts"
    if summary["heldout_shown"]:
        effect, direction = ("helped", "rose") if difference > 0 else ("hurt", "fell")
        return f"Training {effect}: {measure(summary)} {direction} {numbers}"
    return f"No difference shown: {measure(summary)} went {numbers}"


def power(summary: Summary) -> str:
    """What the run's held-out prompts can show, in words; empty without a test."""
    if summary.get("heldout_shown") is None:
        return ""
    return can_show(summary["heldout_prompts"], summary["heldout_measures"], summary.get("heldout_detectable"))


def summary_rows(summary: Summary) -> list[tuple[str, str]]:
    """The recorded numbers as (label, text)."""
    heldout, texts = measure(summary), {"heldout_difference": heldout_difference(summary), **summary}
    table = (
        (f"{heldout} before", "heldout_before", "{:.4f}"),
        (f"{heldout} after", "heldout_after", "{:.4f}"),
        ("paired difference", "heldout_difference", "{:+.4f}"),
        ("steps", "steps", "{:,}"),
        ("videos generated", "videos_generated", "{:,}"),
        ("ratio error, first update", "max_ratio_error_first_update", "{:.3g}"),
        ("steps sampled ahead (not in the ratio error)", "steps_sampled_ahead", "{:,}"),
    )
    rows = []
    for label, key, form in table:
        if texts.get(key) is not None:
            stderr = summary.get(f"{key}_stderr")
            rows.append((label, form.format(texts[key]) + ("" if stderr is None else f" ± {stderr:.4f}")))
    seconds = summary.get("seconds") or {}
    parts = ("rollout", "reward", "update", "total")
    return rows + [(f"seconds, {part}", f"{seconds[part]:,.1f}") for part in parts if part in seconds]


def summary_table(summary: Summary, paths: Mapping[str, Path] | None = None) -> str:
    """The last output of a run: its numbers, verdict and diagnosis, and the `paths` that it wrote, by label."""
    lines = [boxed(summary_rows(summary))]
    lines += [words for words in (verdict(summary), power(summary)) if words]
    for sentence in summary.get("diagnosis") or ():
        lines += textwrap.wrap(sentence, width=WIDTH, initial_indent="- ", subsequent_indent="  ")
    return "\n".join(lines + listed(paths or {}))


def boxed(rows: Iterable[Sequence[str]], header: Sequence[str] = ("", ""), words: int = 1, title: str = "") -> str:
    """A table as text; the first `words` columns are left-aligned, the others right-aligned."""
    table, rows = Table(box=box.ROUNDED, title=title or None, show_header=any(header)), list(rows)
    for column, label in enumerate(header):
        width = max((len(row[column]) for row in rows), default=0)  # a narrow terminal wraps the header first
        table.add_column(label, justify="left" if column < words else "right", min_width=width)
    for row in rows:
        table.add_row(*row)
    text = io.StringIO()
    Console(file=text, width=WIDTH, color_system=None, markup=False).print(table)
    return text.getvalue().rstrip()


def listed(paths: Mapping[str, Path]) -> list[str]:
    """One line per label and path."""
    width = max(map(len, paths), default=0)
    return [f"  {label:<{width}}  {path}" for label, path in paths.items()]


def diagnose(records: Records, summary: Summary) -> list[str]:
    """Sentences on what may mislead about a run, each with a remedy; NOTHING if there are none.

    Args:
        records: of metrics.jsonl.
    """
    if not records:
        return []
    found = [*_heldout_findings(records, summary), *_look_findings(summary)]
    found += [*_trust_findings(records), *_signal_findings(records)]
    return [*found, *_reward_findings(records), *_age_findings(records)] or [NOTHING]


def _heldout_findings(records: Records, summary: Summary) -> Iterator[str]:
    alarms, before, after = summary.get("alarms") or {}, summary.get("heldout_before"), summary.get("heldout_after")
    if summary.get("ended"):
        yield str(summary["ended"])
    for name, step in alarms.items():
        yield (
            f"Reward hacking: after step {step} held-out {name} was lower than at its best, while the training reward "
            "had risen: the policy exploits its reward. Take an earlier checkpoint, lower the learning rate, raise "
            "loss.kl_weight, or add a reward."
        )
    looks, prompts = summary.get("alarm_comparisons"), summary.get("heldout_prompts")
    if looks and prompts and too_few(prompts, looks):
        yield (
            f"The alarm for reward hacking could not sound: {prompts} held-out prompts are too few for {looks} "
            f"comparisons of evaluations. Hold out {fewest_prompts(looks)} or more."
        )
    if summary.get("heldout_reward") in alarms:
        return
    if summary.get("heldout_shown") == -1 and None not in (before, after) and _rose(_values(records, "reward")):
        yield (
            f"Held-out scores fell from {before:.3f} to {after:.3f} while the training reward rose: the policy "
            "exploits its reward. Stop earlier, lower the learning rate, or add a reward."
        )


def _look_findings(summary: Summary) -> Iterator[str]:
    """How held-out videos look, where that drifted by more than they differed from each other before training."""
    drifted = [
        f"{name.removeprefix('look/')} {look['before']:.3f} to {look['after']:.3f} ({look['drift']:+.1f} standard "
        "deviations)"
        for name, look in (summary.get("look") or {}).items()
        if abs(look["drift"]) >= DRIFT
    ]
    if drifted:
        yield (
            f"Held-out videos look different from before training, whatever they show: {'; '.join(drifted)}. Rewards "
            "often pay for brighter, more colourful or harsher pictures: look at the videos; if that is not wanted, "
            "raise loss.kl_weight, lower the learning rate, or add a reward that does not."
        )


def _trust_findings(records: Records) -> Iterator[str]:
    keys, ratios = ("trust/hist/00", "trust_mean", "trust_min", "trust_max", "trust_std"), _values(records, "rms_ratio")
    if weighted := [record for record in records if all(key in record for key in keys)]:
        low, high = min(_values(weighted, "trust_min")), max(_values(weighted, "trust_max"))
        if max(1 - low, high - 1) <= IDLE:
            yield (
                f"Trust had no effect: w stayed within {low:.3f}-{high:.3f}. Trust frames or reliability: agreement is "
                "the same in every group. Trust in an anchor: set bpgo.standardise: true, or raise bpgo.k."
            )
        late = weighted[len(weighted) // 2 :]  # w starts near 1 and drifts while groups start to exceed their anchors
        means = _values(late, "trust_mean")
        within = fmean(value**2 for value in _values(late, "trust_std"))
        mean, spread_of_w = fmean(means), math.sqrt(within + pstdev(means) ** 2)
        matched = bool(ratios) and abs(median(ratios) - 1) <= IDLE  # bpgo.match_rms takes the factor out
        if abs(mean - 1) >= 2 * UNIFORM and spread_of_w <= UNIFORM and not matched:
            yield (
                f"Trust acted as a learning rate: w stayed near {mean:.2f} in every group. Set bpgo.ras_center: "
                f"batch_mean, or compare with GRPO at {mean:.2f} times the learning rate."
            )
    if ratios and not STEP_SIZES[0] <= (ratio := median(ratios)) <= STEP_SIZES[1]:
        yield (
            f"A step was {ratio:.2f} times GRPO's on the same batch: set bpgo.match_rms: true, or compare with GRPO at "
            "that learning rate, before you attribute a gain to trust."
        )
    for key in sorted({key for record in records for key in record if key.startswith(TRUST_VALIDITY)}):
        found, (reward, _, watched) = _values(records, key), key.removeprefix(TRUST_VALIDITY).partition("+")
        if len(found) > 2 and (mean := fmean(found)) < -2 * stdev(found) / math.sqrt(len(found)):
            yield (
                f"Trust in {reward} weighs the wrong groups: its rank correlation with the agreement of {reward} and "
                f"{watched} is {mean:.2f} on average. Choose another trust for {reward} (docs/study.md), or none."
            )
    restored = _values(records, "crt/distrusted_rms")
    if restored and (step := fmean(restored)) >= 1:
        yield (
            f"The second surrogate gives back what the trust takes: groups with w < 1 still get {step:.2f} times "
            "GRPO's step. Set bpgo.ras_on_crt: true, or bpgo.zeta: 0."
        )


def _reward_findings(records: Records) -> Iterator[str]:
    """Whether several rewards tell the same, and whether repeated scorings do."""
    pairs = sorted({key for record in records for key in record if key.startswith(AGREEMENT)})
    means = {key.removeprefix(AGREEMENT).replace("+", " and "): fmean(_values(records, key)) for key in pairs}
    if alike := [f"{pair} ({mean:.2f})" for pair, mean in means.items() if mean > ALIKE]:
        yield (
            f"Rewards that agree on nearly every sample: {', '.join(alike)}, by the mean correlation of their "
            "advantages. The second one adds cost and no information: replace it by a model of another kind."
        )
    if opposed := [f"{pair} ({mean:.2f})" for pair, mean in means.items() if mean < OPPOSED]:
        yield (
            f"Rewards that oppose each other: {', '.join(opposed)}, by the mean correlation of their advantages. Much "
            "of them cancels: decide which one counts, and lower the other's weight."
        )
    keys = sorted({key for record in records for key in record if key.startswith("icc/")})
    low = {key.removeprefix("icc/"): icc for key in keys if (icc := fmean(_values(records, key))) < LOW_ICC}
    if low:
        rewards = ", ".join(f"{name} {icc:.2f}" for name, icc in low.items())
        yield f"Scorings of the same videos hardly agree (ICC of {rewards}): much of the training signal is noise."


def _signal_findings(records: Records) -> Iterator[str]:
    if skipped := sum(_values(records, SKIPPED)):
        yield (
            f"Updates skipped: {skipped:.0f}. Their gradients were not finite: look for their steps in metrics.jsonl, "
            "and lower the learning rate if there are more."
        )
    if (share := fmean(_values(records, "zero_std_share") or [0])) >= FLAT_SHARE:
        yield (
            f"Zero-std groups: {share:.0%}. All rewards of such a group are equal, so it gives no gradient: use larger "
            "groups, more noise (sampler.eta), or a reward that distinguishes samples."
        )
    if (share := fmean(_values(records, "crt/rank_inversion") or [0])) >= REVERSED_SHARE:
        yield (
            f"The transformation reversed {share:.0%} of the pairs within groups, so that the policy was trained "
            "towards the worse sample: use bpgo.form: paper with bpgo.standardise: true, or bpgo.zeta: 0."
        )


def reversals(record: Mapping[str, Number], form: str) -> dict[str, str]:
    """A sentence for each reward of which the transformation reversed pairs in this step; none in a monotone form."""
    way_out = "set bpgo.form: paper with bpgo.standardise: true"
    if form != "released_exact":  # whose only advantage is that of the transformed rewards
        way_out += ", or bpgo.zeta: 0"
    return {
        key.removeprefix(REVERSED): (
            f"warning: the transformation of bpgo.form {form!r} reverses {share:.1%} of the pairs of reward "
            f"{key.removeprefix(REVERSED)!r} within groups, so that the worse sample is preferred; {way_out}"
        )
        for key, share in record.items()
        if key.startswith(REVERSED) and share > 0
    }


def _age_findings(records: Records) -> Iterator[str]:
    if older := [record for record in records if OLDER in record]:
        clipped = fmean(_values(older, "clip_fraction") or [0])
        yield (
            f"Sampled ahead: {len(older)} of {len(records)} rollouts, with the weights before the last step's update. "
            f"Their first ratio differed from 1 by up to {max(_values(older, OLDER)):.2g}, as it should, and "
            f"{clipped:.0%} of their ratios were outside the clip range: if that is much more than without "
            "rollout.sample_ahead, lower the learning rate."
        )


def _values(records: Records, key: str) -> list[Number]:
    return [record[key] for record in records if key in record]


def _rose(values: Sequence[Number]) -> bool:
    """Whether the mean of the last third exceeds that of the first by more than two standard errors."""
    third = len(values) // 3
    if third < 2:
        return False
    first, last = values[:third], values[-third:]
    return fmean(last) - fmean(first) > 2 * math.sqrt((stdev(first) ** 2 + stdev(last) ** 2) / third)
