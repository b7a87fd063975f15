"""The verdict of a comparison in words, notes on what may mislead, and comparison.json.

The verdict is about held-out measures and claims no more than the statistics show. A note is a function in NOTES.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bpgo_video.atomic import write_json
from bpgo_video.evaluation.compare import Compared, Comparison
from bpgo_video.evaluation.compare_scores import Scored, of_role
from bpgo_video.evaluation.video_stats import DIVERSITY, MOTION
from bpgo_video.statistics import LEVEL, RESAMPLES, too_few


def headline(comparison: Comparison) -> str:
    """The verdict in one sentence."""
    sentences = {
        "better": "{b} is better than {a}: {up}",
        "worse": "{b} is worse than {a}: {down}",
        "mixed": "{b} is better than {a} in some held-out measures and worse in others: {up}; {down}",
        "no difference shown": "No difference shown between {a} and {b}: {same}",
    }
    words = {
        word: ", ".join(f"held-out {name} {one}" for name, one in comparison.heldout.items() if one.shown == sign)
        for word, sign in (("up", 1), ("down", -1), ("same", 0))
    }
    return sentences[comparison.outcome].format(a=comparison.reference, b=comparison.candidate, **words)


def notes(comparison: Comparison) -> list[str]:
    """What may mislead, a sentence each."""
    return [sentence for note in NOTES if (sentence := note(comparison)) is not None]


def reward_alone(comparison: Comparison) -> str | None:
    """The pattern of a reward that is exploited."""
    trained = of_role("trained", comparison.roles)  # the last one is the sum, if there is one
    training = comparison.effects[trained[-1]] if trained else None
    if training is None or training.shown != 1 or comparison.outcome in ("better", "mixed"):
        return None
    rest = "held-out scores fell" if comparison.outcome == "worse" else "no held-out score is shown to have risen"
    return (
        f"The training reward rose by {training.difference:.3f} and {rest}: what was trained on may have "
        "been exploited. Look at the biggest losses, and compare earlier checkpoints."
    )


def less_motion(comparison: Comparison) -> str | None:
    return fell(comparison, MOTION, "Videos move less", "a policy that games its rewards often stops moving.")


def less_diversity(comparison: Comparison) -> str | None:
    meaning = "check whether all samples are the same video (collapse)."
    return fell(comparison, DIVERSITY, "Samples of one prompt are more alike", meaning)


def fell(comparison: Comparison, name: str, change: str, meaning: str) -> str | None:
    effect = comparison.effects.get(name)
    if effect is None or effect.shown != -1:
        return None
    share = f"{-effect.difference / abs(effect.mean_a):.0%}"  # not 0: a mean of distances that fell
    return f"{change}: {name} fell by {share}, from {effect.mean_a:.3f} to {effect.mean_b:.3f}; {meaning}"


def tags_disagree(comparison: Comparison) -> str | None:
    """Intervals of two tags that do not overlap, in the first held-out measure."""
    name = next(iter(comparison.heldout))
    known = {tag: effects[name] for tag, effects in comparison.by_tag.items() if effects[name].low is not None}
    if not known:
        return None
    worst, best = (pick(known, key=lambda tag: known[tag].difference) for pick in (min, max))
    if (known[worst].high or 0.0) >= (known[best].low or 0.0):
        return None
    return (
        f"Prompts differ by tag: {name} changed by {known[best]} on {best!r} prompts and by {known[worst]} on "
        f"{worst!r} ones."
    )


def too_few_prompts(comparison: Comparison) -> str | None:
    reason = too_few(next(iter(comparison.effects.values())).prompts, len(comparison.effects))
    return f"{reason}: take more prompts (evaluation.max_prompts, or a larger split)." if reason else None


def different_noise(comparison: Comparison) -> str | None:
    if comparison.same_noise:
        return None
    return "The models were sampled from different seeds: pairs share a prompt but no noise, which shows less."


NOTES: tuple[Callable[[Comparison], str | None], ...] = (
    *(reward_alone, less_motion, less_diversity),
    *(tags_disagree, too_few_prompts, different_noise),
)


def write_comparison(output: Path, compared: Compared) -> Path:
    """Writes comparison.json; per-sample scores are in each model's scores.json. Returns its path."""
    scores = compared.models[0].scores
    content = {
        "level": LEVEL,
        "resamples": RESAMPLES,
        "prompts": len(scores.prompts),
        "deployment": scores.settings["deployment"],
        "measures": {name: asdict(measure) for name, measure in scores.measures.items()},
        "models": [model_json(model) for model in compared.models],
        "comparisons": [comparison_json(one) for one in compared.comparisons],
        "matched": [asdict(one) for one in compared.matchings],
    }
    write_json(path := output / "comparison.json", content)
    return path


def model_json(model: Scored) -> dict[str, Any]:
    scores = model.scores
    return {
        **{name: getattr(scores, name) for name in ("label", "source", "run", "step")},
        **{name: scores.settings[name] for name in ("seed", "samples_per_prompt")},
        "results": str(model.folder.path),
        "means": {name: float(table.mean()) for name, table in scores.tables().items()},
    }


def comparison_json(one: Comparison) -> dict[str, Any]:
    content = {"outcome": one.outcome, "verdict": headline(one), "notes": notes(one), **asdict(one)}
    del content["roles"]  # "measures" has them
    return content
