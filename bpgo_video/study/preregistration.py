"""The pre-registration: what the study compares, on which seeds, by which measure, and what it is expected to show.

It is a file of the repository (`preregistration.yaml`), read strictly; another file of the same form is another study.
Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from bpgo_video.config.fields import (
    AboveZero,
    BelowOne,
    NonNegative,
    Positive,
    Real,
    Seed,
    Several,
    Share,
    Switch,
    Unit,
    explain,
    section,
)
from bpgo_video.config.learner import AdvantageConfig, BPGOConfig
from bpgo_video.documents import MalformedFile, plain_yaml, read_text
from bpgo_video.errors import unknown

PREREGISTRATION = Path(__file__).with_name("preregistration.yaml")
GRPO = "grpo"  # the arm that all others are compared with


@section
class WorldSizes:
    """The surrogate world; see `world.py`."""

    steps: Positive
    prompts_per_step: Positive
    group_size: Several
    frames: Several
    prompts: Positive
    """Prompts that a run visits again and again; regimes with `once` have as many as it visits."""
    features: Several
    latents: Positive
    sigma: AboveZero
    """Standard deviation of the policy's samples; the targets are at a distance of about 1 from its start."""
    frame_std: NonNegative
    """True differences between the frames of a video, in units of the true within-group standard deviation."""
    reference_samples: Several
    """Samples of the starting policy per prompt that measure reference priors."""


@section
class Regime:
    """How a judge errs. Standard deviations are in units of the true reward's within-group deviation at the start."""

    noise: tuple[NonNegative, NonNegative] = (0.0, 0.0)
    """Noise of a video's score: of clear prompts, and of ambiguous ones, which are half of all."""
    shared: Unit = 0.5
    """Share of the noise's variance that all frames of a video share; the rest is of single frames."""
    once: Switch = False
    """Every prompt is seen once."""
    interpretation: NonNegative = 0.0
    """Ambiguous prompts: the judge draws one of two interpretations for each video; deviation of the score by it."""
    saturation: AboveZero | None = None
    """Scores above the starting level approach this share of the gain that is possible; None: they do not saturate."""
    misleading: Real | None = None
    """Ambiguous prompts: the judge rewards another target, and adds this level; None: it does not."""
    hack: NonNegative = 0.0
    """Deviation of the score by a direction that is worth nothing."""
    bias: NonNegative = 0.0
    """Deviation between prompts of an offset that all samples share."""
    outliers: tuple[Unit, Unit] = (0.0, 0.0)
    """Share of frames, of clear and of ambiguous prompts, whose score is off by `outlier`."""
    outlier: NonNegative = 16.0


def learner_of(settings: Mapping[str, Any]) -> BPGOConfig:
    """A recipe's section `bpgo` with these settings; alpha and zeta are 0 without them."""
    return BPGOConfig(**{"alpha": 0, "zeta": 0, **settings})


@section
class Arm:
    """How one arm of the study trains; the defaults are GRPO's."""

    learning_rate: AboveZero = 1.0
    """Times the learning rate that was tuned for GRPO."""
    bpgo: dict[str, Any] = field(default_factory=dict)
    """Settings of a recipe's section `bpgo`; alpha and zeta are 0 without them."""
    advantage: dict[str, Any] = field(default_factory=dict)
    """Settings of a recipe's section `advantage`."""
    prior: Literal["none", "reference", "global"] = "none"
    judges: Positive = 1
    """Independent rewards; their advantages are summed."""
    scorings: Positive = 1
    """How often each judge scores a video."""
    trains_on: Literal["first", "mean", "pessimistic", "truth"] = "first"
    """The score that trains, of a judge's scorings; `pessimistic` is mean - pessimism * variance."""
    pessimism: NonNegative = 0.5
    rescore: Literal["all", "icc", "frames"] = "all"
    """Which prompts are scored more than once: those whose last ICC, or whose frames' agreement, is low."""
    rescore_below: Share = 0.8
    rescore_every: Positive = 5
    memory: BelowOne = 0.0
    """Share of its last ICC that a prompt keeps."""
    rho: Literal["scorings", "scorings_and_frames", "judges", "truth", "random", "spread_up", "spread_down"] | None = (
        None
    )
    """Where the reliability comes from that trust `reliability` takes; see `reliability.py`."""
    average_trust: Switch = False
    """Give all rewards the mean of their reliabilities."""
    shrunk_baseline: Switch = False
    """Subtract a group mean that is shrunk towards the mean of the step."""

    def __post_init__(self) -> None:
        bpgo, _ = self.learner
        if bpgo.uses_trust and bpgo.trust == "reliability" and self.rho is None:
            raise ValueError("an arm with bpgo.trust 'reliability' names its source: `rho`")
        if self.rho in ("scorings", "scorings_and_frames") and (self.scorings == 1 or self.rescore == "frames"):
            raise ValueError(
                f"an arm with rho {self.rho!r} needs `scorings` of 2 or more, and `rescore` 'all' or 'icc'"
            )
        if self.rho == "judges" and self.judges == 1:
            raise ValueError("an arm with rho 'judges' needs `judges` of 2 or more")
        if bpgo.needs_prior and self.prior == "none":
            raise ValueError("an arm that compares rewards with an anchor names its `prior`")

    @property
    def learner(self) -> tuple[BPGOConfig, AdvantageConfig]:
        """The sections of a recipe that the arm sets."""
        return learner_of(self.bpgo), AdvantageConfig(**self.advantage)


@section
class Tuning:
    """The search for GRPO's learning rate in each regime, on seeds of its own."""

    seeds: Positive
    first_seed: Seed
    learning_rates: list[AboveZero]


@section
class Demand:
    """A difference of two arms, in % of GRPO's gain, that the study is expected to show in each of some regimes."""

    arm: str
    regimes: list[str]
    minus: str = GRPO
    above: Real | None = None
    below: Real | None = None
    interval: Switch = False
    """The 95 % interval has to exclude 0."""


@section
class Surrogate:
    seeds: Positive
    first_seed: Seed
    equivalence: AboveZero
    """Bound of the equivalence test (TOST), in % of GRPO's gain."""
    world: WorldSizes
    tuning: Tuning
    regimes: dict[str, Regime]
    arms: dict[str, Arm]
    demands: list[Demand]

    def __post_init__(self) -> None:
        if GRPO not in self.arms:
            raise ValueError(f"surrogate.arms has no {GRPO!r}, with which all arms are compared")
        for demand in self.demands:
            for name in (demand.arm, demand.minus):
                if name not in self.arms:
                    raise ValueError(unknown("surrogate.demands: arm", name, self.arms))
            for name in demand.regimes:
                if name not in self.regimes:
                    raise ValueError(unknown("surrogate.demands: regime", name, self.regimes))


@section
class SignalDemand:
    """A value of the table of signals that the study is expected to show."""

    score: str
    trust: str
    column: Literal["cosine", "change", "spearman"]
    above: Real | None = None
    below: Real | None = None
    interval: Switch = False


@section
class Signals:
    group_size: Several
    noise: tuple[AboveZero, AboveZero]
    """Noise of a video's mean oracle score, of clear and of open prompts; independent in its frames."""
    noise_draws: Positive
    resamples: Positive
    groups: Positive
    """Groups of each prompt, where they are sampled anew."""
    seed: Seed
    demands: list[SignalDemand]


@section
class VideoArm:
    """How one arm of the video study trains; the defaults are GRPO's."""

    bpgo: dict[str, Any] = field(default_factory=dict)
    """Settings of a recipe's section `bpgo`; alpha and zeta are 0 without them."""
    scorings: Positive = 1
    """How often each video is scored, with independent errors; the mean trains."""
    prompts_per_step: Positive = 4

    def __post_init__(self) -> None:
        learner_of(self.bpgo)


@section
class VideoStudy:
    """Runs of a shipped recipe on a noisy reward."""

    seeds: Positive
    first_seed: Seed
    equivalence: AboveZero
    """Bound of the equivalence test (TOST), in % of GRPO's gain."""
    recipe: str
    steps: Positive
    reward: str
    """The reward that noise is added to."""
    options: dict[str, Any]
    noise: tuple[NonNegative, NonNegative]
    """Standard deviation of a video's error, for captions that state every attribute and for others, in the reward's
    units."""
    shared: Unit
    """Share of the error's variance that all frames of a video share."""
    heldout_samples: Positive
    """Videos of each held-out prompt."""
    arms: dict[str, VideoArm]

    def __post_init__(self) -> None:
        if GRPO not in self.arms:
            raise ValueError(f"video.arms has no {GRPO!r}, with which all arms are compared")


@section
class Preregistration:
    surrogate: Surrogate
    signals: Signals
    video: VideoStudy


def as_written(one: Regime | Arm) -> dict[str, Any]:
    """The settings that differ from their defaults."""
    default = asdict(type(one)())
    return {name: value for name, value in asdict(one).items() if value != default[name]}


def read_preregistration(path: Path = PREREGISTRATION) -> Preregistration:
    """A pre-registration from its file; sections that the file lacks are the package's.

    Raises:
        MalformedFile: names the file and each wrong value.
    """
    written = plain_yaml(read_text(path), path)
    if not isinstance(written, dict):
        raise MalformedFile(f"{path} is no mapping of the sections surrogate, signals and video")
    whole = {**plain_yaml(read_text(PREREGISTRATION), PREREGISTRATION), **written}
    try:
        found: Preregistration = TypeAdapter(Preregistration).validate_python(whole)
    except ValidationError as error:
        raise MalformedFile(explain(error, str(path), Preregistration)) from None
    return found
