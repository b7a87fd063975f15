"""What is minimised? The clipped surrogate, and BPGO's two of them on one replayed log-prob."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from bpgo_video.types import Loss

ClipRange = tuple[float, float]  # (low, high): the ratio is clamped to [1 - low, 1 + high]


def clipped_surrogate(
    log_prob: Float[Tensor, "samples"],
    old_log_prob: Float[Tensor, "samples"],
    advantage: Float[Tensor, "samples"],
    clip_range: ClipRange,
) -> Float[Tensor, "samples"]:
    """-min(ratio A, clamp(ratio, 1 - low, 1 + high) A), ratio = exp(log_prob - old_log_prob).

    The loss of PPO (arXiv 1707.06347), per sample.
    """
    low, high = clip_range
    if not (0 <= low < 1 and high >= 0):
        raise ValueError(f"clip_range=({low}, {high}): widths below and above 1, with 0 <= low < 1 and high >= 0")
    ratio = (log_prob - old_log_prob).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def bpgo_loss(
    log_prob: Float[Tensor, "samples"],
    old_log_prob: Float[Tensor, "samples"],
    advantage: Float[Tensor, "samples"],
    contrastive: Float[Tensor, "samples"] | None,
    trust: Float[Tensor, "samples"],
    zeta: float,
    clip_range: ClipRange,
) -> Loss:
    """L = mean_s [w surr(ratio, A) + zeta surr(ratio, A~)]: the total loss of arXiv 2511.18919, per sample.

    Both surrogates take the same log_prob, so that the second costs no second forward; each is clipped by
    itself, since surr(ratio, A + zeta A~) has other gradients where the signs differ. The paper gives no
    normalisation within a group: this is the mean over samples, hence over groups of equal size. At zeta = 0
    the second term is skipped.

    Args:
        advantage, contrastive, trust: A, A~ and w of each sample's group; contrastive may be None when zeta is 0.
        clip_range: (low, high), the ratio is clamped to [1 - low, 1 + high].
    """
    loss = trust * clipped_surrogate(log_prob, old_log_prob, advantage, clip_range)
    if zeta != 0:
        if contrastive is None:
            raise ValueError(f"zeta={zeta} but no contrastive advantage: estimate advantages with the same zeta")
        loss = loss + zeta * clipped_surrogate(log_prob, old_log_prob, contrastive, clip_range)
    return Loss(value=loss.mean(), metrics=ratio_metrics(log_prob, old_log_prob, clip_range))


def ratio_metrics(
    log_prob: Float[Tensor, "samples"], old_log_prob: Float[Tensor, "samples"], clip_range: ClipRange
) -> dict[str, Tensor]:
    """How far the policy has moved from the one that sampled, detached.

    `clip_fraction` is the share of ratios outside the clip range, `approx_kl` is mean (log ratio)^2 / 2 (the
    well conditioned estimator at ratios of 1 +- 1e-3); log-probs being means over latent dimensions, so is
    the KL's unit.
    """
    low, high = clip_range
    log_ratio = (log_prob - old_log_prob).detach()
    ratio = log_ratio.exp()
    return {
        "ratio_mean": ratio.mean(),
        "ratio_std": ratio.std(correction=0),
        "ratio_min": ratio.min(),
        "ratio_max": ratio.max(),
        "log_ratio_abs_max": log_ratio.abs().max(),
        "clip_fraction": ((ratio < 1 - low) | (ratio > 1 + high)).to(ratio.dtype).mean(),
        "approx_kl": 0.5 * log_ratio.square().mean(),
    }
