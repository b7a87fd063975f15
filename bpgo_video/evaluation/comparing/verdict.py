"""Is the second model better than the first? An answer in words that claims no more than the statistics show.

The verdict is about held-out measures. Notes say what may mislead: a training reward that rose alone, videos that stand
still, samples that became alike, too few prompts. A note is a function in NOTES.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from bpgo_video.evaluation.comparing.model_scores import Measure
from bpgo_video.evaluation.comparing.paired import LEVEL, Effect, smallest_p
from bpgo_video.evaluation.comparing.witness import DIVERSITY, MOTION

TRAINING_REWARD = "training reward"  # a name that no recipe's reward can have

Outcome = Literal["better", "worse", "mixed", "no difference shown"]


@dataclass(frozen=True)
class Comparison:
    """A candidate against a reference.

    Attributes:
        effects: by measure, of one family; TRAINING_REWARD among them where several rewards were trained on.
        by_tag: tag -> measure -> effect, which are no part of the family.
        same_noise: samples of both started from the same noise.
    """

    reference: str
    candidate: str
    measures: Mapping[str, Measure]
    effects: Mapping[str, Effect]
    by_tag: Mapping[str, Mapping[str, Effect]]
    same_noise: bool

    def of_role(self, role: str) -> dict[str, Effect]:
        """The effects of the measures of a role."""
        return {name: self.effects[name] for name, measure in self.measures.items() if measure.role == role}

    @property
    def outcome(self) -> Outcome:
        shown = {effect.shown for effect in self.of_role("heldout").values()} - {0}
        if len(shown) == 2:
            return "mixed"
        if not shown:
            return "no difference shown"
        return "better" if shown == {1} else "worse"

    @property
    def training(self) -> Effect:
        """Of the training reward: the sum, or the only one that it has."""
        own = self.of_role("trained")
        return self.effects[TRAINING_REWARD] if TRAINING_REWARD in self.effects else next(iter(own.values()))


def headline(comparison: Comparison) -> str:
    """The verdict in one sentence."""
    heldout = comparison.of_role("heldout")
    up, down = (
        ", ".join(told(name, effect) for name, effect in heldout.items() if effect.shown == sign) for sign in (1, -1)
    )
    a, b = comparison.reference, comparison.candidate
    sentences: dict[Outcome, str] = {
        "better": f"{b} is better than {a}: {up}",
        "worse": f"{b} is worse than {a}: {down}",
        "mixed": f"{b} is better than {a} in some held-out measures and worse in others: {up}; {down}",
        "no difference shown": f"No difference shown between {a} and {b}: "
        + ", ".join(told(name, effect) for name, effect in heldout.items()),
    }
    return sentences[comparison.outcome]


def told(name: str, effect: Effect) -> str:
    """A held-out difference in words."""
    return f"held-out {name} {span(effect)}"


def span(effect: Effect) -> str:
    """A difference with its interval."""
    digits = effect.decimals
    if effect.low is None or effect.high is None:
        return f"{effect.difference:+.{digits}f}"
    return f"{effect.difference:+.{digits}f} [{effect.low:+.{digits}f}, {effect.high:+.{digits}f}]"


def reward_alone(comparison: Comparison) -> str | None:
    """The pattern of a reward that is exploited."""
    if comparison.training.shown != 1 or comparison.outcome in ("better", "mixed"):
        return None
    rest = "held-out scores fell" if comparison.outcome == "worse" else "no held-out score is shown to have risen"
    return (
        f"The training reward rose by {comparison.training.difference:.3f} and {rest}: what was trained on may have "
        "been exploited. Look at the biggest losses, and compare earlier checkpoints."
    )


def stands_still(comparison: Comparison) -> str | None:
    return _changed(comparison, MOTION, "Videos move less", "a policy that games its rewards often stops moving.")


def alike(comparison: Comparison) -> str | None:
    return _changed(
        comparison,
        DIVERSITY,
        "Samples of one prompt are more alike",
        "look whether one video stands for all (collapse)",
    )


def _changed(comparison: Comparison, name: str, change: str, meaning: str) -> str | None:
    effect = comparison.effects.get(name)
    if effect is None or effect.shown != -1:
        return None
    return (
        f"{change}: {name} fell by {-effect.relative:.0%}, from {effect.mean_a:.3f} to {effect.mean_b:.3f}; {meaning}"
    )


def tags_disagree(comparison: Comparison) -> str | None:
    """Intervals of two tags that do not overlap, in the first held-out measure."""
    name = next(iter(comparison.of_role("heldout")))
    known = {tag: effects[name] for tag, effects in comparison.by_tag.items() if effects[name].low is not None}
    if len(known) < 2:
        return None
    worst, best = (pick(known, key=lambda tag: known[tag].difference) for pick in (min, max))
    if (known[worst].high or 0.0) >= (known[best].low or 0.0):
        return None
    return (
        f"Prompts differ by tag: {name} changed by {span(known[best])} on {best!r} prompts and by {span(known[worst])} "
        f"on {worst!r} ones."
    )


def too_few_prompts(comparison: Comparison) -> str | None:
    count = next(iter(comparison.effects.values())).prompts
    least = smallest_p(count) * len(comparison.effects)
    if least < 1 - LEVEL:
        return None
    return (
        f"{count} prompts cannot show a difference in one of {len(comparison.effects)} measures, however large: take "
        "more prompts (evaluation.max_prompts, or a larger split)."
    )


def other_noise(comparison: Comparison) -> str | None:
    if comparison.same_noise:
        return None
    return "The models were sampled from different seeds: pairs share a prompt and no noise, which shows less."


NOTES: tuple[Callable[[Comparison], str | None], ...] = (
    reward_alone,
    stands_still,
    alike,
    tags_disagree,
    too_few_prompts,
    other_noise,
)


def notes(comparison: Comparison) -> Sequence[str]:
    """What may mislead, a sentence each."""
    return [sentence for note in NOTES if (sentence := note(comparison)) is not None]
