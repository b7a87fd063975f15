"""The equations of trust and transformed rewards: Eq 2 and Eq 4 of arXiv 2511.18919, and those of the released code.

Plain tensors, prompts x group, computed in fp64 (they are a few hundred numbers) and returned in the rewards'
dtype, fp32 at least. `one_reward.py` uses the functions.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

EXPONENT_RANGE = (-1.0, 3.0)  # u exp(u) turns at -1; above 3 a single sample would be the whole group
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

    RAS, Eq 2 of arXiv 2511.18919: a group whose mean lies above its anchor counts more.

    Args:
        rewards: R, higher is better.
        prior: R_prior, in the reward's units.
        scale: s_ref in u = (R - R_prior)/s_ref; None for the verbatim equation, u = R - R_prior.
        alpha: half the width of w's range, in [0, 1).
        k: slope, above 0, per u (verbatim: per unit of reward).
        centre: take x_i - mean_i x_i in place of x_i = k mean_j u.
    """
    if not (0 <= alpha < 1 and 0 < k < math.inf):
        raise ValueError(f"alpha={alpha}, k={k}: Eq 2 needs alpha in [0, 1) and k above 0; alpha = 0 is w = 1")
    x = k * _deviation(rewards, prior, scale).mean(dim=1)
    x = x - x.mean() if centre else x
    w = 1 + alpha * (2 * torch.sigmoid(x) - 1)
    return w.to(_result_dtype(rewards))


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
        OverflowError: verbatim, when the transformed rewards of a group have no finite sum of squares.
    """
    if contrast < 0:
        raise ValueError(f"contrast={contrast}: must be at least 0; below, worse samples would rank higher")
    u = _deviation(rewards, prior, scale)
    exponent = rewards.double() if scale is None else u.clamp(*EXPONENT_RANGE)
    transformed = ((contrast * u + (u > 0)) * exponent.exp()).to(_result_dtype(rewards))
    return _not_overflown(transformed, rewards)


def released_trust(
    rewards: Float[Tensor, "prompts group"],
    prior: Float[Tensor, "prompts"],
    scale: float | None,
    alpha: float,
    prior_var: float,
    centre: bool = False,
) -> Float[Tensor, "prompts"]:
    """clamp(1 + alpha (w - 1), .01, 10), w = .5 + Phi((m - p)/sqrt(v)): trust as in the authors' code.

    v = 1/(G/s2 + 1/prior_var) and m = v (G mean/s2 + p/prior_var) are the posterior of the group's mean
    reward under the prior N(p, prior_var), s2 = var_j + 1e-8 (ddof 1); w in [.5, 1.5]. With a scale all of it
    is in u, where p = 0. Where `centre` is set, z = (m - p)/sqrt(v) loses its mean over prompts.
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
    return (1 + alpha * (w - 1)).clamp(*RELEASED_SCALE_RANGE).to(_result_dtype(rewards))


def released_transformation(
    rewards: Float[Tensor, "prompts group"],
    prior: Float[Tensor, "prompts"],
    contrast: float = 50.0,
    tau: float = RELEASED_TAU,
) -> Float[Tensor, "prompts group"]:
    """R~ = (a (R - p) + 1{R > p}) R sigmoid(R/tau), a = contrast: transformation of the authors' code.

    Not monotone: with negative rewards it reverses most pairs.

    Raises:
        OverflowError: when the transformed rewards of a group have no finite sum of squares.
    """
    deviation, raw = _deviation(rewards, prior, None), rewards.double()
    transformed = (contrast * deviation + (deviation > 0)) * raw * torch.sigmoid(raw / tau)
    return _not_overflown(transformed.to(_result_dtype(rewards)), rewards)


def rank_inversion(
    rewards: Float[Tensor, "prompts group"], transformed: Float[Tensor, "prompts group"]
) -> Float[Tensor, ""]:
    """Share of the within-group pairs of unequal reward whose order the transformation reverses, in [0, 1]."""
    before = torch.sign(rewards[:, :, None] - rewards[:, None, :])
    after = torch.sign(transformed[:, :, None] - transformed[:, None, :])
    ordered = (before != 0).sum()
    return (before * after < 0).sum().float() / ordered.clamp(min=1)


def _deviation(
    rewards: Float[Tensor, "prompts group"], prior: Float[Tensor, "prompts"], scale: float | None
) -> Float[Tensor, "prompts group"]:
    """u = (R - R_prior)/scale in fp64, which keeps the order of any two fp32 rewards."""
    if prior.shape != rewards.shape[:1]:
        raise ValueError(f"prior of shape {tuple(prior.shape)} for rewards of {tuple(rewards.shape)}: one per prompt")
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"scale={scale}: s_ref must be above 0 and finite; None gives the verbatim equation")
    deviation = rewards.double() - prior.double()[:, None]
    return deviation if scale is None else deviation / scale


def _result_dtype(rewards: Tensor) -> torch.dtype:
    return torch.float64 if rewards.dtype == torch.float64 else torch.float32


def _not_overflown(
    transformed: Float[Tensor, "prompts group"], rewards: Float[Tensor, "prompts group"]
) -> Float[Tensor, "prompts group"]:
    overflown = ~transformed.square().sum(dim=1).isfinite()  # the group std squares and sums them
    if bool(overflown.any()):
        prompt = int(overflown.nonzero()[0])
        worst = rewards[prompt][rewards[prompt].abs().argmax()].item()
        raise OverflowError(
            f"the transformation overflows {transformed.dtype} on {worst:g} (prompt row {prompt}); "
            "use the paper form with standardise: true, or bring the rewards to a smaller scale"
        )
    return transformed
