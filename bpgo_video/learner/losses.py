"""PPO and BPGO surrogate losses, their trust regions, and the metrics of the policy's ratio."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bpgo_video.config.learner import LossConfig
from bpgo_video.types import Loss, Table

RATIO_ERROR = "ratio_squared_error"


@dataclass(frozen=True)
class PolicyShift:
    """How far the policy has moved since it sampled, per sample.

    Attributes:
        log_ratio: log-prob of the recorded transition now minus then, means over latent dimensions.
        divergence: |d mean|^2 / (2 std^2), the KL between the two Gaussian transitions, mean over latent dimensions;
            None if the rollout did not record its means.
        std: of the transition; None with divergence.
    """

    log_ratio: Float[Tensor, "samples"]
    divergence: Float[Tensor, "samples"] | None = None
    std: Float[Tensor, ""] | None = None


def plain_ratio(move: PolicyShift) -> Float[Tensor, "samples"]:
    """The log ratio."""
    return move.log_ratio


def guard_ratio(move: PolicyShift) -> Float[Tensor, "samples"]:
    """std (log ratio + |d mean|^2 / (2 std^2)): centred on 0, with the same spread at every step.

    GRPO-Guard (arXiv 2510.22319). The expected log ratio is minus the divergence, and its spread is proportional to
    |d mean|/std: without normalisation, ratios are below 1 and a clip range suits one noise level only.
    """
    divergence, std = _recorded(move, "loss.ratio guard")
    return std * (move.log_ratio + divergence)


RATIOS: Table[Callable[[PolicyShift], Tensor]] = Table({"plain": plain_ratio, "guard": guard_ratio})


def clipped_surrogate(
    move: PolicyShift, advantage: Float[Tensor, "samples"], settings: LossConfig
) -> Float[Tensor, "samples"]:
    """-min(ratio A, clamp(ratio, 1 - low, 1 + high) A): the loss of PPO (arXiv 1707.06347), per sample."""
    low, high = settings.clip_range
    ratio = RATIOS[settings.ratio](move).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def divergence_masked_surrogate(
    move: PolicyShift, advantage: Float[Tensor, "samples"], settings: LossConfig
) -> Float[Tensor, "samples"]:
    """-ratio A, but 0 where the divergence has reached its limit and the sample would move further out.

    The directional mask of DPPO (arXiv 2602.04879), on the transition's KL instead of a token's: a sample moves out if
    its ratio is above 1 with A > 0, or below 1 with A < 0. It bounds a distance, where a clip bounds a noisy ratio.
    """
    divergence, _ = _recorded(move, "loss.trust_region divergence_mask")
    log_ratio = RATIOS[settings.ratio](move)
    outwards = log_ratio.detach() * advantage > 0
    kept = ~(outwards & (divergence.detach() >= settings.divergence_limit))
    return -(log_ratio.exp() * advantage * kept)


TRUST_REGIONS: Table[Callable[[PolicyShift, Tensor, LossConfig], Tensor]] = Table(
    {
        "clip": clipped_surrogate,
        "divergence_mask": divergence_masked_surrogate,
    }
)


def _recorded(move: PolicyShift, key: str) -> tuple[Tensor, Tensor]:
    if move.divergence is None or move.std is None:
        raise ValueError(f"{key} compares the means of transitions, which this rollout did not record")
    return move.divergence, move.std


def bpgo_loss(
    move: PolicyShift,
    advantage: Float[Tensor, "samples"],
    contrastive: Float[Tensor, "samples"] | None,
    zeta: float,
    settings: LossConfig,
) -> Loss:
    """L = mean_s [surr(ratio, w A) + zeta surr(ratio, A~)]: the total loss of arXiv 2511.18919, per sample.

    surr(ratio, w A) is w surr(ratio, A), because w is above 0.

    Both surrogates use the same log_prob, so the second costs no second forward pass. Each is clipped separately,
    because surr(ratio, A + zeta A~) has other gradients where the signs differ. The paper gives no normalisation within
    a group: this is the mean over samples, hence over groups of equal size. At zeta = 0 the second term is skipped.

    Args:
        advantage: w A of each sample, w its group's trust.
        contrastive: A~ of each sample; may be None when zeta is 0.
    """
    surrogate = TRUST_REGIONS[settings.trust_region]
    loss = surrogate(move, advantage, settings)
    if zeta != 0:
        if contrastive is None:
            raise ValueError(f"zeta={zeta} but no contrastive advantage: estimate advantages with the same zeta")
        loss = loss + zeta * surrogate(move, contrastive, settings)
    return Loss(value=loss.mean(), metrics=ratio_metrics(move, advantage, settings))


def ratio_metrics(move: PolicyShift, advantage: Float[Tensor, "samples"], settings: LossConfig) -> dict[str, Tensor]:
    """How far the policy has moved from the one that sampled, detached.

    `clip_fraction` is the share of ratios outside the clip range, also by the advantage's sign; `approx_kl` is
    mean (log ratio)^2 / 2, an estimator that is well conditioned at ratios of 1 +- 1e-3; like log-probs, it is a mean
    over latent dimensions. `RATIO_ERROR`, mean (r - 1)^2, is for `with_spread`.
    """
    low, high = settings.clip_range
    log_ratio = RATIOS[settings.ratio](move).detach()
    ratio = log_ratio.exp()
    outside = (ratio < 1 - low) | (ratio > 1 + high)
    return {
        "ratio_mean": ratio.mean(),
        RATIO_ERROR: (ratio - 1).square().mean(),
        "ratio_min": ratio.min(),
        "ratio_max": ratio.max(),
        "log_ratio_abs_max": log_ratio.abs().max(),
        "clip_fraction": outside.to(ratio.dtype).mean(),
        "clip_fraction/positive": (outside & (advantage > 0)).to(ratio.dtype).mean(),
        "clip_fraction/negative": (outside & (advantage < 0)).to(ratio.dtype).mean(),
        "approx_kl": 0.5 * log_ratio.square().mean(),
    }


def with_spread(means: Mapping[str, float]) -> dict[str, float]:
    """Means over all samples, with the spread of the ratio, which cannot be averaged over micro-batches.

    Returns:
        `means` with `ratio_std` and `effective_samples`, (sum r)^2 / (n sum r^2), instead of `RATIO_ERROR`, if it is
        there: it is not if every update was skipped.
    """
    metrics = dict(means)
    if RATIO_ERROR not in metrics:
        return metrics
    shift, error = metrics["ratio_mean"] - 1, metrics.pop(RATIO_ERROR)
    metrics["ratio_std"] = max(error - shift**2, 0.0) ** 0.5
    square = 1 + 2 * shift + error  # mean r^2, which is 0 if every ratio underflows
    metrics["effective_samples"] = (1 + shift) ** 2 / square if square > 0 else 0.0
    return metrics
