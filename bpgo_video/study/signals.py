"""What each trust knows of real groups: its rank correlation with a group's validity, and the direction of the update.

    validity   corr_j(A_reward, A_oracle) of a group
    Spearman   of w with the validity, over groups
    cosine     of w A_reward to A_oracle, over all samples of all groups: of the update to the one without error

Every w is the learner's, on all groups at once, at alpha = 1/2. Where noise is added to the oracle's own scores, the
cosine is the mean over draws. Intervals are percentile bootstraps over groups, 95 %.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import rankdata
from torch import Tensor

from bpgo_video.config.learner import BPGOConfig, TrustName
from bpgo_video.learner.advantages import group_relative
from bpgo_video.learner.agreement import correlation, group_icc, spearman_brown
from bpgo_video.learner.bpgo import step_advantages
from bpgo_video.randomness import generator_of
from bpgo_video.statistics import LEVEL
from bpgo_video.study.groups import FrameScores, Groups
from bpgo_video.study.preregistration import Signals
from bpgo_video.study.reliability import ranks
from bpgo_video.types import PriorAnchor

Scores = Float[Tensor, "groups group"]
PerGroup = Float[Tensor, "groups"]
Statistics = Float[np.ndarray, "resamples"]
Signal = Float[np.ndarray, "groups"]
Counts = Float[np.ndarray, "resamples groups"]
GRPO, NOISY = "GRPO", "oracle with noise"
ALPHA, MILD = 0.5, 0.3


@dataclass(frozen=True)
class Weighted:
    """Groups' weighted advantages, and the signal that weights them."""

    advantage: Scores
    signal: PerGroup


@dataclass(frozen=True)
class Value:
    """A statistic of all groups, with its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """One trust on one score.

    Attributes:
        cosine: to the oracle's advantage.
        change: of the cosine against GRPO on one scoring.
        spearman: of the signal with the validity; None for added noise, and where all groups have the same signal.
    """

    score: str
    trust: str
    cosine: Value
    change: Value
    spearman: Value | None = None


def signal_table(groups: Groups, plan: Signals) -> list[Row]:
    """All trusts on every reward that scores frames, and on the oracle's own scores with added noise."""
    counts = resampled(len(groups.prompts), plan.resamples, plan.seed)
    rows: list[Row] = []
    for name, frames in groups.rewards.items():
        if frames.shape[2] > 1 and " of " not in name:
            second = next((of for other, of in groups.rewards.items() if other.startswith(f"{name} of ")), None)
            rows += rows_of(name, [trusts(groups, frames, second)], groups, counts)
    return rows + rows_of(NOISY, noisy_scorings(groups, plan), groups, counts)


def noisy_scorings(groups: Groups, plan: Signals) -> Iterator[dict[str, Weighted]]:
    """Every trust on the oracle's frame scores with independent noise, for each draw of the noise."""
    clear, open_ = plan.noise
    frames = groups.oracle.shape[2]
    std = torch.where(groups.clear, clear, open_).double()[:, None, None] * frames**0.5
    for draw in range(plan.noise_draws):
        generator = generator_of("signals", plan.seed, draw)
        noise = torch.randn((2, *groups.oracle.shape), generator=generator, dtype=torch.float64)
        first, second = groups.oracle + std * noise
        yield trusts(groups, first, second)


def trusts(groups: Groups, first: FrameScores, second: FrameScores | None) -> dict[str, Weighted]:
    """GRPO and every trust, on one scoring and on two.

    Args:
        second: another scoring of the same samples, of as many frames or fewer.
    """
    one, oracle = first.mean(dim=2), groups.oracle.mean(dim=2)
    spread = ranks(one.std(dim=1))
    found = {
        GRPO: weighted(one, "none"),
        "RAS, own reference": weighted(one, "sigmoid", reference_anchor(groups.prompts, one)),
        "RAS, shared prior": weighted(one, "sigmoid", shared_anchor(one)),
        "agreement of frames": weighted(one, "frames", frames=first),
        "agreement of frames, alpha .3": weighted(one, "frames", frames=first, alpha=MILD),
        "group std, larger counts more": weighted(one, "reliability", reliability=spread),
        "group std, larger counts less": weighted(one, "reliability", reliability=1 - spread),
        "no division by the std": Weighted(one - one.mean(dim=1, keepdim=True), one.std(dim=1)),
        "the oracle's validity": weighted(one, "reliability", reliability=correlation(one, oracle).clamp(0, 1)),
    }
    if second is None:
        return found
    scorings = torch.stack([one, second.mean(dim=2)], dim=2)
    icc, mean = group_icc(scorings), scorings.mean(dim=2)
    found |= {
        "agreement of two scorings, trains on the first": weighted(
            one, "reliability", reliability=spearman_brown(icc, 1)
        ),
        "mean of two scorings": weighted(mean, "none"),
        "mean of two scorings, their agreement": weighted(mean, "reliability", reliability=spearman_brown(icc, 2)),
    }
    if second.shape == first.shape:
        found["mean of two scorings, agreement of frames"] = weighted(mean, "frames", frames=(first + second) / 2)
    return found


def weighted(
    scores: Scores,
    trust: TrustName,
    anchor: PriorAnchor | None = None,
    frames: FrameScores | None = None,
    reliability: PerGroup | None = None,
    alpha: float = ALPHA,
) -> Weighted:
    """The learner's w A of all groups, with what the trust needs."""
    found = step_advantages(
        {"reward": scores},
        {} if anchor is None else {"reward": anchor},
        {"reward": 1.0},
        BPGOConfig(alpha=alpha, zeta=0.0, trust=trust),
        frames={} if frames is None else {"reward": frames},
        reliability={} if reliability is None else {"reward": reliability},
    )
    return Weighted(found.advantage, found.trust)


def reference_anchor(prompts: Sequence[str], scores: Scores) -> PriorAnchor:
    """Each group's anchor is the mean over the other groups of its prompt; its own, where it is the only one."""
    means, number = scores.mean(dim=1), {prompt: index for index, prompt in enumerate(dict.fromkeys(prompts))}
    index = torch.tensor([number[prompt] for prompt in prompts])
    total = means.new_zeros(len(number)).index_add(0, index, means)[index]
    count = torch.bincount(index)[index]
    anchor = torch.where(count > 1, (total - means) / (count - 1).clamp(min=1), means)
    return PriorAnchor.without_samples(anchor, pooled_spread(scores))


def shared_anchor(scores: Scores) -> PriorAnchor:
    """The mean over all groups."""
    return PriorAnchor.without_samples(scores.mean().expand(len(scores)).clone(), pooled_spread(scores))


def pooled_spread(scores: Scores) -> float:
    return float(scores.var(dim=1).mean().sqrt())


def rows_of(score: str, draws: Iterable[Mapping[str, Weighted]], groups: Groups, counts: Counts) -> list[Row]:
    """The rows of all trusts on one score; statistics are means over draws of its noise."""
    oracle = group_relative(groups.oracle.mean(dim=2))
    found = list(draws)
    resampled_cosines = {name: cosines([of[name].advantage for of in found], oracle, counts) for name in found[0]}
    grpo = resampled_cosines[GRPO]
    validity = correlation(found[0][GRPO].advantage, oracle).numpy()
    return [
        Row(
            score,
            name,
            valued(cosine),
            valued(cosine - grpo),
            spearman(found[0][name].signal.numpy(), validity, counts) if len(found) == 1 else None,
        )
        for name, cosine in resampled_cosines.items()
    ]


def resampled(groups: int, resamples: int, seed: int) -> Counts:
    """How often each group is in each resample; row 0 is the sample itself."""
    drawn = np.random.default_rng(seed).multinomial(groups, np.full(groups, 1 / groups), size=resamples)
    return np.concatenate([np.ones((1, groups)), drawn]).astype(np.float64)


def cosines(advantages: Sequence[Scores], oracle: Scores, counts: Counts) -> Statistics:
    """Mean over draws of the cosine to the oracle's advantage, in each resample."""
    products = np.stack([(advantage * oracle).sum(dim=1).numpy() for advantage in advantages], axis=1)
    squares = np.stack([advantage.square().sum(dim=1).numpy() for advantage in advantages], axis=1)
    norms = counts @ oracle.square().sum(dim=1).numpy()
    return (counts @ products / np.sqrt(counts @ squares * norms[:, None])).mean(axis=1)


def spearman(signal: Signal, validity: Signal, counts: Counts) -> Value | None:
    """Rank correlation; None if the signal or the validity is the same for all groups."""
    if np.ptp(signal) == 0 or np.ptp(validity) == 0:
        return None
    rows = np.stack([np.repeat(np.arange(len(signal)), of) for of in counts.astype(np.int64)])
    one, other = (rankdata(values[rows], axis=1) for values in (signal, validity))
    one, other = (of - of.mean(axis=1, keepdims=True) for of in (one, other))
    norms = np.sqrt((one**2).sum(axis=1) * (other**2).sum(axis=1))
    defined = norms > 0  # a resample of few groups may repeat a single one
    return valued((one * other).sum(axis=1)[defined] / norms[defined])


def valued(statistics: Statistics) -> Value:
    """The statistic of the sample, in row 0, and the interval of the resamples."""
    low, high = np.quantile(statistics[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Value(float(statistics[0]), float(low), float(high))
