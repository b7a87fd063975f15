"""BPGO on one reward: the trust w (Eq 2), the transformed rewards R~ (Eq 4), and the advantages A and A~.

"Learning What to Trust" (arXiv 2511.18919). With R_i^j the reward of sample j of prompt i and R_prior(i) its anchor:

    Eq 2, RAS   w_i = 1 + alpha (2 sigmoid(k (mean_j R_i^j - R_prior)) - 1)
    Eq 4, CRT   R~_i^j = (lambda (R_i^j - R_prior) + 1{R_i^j > R_prior}) exp(R_i^j)
    total       L = 1/N sum_i [w_i L_GRPO({R_i^j}) + zeta L_GRPO({R~_i^j})]

Departures:
- By default both equations use u = (R - R_prior)/s_ref, with s_ref the within-group std of the reference policy,
  because k, lambda and the exponent have units of 1/reward. u replaces R - R_prior and, in the exponent of Eq 4, R,
  clamped to [-1, 3]: the verbatim Eq 4 falls below R_prior - 1, which makes the worst samples look average.
- The authors' released code differs from the paper. `released_advantages` is its step: transformed rewards replace the
  rewards. The form "released" has its equations in the paper's loss: the transformed rewards make a second advantage,
  and the trust is computed from the original ones.

Rewards are prompts x group. Everything is computed in fp64 (a few hundred numbers).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bpgo_video.learner.advantages import DELTA, equal_groups, group_relative, result_dtype

EXPONENT_RANGE = (-1.0, 3.0)  # u exp(u) has its minimum at -1; above 3 a single sample would dominate the group
RELEASED_TAU = 5.0
RELEASED_TRUST_RANGE = (0.5, 1.5)
RELEASED_SCALE_RANGE = (0.01, 10.0)


def reliability_adaptive_scaling(
    rewards: Float[Tensor, "prompts group"],
    prior: Float[Tensor, "prompts"],
    scale: float | None,
    alpha: float,
    k: float,
    centre: bool = False,
) -> Float[Tensor, "prompts"]:
    """w = 1 + alpha (2 sigmoid(k mean_j u) - 1), in (1 - alpha, 1 + alpha); exactly 1 at alpha = 0.

    RAS, Eq 2 of arXiv 2511.18919: a group whose mean is above its anchor counts more.

    Args:
        rewards: R, higher is better.
        prior: R_prior, in the reward's units.
        scale: s_ref in u = (R - R_prior)/s_ref; None for the verbatim equation, u = R - R_prior.
        alpha: half the width of w's range, in [0, 1).
        k: slope, above 0, per u (verbatim: per unit of reward).
        centre: use x_i - mean_i x_i instead of x_i = k mean_j u.
    """
    if not (0 <= alpha < 1 and 0 < k < math.inf):
        raise ValueError(f"alpha={alpha}, k={k}: Eq 2 needs alpha in [0, 1) and k above 0; alpha = 0 is w = 1")
    x = k * _deviation(rewards, prior, scale).mean(dim=1)
    x = x - x.mean() if centre else x
    w = 1 + alpha * (2 * torch.sigmoid(x) - 1)
    return w.to(result_dtype(rewards))


def contrastive_reward_transformation(
    rewards: Float[Tensor, "prompts group"],
    prior: Float[Tensor, "prompts"],
    scale: float | None,
    contrast: float,
) -> Float[Tensor, "prompts group"]:
    """R~ = (lambda u + 1{u > 0}) exp(clamp(u, -1, 3)), strictly increasing for lambda = contrast > 0.

    CRT, Eq 4 of arXiv 2511.18919. It stretches rewards above the anchor and compresses those below. scale = None is
    the verbatim (lambda (R - R_prior) + 1{R > R_prior}) exp(R), which is not monotone.

    Args:
        rewards: R, higher is better.
        prior: R_prior, in the reward's units.
        scale: s_ref in u = (R - R_prior)/s_ref; None for the verbatim equation.
        contrast: lambda, at least 0.

    Raises:
        OverflowError: verbatim, if the transformed rewards of a group have no finite sum of squares.
    """
    if contrast < 0:
        raise ValueError(f"contrast={contrast}: must be at least 0; below, worse samples would rank higher")
    u = _deviation(rewards, prior, scale)
    exponent = rewards.double() if scale is None else u.clamp(*EXPONENT_RANGE)
    return _finite((contrast * u + (u > 0)) * exponent.exp(), rewards)


def released_trust(
    rewards: Float[Tensor, "prompts group"],
    prior: Float[Tensor, "prompts"],
    scale: float | None,
    alpha: float,
    prior_var: float,
    centre: bool = False,
) -> Float[Tensor, "prompts"]:
    """clamp(1 + alpha (w - 1), .01, 10), w = .5 + Phi((m - p)/sqrt(v)): the trust of the authors' code.

    v = 1/(G/s2 + 1/prior_var) and m = v (G mean/s2 + p/prior_var) are the posterior of the group's mean reward under
    the prior N(p, prior_var), s2 = var_j + 1e-8 (ddof 1); w is in [.5, 1.5]. With a scale everything is in u, where
    p = 0. `centre` subtracts the mean over prompts from z = (m - p)/sqrt(v).
    """
    u = _deviation(rewards, prior, scale)  # m - p depends on R - p only
    group = u.shape[1]
    s2 = u.var(dim=1) + 1e-8
    v = 1 / (group / s2 + 1 / prior_var)
    m = v * group * u.mean(dim=1) / s2
    w_min, w_max = RELEASED_TRUST_RANGE
    z = m / v.sqrt()
    z = z - z.mean() if centre else z
    w = w_min + (w_max - w_min) * torch.special.ndtr(z)
    return (1 + alpha * (w - 1)).clamp(*RELEASED_SCALE_RANGE).to(result_dtype(rewards))


def released_transformation(
    rewards: Float[Tensor, "prompts group"],
    prior: Float[Tensor, "prompts"],
    scale: float | None,
    contrast: float,
) -> Float[Tensor, "prompts group"]:
    """R~ = (a (R - p) + 1{R > p}) R sigmoid(R/5), a = contrast: the transformation of the authors' code.

    It uses the original rewards, whatever the scale: in u, the factor R sigmoid(R/5) would change sign at the anchor.
    Not monotone: with negative rewards it reverses most pairs. Raises OverflowError as Eq 4 does.
    """
    deviation, raw = _deviation(rewards, prior, None), rewards.double()
    return _finite((contrast * deviation + (deviation > 0)) * raw * torch.sigmoid(raw / RELEASED_TAU), rewards)


Trust = Callable[[Tensor, Any, float | None, float, float], Tensor]  # (R, R_prior, s_ref, alpha, k) -> w
Transform = Callable[[Tensor, Tensor, float | None, float], Tensor]  # (R, R_prior, s_ref, contrast) -> R~
TRANSFORMS: dict[str, Transform] = {"paper": contrastive_reward_transformation, "released": released_transformation}


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
    normalise: Callable[[Tensor], Tensor] = group_relative,
) -> BPGOAdvantages:
    """What the total loss needs of one reward: L = mean [w surr(ratio, A) + zeta surr(ratio, A~)].

    A is group-relative in R, A~ in R~ (Eq 4), and w is Eq 2 of arXiv 2511.18919. alpha = 0 gives w = 1 and zeta = 0
    skips R~: both together are GRPO.

    Args:
        rewards: R, higher is better.
        prior: R_prior, in the reward's units; None if neither `trust` nor `transform` uses it.
        scale: s_ref in u = (R - R_prior)/s_ref; None for the verbatim equations.
        alpha: w is in (1 - alpha, 1 + alpha), alpha in [0, 1).
        k: slope of Eq 2, above 0.
        contrast: lambda of Eq 4, at least 0.
        zeta: weight of the second surrogate, at least 0. It is not part of A~.
        trust: (R, R_prior, s_ref, alpha, k) -> w, instead of Eq 2.
        transform: (R, R_prior, s_ref, contrast) -> R~, instead of Eq 4.
        normalise: rewards -> advantages, instead of GRPO's.

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
    # Equal rewards stay equal whatever the last bit of exp is, which may depend on a value's position.
    contrastive = (normalise(transformed) * _above_noise(exact)).masked_fill(equal_groups(rewards)[:, None], 0.0)
    return BPGOAdvantages(advantage, contrastive, w, transformed)


def released_advantages(
    rewards: Float[Tensor, "prompts group"],
    prior: Float[Tensor, "prompts"],
    alpha: float,
    contrast: float,
    prior_var: float,
    normalise: Callable[[Tensor], Tensor] = group_relative,
) -> BPGOAdvantages:
    """The step of the authors' code: transformed rewards replace the rewards, in the advantage and in the trust.

    A is the group-relative advantage of R~, w = `released_trust` of R~ with the anchor of R, and there is no second
    surrogate. The authors use alpha = 1, contrast a = 50 and prior_var = 1. In fp64; errors as `bpgo_advantages`.
    """
    exact = rewards.double()
    transformed = released_transformation(exact, prior, None, contrast)
    advantage = normalise(transformed).masked_fill(equal_groups(rewards)[:, None], 0.0)
    w = exact.new_ones(len(rewards)) if alpha == 0 else released_trust(transformed, prior, None, alpha, prior_var)
    return BPGOAdvantages(advantage.to(result_dtype(rewards)), None, w, transformed)


def _above_noise(rewards: Float[Tensor, "prompts group"]) -> Float[Tensor, "prompts 1"]:
    """std/(std + 1e-6), std of the original rewards: the factor that the 1e-6 in A has, for A~ too.

    Otherwise A~ would enlarge rewards that differ in their last bit to a full advantage.
    """
    std = rewards.std(dim=1, keepdim=True)
    return std / (std + DELTA)


def _deviation(
    rewards: Float[Tensor, "prompts group"], prior: Float[Tensor, "prompts"], scale: float | None
) -> Float[Tensor, "prompts group"]:
    """u = (R - R_prior)/scale in fp64, which keeps the order of any two fp32 rewards."""
    if prior.shape != rewards.shape[:1]:
        raise ValueError(f"prior of shape {tuple(prior.shape)} for rewards of {tuple(rewards.shape)}: one per prompt")
    if not bool(prior.isfinite().all()):
        raise ValueError(f"prior={prior.tolist()} is not finite; measure it again")
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(
            f"scale={scale}: s_ref must be above 0 and finite, so the reference samples of some prompt must differ; "
            "check the reward and measure its prior again, or take None for the verbatim equations"
        )
    deviation = rewards.double() - prior.double()[:, None]
    return deviation if scale is None else deviation / scale


def _finite(
    transformed: Float[Tensor, "prompts group"], rewards: Float[Tensor, "prompts group"]
) -> Float[Tensor, "prompts group"]:
    """The transformed rewards in the result's dtype; OverflowError if the std of a group would overflow."""
    transformed = transformed.to(result_dtype(rewards))
    overflown = ~transformed.square().sum(dim=1).isfinite()
    if bool(overflown.any()):
        prompt = int(overflown.nonzero()[0])
        worst = rewards[prompt][rewards[prompt].abs().argmax()].item()
        raise OverflowError(
            f"the transformation overflows {transformed.dtype} on {worst:g} (prompt row {prompt}); "
            "use the paper form with standardise: true, or bring the rewards to a smaller scale"
        )
    return transformed
