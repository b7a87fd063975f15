"""BPGO on one reward: from its groups and their prior anchor to trust w and the advantages A and A~.

BPGO, "Learning What to Trust" (arXiv 2511.18919). With R_i^j the reward of sample j of prompt i and
R_prior(i) its anchor:

    Eq 2, RAS   w_i = 1 + alpha (2 sigmoid(k (mean_j R_i^j - R_prior)) - 1)
    Eq 4, CRT   R~_i^j = (lambda (R_i^j - R_prior) + 1{R_i^j > R_prior}) exp(R_i^j)
    total       L = 1/N sum_i [w_i L_GRPO({R_i^j}) + zeta L_GRPO({R~_i^j})]

Departures:
- By default both equations run on u = (R - R_prior)/s_ref, with s_ref the within-group std of the reference
  policy: k, lambda and the exponent carry units of 1/reward. u takes the place of R - R_prior and, in Eq 4,
  of R, with the exponent clamped to [-1, 3]: the verbatim Eq 4 falls below R_prior - 1, so that the worst
  samples look average.
- The authors' released code differs from the paper. It is here as form "released", except that rewards are
  not overwritten: the transformed ones make a second advantage, as in the paper, and the trust never sees them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from bpgo_video.learner.advantages import equal_groups, group_relative
from bpgo_video.learner.equations import (
    contrastive_reward_transformation,
    released_transformation,
    reliability_adaptive_scaling,
)
from bpgo_video.learner.trust import Trust

Normaliser = Callable[[Tensor], Tensor]  # rewards -> advantages
Transform = Callable[[Tensor, Tensor, float | None, float], Tensor]  # rewards, prior, scale, contrast -> R~


def _released(rewards: Tensor, prior: Tensor, scale: float | None, contrast: float) -> Tensor:
    """In raw rewards, whatever the scale."""
    return released_transformation(rewards, prior, contrast)


TRANSFORMS: dict[str, Transform] = {"paper": contrastive_reward_transformation, "released": _released}


class BPGOAdvantages(NamedTuple):
    """A, A~, w and R~ of one reward's groups.

    Attributes:
        advantage: A of R, in the rewards' dtype, fp32 at least.
        contrastive: A~ of R~, in fp64; None at zeta = 0.
        trust: w, in fp64.
        transformed: R~, in fp64; None at zeta = 0.
    """

    advantage: Float[Tensor, "prompts group"]
    contrastive: Float[Tensor, "prompts group"] | None
    trust: Float[Tensor, "prompts"]
    transformed: Float[Tensor, "prompts group"] | None


def bpgo_advantages(
    rewards: Float[Tensor, "prompts group"],
    prior: Float[Tensor, "prompts"] | None,
    scale: float | None,
    alpha: float,
    k: float,
    contrast: float,
    zeta: float,
    *,
    trust: Trust = reliability_adaptive_scaling,
    transform: Transform = contrastive_reward_transformation,
    normalise: Normaliser = group_relative,
) -> BPGOAdvantages:
    """What the total loss needs of one reward: L = mean [w surr(ratio, A) + zeta surr(ratio, A~)].

    A is group-relative in R, A~ in R~ (Eq 4), and w is Eq 2 of arXiv 2511.18919. alpha = 0 gives w = 1 and zeta = 0
    skips R~: both together are GRPO.

    Args:
        rewards: R, higher is better.
        prior: R_prior, in the reward's units; None where neither `trust` nor `transform` uses it.
        scale: s_ref in u = (R - R_prior)/s_ref; None for the verbatim equations.
        alpha: w lies in (1 - alpha, 1 + alpha), alpha in [0, 1).
        k: slope of Eq 2, above 0.
        contrast: lambda of Eq 4, at least 0.
        zeta: weight of the second surrogate, at least 0. It is not part of A~.
        trust: (R, R_prior, s_ref, alpha, k) -> w, in place of Eq 2.
        transform: (R, R_prior, s_ref, contrast) -> R~, in place of Eq 4.
        normalise: rewards -> advantages, in place of GRPO's.

    Raises:
        OverflowError: Eq 4 verbatim, on rewards whose exponential overflows.
    """
    advantage, exact = normalise(rewards), rewards.double()  # u exp(u) is flat at u = -1: fp32 would tie rewards
    w = exact.new_ones(len(rewards)) if alpha == 0 else trust(exact, prior, scale, alpha, k)
    if zeta == 0:
        return BPGOAdvantages(advantage, None, w, None)
    if prior is None:
        raise ValueError(f"zeta={zeta} but prior is None: the transformation compares rewards with an anchor")
    transformed = transform(exact, prior, scale, contrast)
    # Equal rewards count as equal whatever the last bit of exp says, which may depend on a value's place.
    contrastive = normalise(transformed).masked_fill(equal_groups(rewards)[:, None], 0.0)
    return BPGOAdvantages(advantage, contrastive, w, transformed)
