"""Sections of a recipe that the learner reads: rewards, prior, advantages, credit, trust, and the loss."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, Literal

from bpgo_video.config.fields import (
    AboveZero,
    BelowOne,
    NonNegative,
    OrFunction,
    Positive,
    Real,
    Several,
    Share,
    Switch,
    Unit,
    section,
)

FORM_TRUST = {"paper": "sigmoid", "released": "posterior", "released_exact": "posterior"}  # of each form's source
AGREEMENTS = ("frames", "reliability", "uncertainty")  # trusts that follow from the reliability of scores
WITHOUT_ANCHOR = (*AGREEMENTS, "none")  # trusts that compare rewards with no prior
AGAINST_OLD = ("awm", "nft")  # objectives on final videos that compare the policy with the one that sampled
AGAINST_REFERENCE = ("dpo", "kto")  # those that compare it with a reference policy
FINAL_VIDEOS = (*AGAINST_OLD, *AGAINST_REFERENCE)
TrustName = Annotated[Literal["sigmoid", "posterior", "frames", "reliability", "uncertainty", "none"], OrFunction]


@section
class RewardConfig:
    model: str
    """A name in `bpgo_video.rewards.reward.REWARDS`, or a dotted path such as `my_pkg.rewards:MyReward`."""
    weight: NonNegative = 1.0
    """Weight of this reward in the combined advantage. 0 only watches: nothing learns from the reward, which has no
    anchor and no trust; metrics say how far the rewards that train, and their trust, agree with it."""
    aggregate: Literal["mean", "min", "soft_min", "top_share", "share_above"] = "mean"
    """How the scores of a video's frames become the video's score."""
    aggregate_at: Real | None = None
    """`soft_min`: temperature, in the score's units; `top_share`: share of the best frames that is averaged;
    `share_above`: score above which a frame counts."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the reward model's constructor."""
    trust: TrustName | None = None
    """Trust of this reward's groups, as bpgo.trust; None takes bpgo.trust. Each reward's advantages are weighted by its
    own trust before rewards are summed."""
    rescorings: tuple[dict[str, Any], ...] = ()
    """For each further scoring of a video, options that replace some of `options`, such as other `frames` or another
    `seed`. The mean of all scorings trains, and trust `reliability` compares them."""
    timeout: AboveZero = 1500.0
    """Seconds that one call, on the videos of one chunk, may take before the run ends and names the model. The default
    is below the half hour after which a collective gives up without a name."""
    offload: Switch = False
    """Keep the model's weights on the CPU between scorings. This frees device memory for the update, and copies the
    weights to the device and back once a step."""


@section
class PriorConfig:
    kind: Annotated[
        Literal["reference", "shrunk", "ema", "global", "first_frame", "first_frame_centred", "constant", "none"],
        OrFunction,
    ] = "reference"
    """`reference` reads what bpgo-video priors stored with the prompts; `shrunk` moves those towards their mean over
    prompts. `ema` and `global` are moving averages of the run's rewards, per prompt and over all prompts. `first_frame`
    scores the conditioning image; `first_frame_centred` moves that to the level of the run's videos. `constant` is one
    number. `none` needs zeta = 0, and either alpha = 0 or a trust without an anchor (frames, reliability,
    uncertainty, none)."""
    samples: Several = 8
    """Samples of the starting policy per prompt that bpgo-video priors takes; with `rollout.same_start` they are pairs
    that share a start, so an even number from 4."""
    prompts: Literal["visited", "all"] = "visited"
    """Prompts that bpgo-video priors measures: those that the run visits, or all of the split."""
    mean: Real = 0.0
    """`constant`: the anchor of every prompt, in the reward's units."""
    scale: AboveZero | None = None
    """s_ref, the reward's standard deviation within a group. `constant`: s_ref itself; None is 1. `ema`, `global`,
    `first_frame` and `first_frame_centred`: its start; None takes the first batch's."""
    decay: BelowOne = 0.9
    """`ema`, `global`, `first_frame` and `first_frame_centred`: share that a moving average keeps at each batch."""


@section
class AdvantageConfig:
    """How rewards become advantages; the defaults are GRPO's."""

    normalise: Annotated[Literal["group", "global", "max_std", "none", "win_rate"], OrFunction] = "group"
    """What divides a reward's distance from its group's mean: the group's std (`group`), the batch's (`global`), the
    largest group std (`max_std`), or nothing (`none`). `win_rate` is the group z-score of win rates."""
    combine: Annotated[Literal["weighted_sum", "gdpo"], OrFunction] = "weighted_sum"
    """How the advantages of several rewards become one; `gdpo` divides their weighted sum by its std over the batch."""
    drop_zero_std: Switch = False
    """Average the loss over the groups whose rewards differ instead of over all groups."""
    best_of: Positive | None = None
    """Train on the n best and the n worst samples of each group only; the others are not replayed."""
    depth_normalise: Switch = True
    """`rollout.branches`: the mean advantages of the nodes after each split get the spread of the samples' advantages
    (BranchGRPO); false leaves them smaller, as means are."""


@section
class CreditConfig:
    """How a video's advantage is distributed over its frames."""

    kind: Literal["video", "segment"] = "video"
    """`segment` gives each latent frame its own ratio and advantage: more where the sample beats its group, with the
    video's advantage as their mean. It needs a reward that scores frames."""
    gamma: NonNegative = 0.5
    """`segment`: weight of a frame's own z-score; at 0 every latent frame has the video's advantage."""


@section
class ReliabilityConfig:
    """How often videos are scored again, where rewards have `rescorings`, and how their agreement is averaged."""

    rescore_below: Share = 1.0
    """Score a prompt again while its last ICC by any reward is below this; otherwise its last ICC counts. 1 scores
    every prompt again."""
    rescore_every: Positive = 5
    """Score a prompt again at least every this many times that it is sampled."""
    memory: BelowOne = 0.5
    """Share of its last ICC that a prompt keeps when it is scored again; 0 takes each group's own."""


@section
class BPGOConfig:
    """BPGO (arXiv 2511.18919); alpha = zeta = 0 is GRPO."""

    form: Literal["paper", "released", "released_exact"] = "paper"
    """`paper`: Eq 2 and Eq 4; `released`: the equations of the authors' code in the paper's loss; `released_exact`: the
    authors' whole step, in which transformed rewards replace the rewards and there is no second surrogate."""
    standardise: Switch = True
    """Compute on u = (R - R_prior)/s_ref; false takes the equations verbatim, on R - R_prior. The `released`
    transformation is always verbatim: on u it would reverse the order below the anchor."""
    alpha: Unit = 0.5
    """Strength of the trust: w is in (1 - alpha, 1 + alpha). Below 1, or 1 in the released forms."""
    trust: TrustName | None = None
    """The trust w of a group: Eq 2 (`sigmoid`), the probability that its mean is above the anchor (`posterior`), the
    agreement of a video's frame scores (`frames`) or of several scorings (`reliability`, see
    `rewards.NAME.rescorings`), the error that the reward states (`uncertainty`), or 1 (`none`). None takes the form's:
    sigmoid or posterior."""
    ras_center: Literal["none", "batch_mean"] = "none"
    """`batch_mean` subtracts the batch's mean from the argument of the trust, reward by reward: a shift that all groups
    share then changes no w."""
    k: AboveZero = 1.0
    """`sigmoid`: slope of Eq 2, per u (verbatim: per unit of reward)."""
    contrast: NonNegative = 1.0
    """Lambda of the contrastive reward transformation (Eq 4); a in the released form."""
    zeta: NonNegative = 0.5
    """Weight of the second surrogate, on the transformed rewards; 0 skips the transformation."""
    prior_var: AboveZero = 1.0
    """`posterior`: variance of the prior, in u^2 (verbatim: in reward^2)."""
    ras_on_crt: Switch = False
    """Multiply the second surrogate by the trust too; the paper does not."""
    match_rms: Switch = False
    """Multiply both advantages of a batch by RMS(A)/RMS(w A + zeta A~), before the advantage clip: the step is then as
    large as GRPO's."""

    def __post_init__(self) -> None:
        if self.alpha == 1 and (self.form == "paper" or self.trust_kind != "posterior"):
            raise ValueError("bpgo.alpha is 1, which only released forms take, with their own trust; set it below 1")
        if self.form == "released_exact" and (self.zeta != 0 or self.standardise or self.trust_kind != "posterior"):
            raise ValueError(
                f"bpgo.form is 'released_exact' with zeta = {self.zeta}, standardise = {self.standardise} and trust = "
                f"{self.trust!r}: the authors' step has no second surrogate, uses raw rewards and has its own trust; "
                "set zeta to 0, standardise to false and trust to null, or form to 'released'"
            )

    @property
    def trust_kind(self) -> str:
        """The trust in effect."""
        return self.trust or FORM_TRUST[self.form]

    @property
    def uses_trust(self) -> bool:
        """Whether groups have different weights."""
        return self.alpha != 0 and self.trust != "none"

    @property
    def centres_trust(self) -> bool:
        """Whether a batch's mean is subtracted from the argument of the trust."""
        return self.ras_center == "batch_mean"

    @property
    def needs_prior(self) -> bool:
        """Whether rewards are compared with an anchor."""
        anchored = self.uses_trust and self.trust not in WITHOUT_ANCHOR
        return self.zeta != 0 or anchored or self.form == "released_exact"


@section
class LossConfig:
    objective: Annotated[Literal["policy_gradient", "awm", "nft", "dpo", "kto", "draft"], OrFunction] = (
        "policy_gradient"
    )
    """`policy_gradient` replays the rollout's own transitions. `awm` (advantage weighted matching), `nft`
    (DiffusionNFT), `dpo` (pairs of a group's samples) and `kto` (samples above and below their group's mean) sample by
    the ODE and learn from final videos, at the noise levels of the trained steps. `draft` follows the gradient of the
    rewards themselves, through the frames and the last denoising steps; every reward must be differentiable."""
    nft_beta: Share = 1.0
    """`nft`: distance of its two implicit policies from the old one; above 0."""
    nft_adaptive: Switch = False
    """`nft`: divide the squared error of each predicted clean video by its mean absolute error, as a constant."""
    nft_rescale: Switch = False
    """`nft`: multiply the loss by advantage_clip / nft_beta, so that neither changes a first update's gradient."""
    old_decay: BelowOne = 0.0
    """`awm` and `nft`: at most this share is kept by the old policy, a moving average of the weights that samples the
    rollouts and moves after each. 0: the old policy is the one before the updates of a rollout."""
    old_decay_rate: AboveZero = 1e-3
    """The share that the old policy keeps after i updates is min(old_decay_rate i, old_decay)."""
    noise_levels: Literal["schedule", "uniform", "logit_normal"] = "schedule"
    """`awm`, `nft`, `dpo` and `kto`: noise levels of final videos. `schedule` takes those of the trained steps; the
    others draw one for each video (`dpo`: pair) and trained step, uniformly over the schedule and its shift, or most in
    its middle."""
    dpo_beta: AboveZero = 100.0
    """`dpo` and `kto`: strength of the pull to the reference policy (`kl_reference`); errors are means over latent
    dimensions."""
    dpo_pairs: Positive = 1
    """`dpo`: pairs of a group: the best sample against the worst, the second best against the second worst, and so on.
    The other samples are not trained on."""
    draft_steps: Positive = 1
    """`draft`: K, the last denoising steps that are differentiated (DRaFT-K), each in a pass of its own."""
    clip_range: tuple[BelowOne, NonNegative] = (1e-3, 1e-3)
    """(low, high): the ratio is clipped to [1 - low, 1 + high]. Log-probs are means over latent dimensions, so this is
    small."""
    advantage_clip: AboveZero = 5.0
    """Advantages are clipped to this magnitude, after the trust."""
    trust_region: Annotated[Literal["clip", "divergence_mask"], OrFunction] = "clip"
    """What bounds a step: the clip of the ratio, or a limit on the divergence of the transitions (DPPO)."""
    divergence_limit: AboveZero = 1e-5
    """`divergence_mask`: a sample whose |d mean|^2 / (2 std^2) reaches this moves no further outwards."""
    ratio: Annotated[Literal["plain", "guard"], OrFunction] = "plain"
    """`guard` centres the log ratio and gives it the same scale at every noise level (GRPO-Guard)."""
    kl_weight: NonNegative = 0.0
    """Weight of the divergence from a reference policy; 0 uses no reference."""
    kl_reference: Literal["start", "ema", "previous"] = "start"
    """The reference: the starting policy (without adapters, or a frozen copy), the average of the weights
    (`ema.decay`), or the policy that sampled the rollout."""
    kl_space: Literal["velocity", "mean"] = "velocity"
    """The divergence is measured between velocities, or between the means of transitions, divided by their std."""
    step_weights: Annotated[Literal["none", "flash", "longcat", "guard", "tempflow"], OrFunction] = "none"
    """Weight of each denoising step in the loss (`bpgo_video.diffusion.steps.STEP_WEIGHTS`), with a mean of 1."""

    @property
    def replays_transitions(self) -> bool:
        """Whether the objective needs the rollout's transitions; one from outside the package receives them."""
        return self.records_path and self.objective != "draft"

    @property
    def records_path(self) -> bool:
        """Whether the objective needs the latents before the last."""
        return self.objective not in FINAL_VIDEOS

    @property
    def has_ratio(self) -> bool:
        """Whether the objective compares the policy with the one that sampled."""
        return self.objective not in (*AGAINST_REFERENCE, "draft")

    def keeps_old_velocities(self, updates_per_rollout: int) -> bool:
        """Whether the velocities of the policy that sampled are computed before the first update, and kept."""
        return self.objective in AGAINST_OLD and (updates_per_rollout > 1 or self.old_decay > 0)

    @property
    def starts_at_ratio_one(self) -> bool:
        """Whether the policy is the one that sampled until the first update of a rollout."""
        return self.has_ratio and not self.old_decay

    @property
    def uses_reference(self) -> bool:
        """Whether the loss compares the policy with one that it stays close to."""
        return self.kl_weight != 0 or self.objective in AGAINST_REFERENCE

    @property
    def compares_means(self) -> bool:
        """Whether the means of the rollout's transitions are needed."""
        return self.ratio == "guard" or self.trust_region == "divergence_mask"
