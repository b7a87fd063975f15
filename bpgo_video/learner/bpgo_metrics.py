"""What did trust and transformation do to this batch? Detached numbers for the log, from plain tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from bpgo_video.learner.advantages import zero_std_share
from bpgo_video.types import PriorAnchor

TRUST_BINS = 10


def trust_metrics(trust: Float[Tensor, "prompts"], alpha: float) -> dict[str, Tensor]:
    """`trust_mean`, `_min`, `_max`, `_std` (ddof 0), and the histogram of w where alpha is not 0."""
    metrics = {
        "trust_mean": trust.mean(),
        "trust_min": trust.min(),
        "trust_max": trust.max(),
        "trust_std": trust.std(correction=0),
    }
    if alpha == 0:
        return metrics
    shares = trust_histogram(trust, alpha).unbind()
    return metrics | {f"trust/hist/{place:02d}": share for place, share in enumerate(shares)}


def trust_histogram(trust: Float[Tensor, "prompts"], alpha: float) -> Float[Tensor, "bins"]:
    """Share of the groups in each of TRUST_BINS equal bins of [1 - alpha, 1 + alpha]; w = 1 opens the upper half.

    A w at the upper end, or beyond it by rounding, counts in the last bin; below the lower end, in the first.
    """
    place = (trust.double() - 1 + alpha) / (2 * alpha) * TRUST_BINS
    place = (place + 1e-6).floor().long()  # an edge, such as w = 1, belongs to the bin above it, however it is rounded
    counts = torch.bincount(place.clamp(0, TRUST_BINS - 1), minlength=TRUST_BINS)
    return counts.float() / len(trust)


def rms_quotient(one: Float[Tensor, "prompts group"], other: Float[Tensor, "prompts group"]) -> Float[Tensor, ""]:
    """RMS(one)/RMS(other), and 1 where either is 0: no group has signal then.

    `rms_ratio` is this of w A + zeta A~ against GRPO's A, both after the advantage clip: the step size at ratio 1. A
    trust that only rises acts as a larger learning rate, and this shows it.
    """
    above, below = (tensor.square().mean().sqrt() for tensor in (one, other))
    return torch.where((above > 0) & (below > 0), above / below, torch.ones_like(below))


def reward_metrics(
    rewards_by_name: Mapping[str, Float[Tensor, "prompts group"]], inversions: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Per reward `zero_std_share/NAME` and `crt/rank_inversion/NAME`; the bare names are the worst case."""
    shares = {name: zero_std_share(rewards) for name, rewards in rewards_by_name.items()}
    metrics = {"zero_std_share": torch.stack(list(shares.values())).max()}
    metrics |= {f"zero_std_share/{name}": share for name, share in shares.items()}
    if inversions:
        metrics["crt/rank_inversion"] = torch.stack(list(inversions.values())).max()
        metrics |= {f"crt/rank_inversion/{name}": share for name, share in inversions.items()}
    return metrics


def anchor_metrics(anchors: Mapping[str, PriorAnchor]) -> dict[str, Tensor]:
    """Per reward `prior/mean/NAME`, the mean anchor of the step's prompts, and `prior/scale/NAME`, s_ref."""
    means = {f"prior/mean/{name}": anchor.mean.mean() for name, anchor in anchors.items()}
    return means | {f"prior/scale/{name}": torch.tensor(anchor.scale) for name, anchor in anchors.items()}
