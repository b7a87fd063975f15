"""How can the learner be set? Rewards, prior, advantages and BPGO, and which of their values do not go together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from bpgo_video.config.fields import STRICT, BelowOne, NonNegative, Positive, Unit


@dataclass(frozen=True, config=STRICT)
class RewardConfig:
    model: str
    """A name of `bpgo_video.rewards.building.REWARDS`, or a dotted path `my_pkg.rewards:MyReward`."""
    weight: NonNegative = 1.0
    """Share of the combined advantage."""
    aggregate: Literal["mean", "min", "soft_min", "top_share", "share_above"] = "mean"
    """How the scores of a video's frames become the video's score."""
    aggregate_at: float | None = None
    """`soft_min`: its temperature, in the score's units; `top_share`: which share of the frames, the best, is averaged;
    `share_above`: the score above which a frame counts."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the reward model's constructor."""
    second: dict[str, Any] | None = None
    """Trust `reliability`: options in place of some of `options` for a second scoring of each video, say other
    `frames`."""
    timeout: Annotated[float, Field(gt=0.0)] = 1500.0
    """Seconds that one call, the videos of one chunk, may take before the run ends with the model's name; the default
    is below the half hour after which a collective gives up without it."""
    offload: bool = False
    """Keep the model's weights on the CPU while nothing is scored: this frees their memory for the update, and moves
    them to the device and back once a step."""


@dataclass(frozen=True, config=STRICT)
class PriorConfig:
    kind: Literal["reference", "shrunk", "ema", "global", "first_frame", "first_frame_centred", "constant", "none"] = (
        "reference"
    )
    """`reference` reads what bpgo-video priors stored with the prompts, `shrunk` draws it towards the mean over
    prompts; `ema` and `global` are moving averages of the run's rewards, per prompt and over all; `first_frame` scores
    the conditioning image, `first_frame_centred` moves that to the level of the run's videos; `none` is
    allowed where nothing uses an anchor: zeta = 0, and alpha = 0 or a trust that looks at none (reliability, none)."""
    samples: Annotated[int, Field(ge=2)] = 8
    """Samples per prompt that bpgo-video priors takes of the starting policy."""
    mean: float = 0.0
    """`constant`: the anchor of every prompt, in the reward's units."""
    scale: Annotated[float, Field(gt=0.0)] | None = None
    """s_ref, the reward's spread within a group. `constant`: the number itself, None is 1. `ema`, `global` and
    both of `first_frame`: where its moving average starts, None at the first batch's spread."""
    decay: BelowOne = 0.9
    """`ema`, `global` and both of `first_frame`: share that a moving average keeps when a batch is added."""


@dataclass(frozen=True, config=STRICT)
class AdvantageConfig:
    """How rewards become advantages; the defaults are GRPO's."""

    normalise: Literal["group", "global", "max_std", "none", "win_rate"] = "group"
    """What the distance from the group's mean is divided by: the group's std, the batch's, the largest group's,
    nothing; or the group z-score of win rates within the group."""
    combine: Literal["weighted_sum", "gdpo"] = "weighted_sum"
    """How several rewards' advantages become one; `gdpo` divides the weighted sum by its std over the batch."""
    drop_zero_std: bool = False
    """Take the loss's mean over the groups whose rewards differ, not over all."""
    best_of: Positive | None = None
    """Train on the n best and the n worst samples of each group only; the others are not replayed."""


@dataclass(frozen=True, config=STRICT)
class CreditConfig:
    """Which part of a video its advantage goes to."""

    kind: Literal["video", "segment"] = "video"
    """`segment` gives each latent frame a ratio and an advantage of its own: more to those in which the sample beats
    its group, with the video's advantage as their mean. It needs a reward that scores frames."""
    gamma: NonNegative = 0.5
    """`segment`: how much of a frame's own standing counts; at 0 every latent frame has the video's advantage."""


@dataclass(frozen=True, config=STRICT)
class ReliabilityConfig:
    """Trust `reliability`: how often videos are scored a second time."""

    rescore_below: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """A prompt is scored twice while its last ICC by any reward lies below this; where it is not, its last ICC counts.
    1 scores every prompt twice."""
    rescore_every: Positive = 5
    """Each so many times that a prompt comes up it is scored twice all the same."""


@dataclass(frozen=True, config=STRICT)
class BPGOConfig:
    """The learner of arXiv 2511.18919; alpha = zeta = 0 is GRPO."""

    form: Literal["paper", "released"] = "paper"
    """`paper`: Eq 2 and Eq 4; `released`: what the authors' code computes."""
    standardise: bool = True
    """Take rewards as (R - R_prior)/s_ref; false gives the verbatim equations (`paper` form)."""
    alpha: Unit = 0.5
    """Width of the trust weight w in (1 - alpha, 1 + alpha); below 1, or 1 in the released form."""
    trust: Literal["sigmoid", "posterior", "reliability", "none"] | None = None
    """What a group's trust is: Eq 2, the probability that its mean lies above the anchor, or how well two scorings of
    it agree (`rewards.NAME.second`); None is the form's own, sigmoid or posterior."""
    ras_center: Literal["none", "batch_mean"] = "none"
    """`batch_mean` takes the step's mean off before it becomes w: trust then only redistributes between groups."""
    k: Annotated[float, Field(gt=0.0)] = 1.0
    """Steepness of the trust weight (`sigmoid`)."""
    contrast: NonNegative = 1.0
    """Lambda of the contrastive reward transformation."""
    zeta: NonNegative = 0.5
    """Weight of the second surrogate, over the transformed rewards."""
    prior_var: Annotated[float, Field(gt=0.0)] = 1.0
    """Trust `posterior`: variance of the prior."""
    ras_on_crt: bool = False
    """Scale the second surrogate by the trust weight too; the paper does not."""
    match_rms: bool = False
    """Scale the advantages of each batch so that the step is as large as GRPO's on it."""

    @property
    def trusts(self) -> bool:
        """Whether groups are weighed against each other at all."""
        return self.alpha != 0 and self.trust != "none"

    @property
    def scores_twice(self) -> bool:
        """Whether each video is scored a second time."""
        return self.trusts and self.trust == "reliability"

    @property
    def needs_prior(self) -> bool:
        return self.zeta != 0 or (self.trusts and not self.scores_twice)


def broken_rules(
    prior: PriorConfig,
    advantage: AdvantageConfig,
    credit: CreditConfig,
    bpgo: BPGOConfig,
    rewards: Mapping[str, RewardConfig],
    *,
    prompts_per_step: int,
    group_size: int,
    objective: str,
) -> Iterator[str]:
    """What does not go together, each with the values, the rule and the way out."""
    yield from trust_rules(bpgo, rewards, prompts_per_step)
    yield from prior_rules(prior, bpgo)
    yield from advantage_rules(advantage, group_size, objective)
    yield from weighing_rules(advantage, bpgo)
    if credit.kind == "segment":
        yield from segment_rules(advantage, objective)


def trust_rules(bpgo: BPGOConfig, rewards: Mapping[str, RewardConfig], prompts_per_step: int) -> Iterator[str]:
    """Trust needs a range, other groups to be centred on, and two scorings where it compares them."""
    if bpgo.alpha == 1 and not (bpgo.form == "released" and bpgo.trust in (None, "posterior")):
        yield "bpgo.alpha is 1, which only the released form takes, with its own trust; set it below 1"
    if bpgo.trusts and bpgo.ras_center == "batch_mean" and prompts_per_step == 1:
        yield (
            "bpgo.ras_center is 'batch_mean' with rollout.prompts_per_step = 1: the one group is its own mean, so that "
            "its trust is always 1; take more prompts a step, or set ras_center to 'none'"
        )
    for name, reward in rewards.items() if bpgo.scores_twice else ():
        if reward.second is None or {**reward.options, **reward.second} == reward.options:
            yield (
                f"bpgo.trust is 'reliability', which compares two scorings, but rewards.{name}.second is "
                f"{reward.second}: give it options that differ from rewards.{name}.options"
            )


def prior_rules(prior: PriorConfig, bpgo: BPGOConfig) -> Iterator[str]:
    """What is weighed against an anchor needs one."""
    if prior.kind == "none" and bpgo.needs_prior:
        yield (
            f"prior.kind is 'none' with bpgo.alpha = {bpgo.alpha}, bpgo.trust = {bpgo.trust!r} and bpgo.zeta = "
            f"{bpgo.zeta}: that needs an anchor; set prior.kind to 'reference' or 'constant', or bpgo.zeta to 0 and "
            "bpgo.alpha to 0 (plain GRPO) or bpgo.trust to 'reliability' or 'none'"
        )


def advantage_rules(advantage: AdvantageConfig, group_size: int, objective: str) -> Iterator[str]:
    """Which samples can be left out."""
    if advantage.best_of is not None and 2 * advantage.best_of > group_size:
        yield (
            f"advantage.best_of is {advantage.best_of}, but a group of rollout.group_size = {group_size} has no "
            f"{advantage.best_of} best and {advantage.best_of} worst samples; set it to {group_size // 2} at most"
        )
    for key in ("best_of", "drop_zero_std") if objective == "nft" else ():
        if getattr(advantage, key):
            yield (
                f"advantage.{key} is {getattr(advantage, key)} with loss.objective = 'nft', which takes an advantage "
                "for a certainty and not for a weight in the loss, so that samples left out would count as average; "
                f"leave {key} at its default"
            )


def weighing_rules(advantage: AdvantageConfig, bpgo: BPGOConfig) -> Iterator[str]:
    """Normalisations that would undo or repeat what BPGO does to the same advantages."""
    if advantage.normalise == "none" and bpgo.zeta != 0:
        yield (
            f"advantage.normalise is 'none' with bpgo.zeta = {bpgo.zeta}: the first advantage is then in the reward's "
            "units and the second in transformed ones, so that zeta has no meaning; set bpgo.zeta to 0, or normalise "
            "to 'group'"
        )
    if advantage.normalise == "win_rate" and bpgo.zeta != 0 and bpgo.form == "paper" and bpgo.standardise:
        yield (
            f"advantage.normalise is 'win_rate' with bpgo.zeta = {bpgo.zeta}: the transformation keeps the order, and "
            "win rates see nothing else, so that the second surrogate would repeat the first; set bpgo.zeta to 0"
        )
    if bpgo.trusts and advantage.normalise == "max_std":
        yield (
            f"advantage.normalise is 'max_std' with bpgo.alpha = {bpgo.alpha}: both weigh groups against each other, "
            "one by spread and one by trust; set bpgo.alpha to 0, or normalise to 'group'"
        )
    if bpgo.trusts and advantage.drop_zero_std:
        yield (
            f"advantage.drop_zero_std is true with bpgo.alpha = {bpgo.alpha}: leaving groups out rescales the others, "
            "a step size of each batch that cannot be told from the trust; set one of them to false or 0"
        )


def segment_rules(advantage: AdvantageConfig, objective: str) -> Iterator[str]:
    """Credit by frames needs a log-prob of frames, and advantages of a fixed size beside it."""
    if objective != "policy_gradient":
        yield (
            f"credit.kind is 'segment' with loss.objective = {objective!r}, which takes no log-prob of frames; set "
            "credit.kind to 'video', or the objective to 'policy_gradient'"
        )
    if advantage.combine == "gdpo":
        yield (
            "credit.kind is 'segment' with advantage.combine = 'gdpo', which rescales the sum over rewards by the "
            "batch, so that gamma has no fixed size beside it; set combine to 'weighted_sum', or credit.kind to 'video'"
        )


def aggregate_rules(section: str, rewards: Mapping[str, RewardConfig]) -> Iterator[str]:
    """An aggregate's number, where it has one."""
    for name, reward in rewards.items():
        where, at = f"{section}.{name}", reward.aggregate_at
        if reward.aggregate in ("mean", "min") and at is not None:
            yield f"{where}.aggregate_at is {at}, which aggregate = {reward.aggregate!r} does not use; remove it"
        if reward.aggregate not in ("mean", "min") and at is None:
            yield f"{where}.aggregate is {reward.aggregate!r}, which needs a number: set {where}.aggregate_at"
        if reward.aggregate == "soft_min" and at is not None and not at > 0:
            yield f"{where}.aggregate_at is {at}; soft_min's temperature must be above 0"
        if reward.aggregate == "top_share" and at is not None and not 0 < at <= 1:
            yield f"{where}.aggregate_at is {at}; top_share's share must be above 0 and at most 1"
