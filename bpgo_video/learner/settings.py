"""Settings of a step's advantages: what of BPGO is used, and with which numbers; checked when they are made."""

from __future__ import annotations

import math
from dataclasses import dataclass

OWN_TRUST = {"paper": "sigmoid", "released": "posterior"}  # form -> the trust that its source has
TRUST_NAMES = ("sigmoid", "posterior", "reliability", "none")
CENTRES = ("none", "batch_mean")


@dataclass(frozen=True)
class BPGOSettings:
    """What of BPGO is used. alpha = zeta = 0 is GRPO.

    Attributes:
        form: "paper" (Eq 2, Eq 4) or "released" (the authors' code, there with alpha = 1 and contrast = 50).
        standardise: use u = (R - R_prior)/s_ref; False is the verbatim equations. The released
            transformation is always verbatim: in u its factor R sigmoid(R/tau) would change sign at the prior and
            reverse all that is below.
        alpha: strength of the trust, w in (1 - alpha, 1 + alpha).
        k: slope of Eq 2, per u (verbatim: per unit of reward).
        contrast: lambda of Eq 4, or a of the released form.
        zeta: weight of the second surrogate; at 0 the transformation is skipped.
        prior_var: variance of the released form's prior, in u^2 (verbatim: in reward^2).
        ras_on_crt: weigh the second surrogate with w too; the paper does not.
        trust: which w, of trust.TRUSTS; None is the form's own. "sigmoid" is Eq 2; "posterior" the probability, under
            a Normal prior, that the group's mean lies above the anchor; "reliability" how well two scorings of the
            group agree (reliability.py); "none" is w = 1.
        ras_center: "batch_mean" subtracts from what w is a function of - k mean_j u, the posterior's z, or the ICC -
            its mean over the step's prompts, reward by reward. A shift that all groups share then changes no w: trust
            redistributes between groups, and a group that is as good as the others has w = 1.
        match_rms: scale both surrogates' advantages by the one factor RMS(A)/RMS(w A + zeta A~) of the batch, taken
            before the advantage clip: a step as large as GRPO's, so that what is left is trust and not step size.
    """

    form: str = "paper"
    standardise: bool = True
    alpha: float = 0.5
    k: float = 1.0
    contrast: float = 1.0
    zeta: float = 0.5
    prior_var: float = 1.0
    ras_on_crt: bool = False
    trust: str | None = None
    ras_center: str = "none"
    match_rms: bool = False

    def __post_init__(self) -> None:
        rules = {
            "form": (self.form in OWN_TRUST, f"must be one of {', '.join(OWN_TRUST)}"),
            "trust": (self.trust in (None, *TRUST_NAMES), f"must be one of {', '.join(TRUST_NAMES)}, or None"),
            "ras_center": (self.ras_center in CENTRES, f"must be one of {', '.join(CENTRES)}"),
            "k": (0 < self.k < math.inf, "must be above 0; alpha = 0 turns the trust off"),
            "contrast": (
                0 <= self.contrast < math.inf,
                "must be at least 0: below, worse samples would rank higher",
            ),
            "zeta": (0 <= self.zeta < math.inf, "must be at least 0; 0 turns the second surrogate off"),
            "prior_var": (0 < self.prior_var < math.inf, "must be above 0"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)!r}: {rule}")
        if not (0 <= self.alpha < 1 or (self.alpha == 1 and self.form == "released" and self.own_trust == "posterior")):
            raise ValueError(
                f"alpha={self.alpha!r}: must be in [0, 1), or 1 in the released form; 0 turns the trust off"
            )

    @property
    def own_trust(self) -> str:
        """The name of the trust in use."""
        return self.trust or OWN_TRUST[self.form]

    @property
    def trusts(self) -> bool:
        """Whether groups are weighed against each other at all."""
        return self.alpha != 0 and self.own_trust != "none"

    @property
    def centres(self) -> bool:
        return self.ras_center == "batch_mean"

    @property
    def needs_prior(self) -> bool:
        return self.zeta != 0 or (self.trusts and self.own_trust != "reliability")
