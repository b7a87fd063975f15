"""Group-relative advantages: normalisation, combination of rewards, bounds, and credit over latent frames.

All are functions of a step's gathered rewards, prompts x group, so they are equal on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bpgo_video.config.learner import AdvantageConfig
from bpgo_video.types import Table

DELTA = 1e-6  # added to a standard deviation, as in GRPO


def group_relative(rewards: Float[Tensor, "prompts group"]) -> Float[Tensor, "prompts group"]:
    """A = (R - mean_j R) / (std_j R + 1e-6), std with ddof 1 (GRPO, arXiv 2402.03300).

    Computed in fp64; the result is fp32, or fp64 if the rewards are. A group whose largest reward equals its smallest
    gives exactly 0: there the plain formula divides rounding noise by 1e-6.
    """
    return _centred(rewards, _compared(rewards).std(dim=1, keepdim=True) + DELTA)


def batch_relative(rewards: Float[Tensor, "prompts group"]) -> Float[Tensor, "prompts group"]:
    """A = (R - mean_j R) / (std R + 1e-6), std over all samples of the step (ddof 1).

    Groups keep their relative spreads (Flow-GRPO's global std, arXiv 2505.05470).
    """
    return _centred(rewards, _compared(rewards).std() + DELTA)


def max_std_relative(rewards: Float[Tensor, "prompts group"]) -> Float[Tensor, "prompts group"]:
    """A = (R - mean_j R) / (max_i std_j R_i + 1e-6): the group with the largest std gets std 1, the others less."""
    return _centred(rewards, _compared(rewards).std(dim=1).max() + DELTA)


def mean_subtracted(rewards: Float[Tensor, "prompts group"]) -> Float[Tensor, "prompts group"]:
    """A = R - mean_j R, in the reward's own units (Dr. GRPO, arXiv 2503.20783)."""
    return _centred(rewards, torch.ones((), dtype=torch.float64))


def win_rate_relative(rewards: Float[Tensor, "prompts group"]) -> Float[Tensor, "prompts group"]:
    """`group_relative` of the within-group win rates (Pref-GRPO, arXiv 2508.20751), which depend on the order alone."""
    return group_relative(win_rates(rewards))


def win_rates(rewards: Float[Tensor, "prompts group"]) -> Float[Tensor, "prompts group"]:
    """Share of the other samples of its group that each sample beats, in [0, 1]; a tie is half a win."""
    exact = _compared(rewards)
    wins_minus_losses = torch.sign(exact[:, :, None] - exact[:, None, :]).sum(dim=2)
    return (0.5 + wins_minus_losses / (2 * (rewards.shape[1] - 1))).to(result_dtype(rewards))


NORMALISERS: Table[Callable[[Tensor], Tensor]] = Table(
    {
        "group": group_relative,
        "global": batch_relative,
        "max_std": max_std_relative,
        "none": mean_subtracted,
        "win_rate": win_rate_relative,
    }
)


def result_dtype(rewards: Tensor) -> torch.dtype:
    """The dtype of what is computed in fp64 from rewards: theirs, fp32 at least."""
    return torch.float64 if rewards.dtype == torch.float64 else torch.float32


def _compared(rewards: Float[Tensor, "prompts group"]) -> Float[Tensor, "prompts group"]:
    if rewards.shape[1] < 2:
        raise ValueError(f"group of {rewards.shape[1]}: an advantage compares samples of one prompt; use 2 or more")
    return rewards.double()


def _centred(rewards: Float[Tensor, "prompts group"], divisor: Tensor) -> Float[Tensor, "prompts group"]:
    """(R - mean_j R) / divisor in the rewards' dtype, fp32 at least, and exactly 0 in groups of equal rewards."""
    exact = _compared(rewards)
    advantage = (exact - exact.mean(dim=1, keepdim=True)) / divisor
    return advantage.masked_fill(equal_groups(rewards)[:, None], 0.0).to(result_dtype(rewards))


def equal_groups(rewards: Float[Tensor, "prompts group"]) -> Bool[Tensor, "prompts"]:
    """True where a group's largest reward equals its smallest: the group has no signal."""
    return rewards.amax(dim=1) == rewards.amin(dim=1)


def weighted_sum(
    advantages_by_name: Mapping[str, Float[Tensor, "prompts group"]], weights: Mapping[str, float]
) -> Float[Tensor, "prompts group"]:
    """sum_r weights[r] A_r over the rewards r. Raises ValueError unless the names are equal."""
    if not advantages_by_name or set(advantages_by_name) != set(weights):
        raise ValueError(
            f"advantages of {sorted(advantages_by_name)} but weights of {sorted(weights)}: give each reward one weight"
        )
    return torch.stack([weights[name] * advantage for name, advantage in advantages_by_name.items()]).sum(dim=0)


def batch_standardised_sum(
    advantages_by_name: Mapping[str, Float[Tensor, "prompts group"]], weights: Mapping[str, float]
) -> Float[Tensor, "prompts group"]:
    """S / (std S + 1e-6), S the weighted sum and std over the batch (ddof 1): GDPO's last step (arXiv 2601.05242).

    The batch mean of S is not subtracted: it is 0 but for rounding, because each A_r has mean 0 in each group, and
    rounding must not give an advantage to groups without signal. Only the weights' proportions matter.
    """
    total = weighted_sum(advantages_by_name, weights)
    return total / (total.std() + DELTA)


COMBINATIONS: Table[Callable[[Mapping[str, Tensor], Mapping[str, float]], Tensor]] = Table(
    {
        "weighted_sum": weighted_sum,
        "gdpo": batch_standardised_sum,
    }
)


def clip_advantages(
    advantage: Float[Tensor, "prompts group"], limit: float | Float[Tensor, "prompts #group"]
) -> Float[Tensor, "prompts group"]:
    """Advantages clamped to [-limit, limit]; a tensor gives each prompt its own limit."""
    bound = torch.as_tensor(limit, dtype=advantage.dtype, device=advantage.device)
    if not bool((bound > 0).all()):
        raise ValueError(f"limit={limit}: advantages are clipped to [-limit, limit] with limit > 0")
    return torch.clamp(advantage, -bound, bound)


def averaged_below(
    advantage: Float[Tensor, "prompts group"], below: int, rescaled: bool
) -> Float[Tensor, "prompts group"]:
    """A_e = s mean_(i below e) A_i for each sample i below edge e of a tree: `below` neighbouring samples of a group.

    s = std_i A_i / std_e A_e where `rescaled`, so that all depths have the spread of the samples (ddof 1). On A of GRPO
    that is the depth-wise normalization of BranchGRPO (arXiv 2509.06040), and the trust in A stays. s is 1 for a single
    edge, and where edges differ by less than 1e-6 of the spread.
    """
    if below == 1:
        return advantage
    exact = advantage.double()
    edges = exact.unflatten(1, (-1, below)).mean(dim=2)
    if rescaled and edges.shape[1] > 1:
        spread, own = exact.std(dim=1, keepdim=True), edges.std(dim=1, keepdim=True)
        edges = edges * torch.where(own > DELTA * spread, spread / own, torch.ones_like(own))
    return edges.repeat_interleave(below, dim=1).to(advantage.dtype)


def best_and_worst(advantage: Float[Tensor, "prompts group"], n: int) -> Bool[Tensor, "prompts group"]:
    """True for the n best and the n worst samples of each group (DanceGRPO, arXiv 2505.07818).

    Equal advantages are ordered by their position in the group.

    Raises:
        ValueError: a group has fewer than 2 n samples.
    """
    group = advantage.shape[1]
    if not 1 <= n <= group // 2:
        raise ValueError(f"best_of={n} of a group of {group}: the n best and the n worst need 1 <= n <= {group // 2}")
    rank = advantage.argsort(dim=1, stable=True).argsort(dim=1, stable=True)
    return (rank < n) | (rank >= group - n)


def loss_scale(settings: AdvantageConfig, equal: Bool[Tensor, "prompts"], group: int) -> float:
    """Factor that turns the loss's mean over all samples into the mean over those that count.

    group / (2 best_of) if samples are left out, times prompts / (groups with signal) if groups without signal do not
    count. It is computed from the whole step, so it is exact however groups are spread over ranks.

    Args:
        equal: groups without signal.
    """
    scale = 1.0 if settings.best_of is None else group / (2 * settings.best_of)
    informative = int((~equal).sum())
    if settings.drop_zero_std and informative:
        scale *= len(equal) / informative
    return scale


@dataclass(frozen=True)
class FrameLayout:
    """How a causal VAE maps a video's frames to latent frames: one to the first, then `stride` to each.

    Attributes:
        given: latent frames at the start that an image fixes; they are not sampled and get no credit.

    Raises:
        ValueError: num_frames is not 1 more than a multiple of the stride.
    """

    num_frames: int
    fps: float
    stride: int
    given: int = 0

    def __post_init__(self) -> None:
        if self.stride < 1 or (self.num_frames - 1) % self.stride:
            raise ValueError(
                f"{self.num_frames} frames at a temporal stride of {self.stride}: a causal VAE has 1 + n * stride"
            )

    def weights(self, times: Float[Tensor, "scored"]) -> Float[Tensor, "scored latent_frames"]:
        """Weight of the score at each time, in seconds, in each sampled latent frame; columns sum to 1.

        Scores are interpolated linearly to all frames, constant before the first time and after the last one, and
        averaged over the frames of each latent frame.
        """
        known = times.double().cpu()
        at_frames = torch.ones(1, self.num_frames, dtype=torch.float64)
        if len(known) > 1:
            frames = torch.arange(self.num_frames, dtype=torch.float64) / self.fps
            right = torch.searchsorted(known, frames).clamp(1, len(known) - 1)
            share = ((frames - known[right - 1]) / (known[right] - known[right - 1])).clamp(0, 1)
            basis = torch.eye(len(known), dtype=torch.float64)
            at_frames = (1 - share) * basis[:, right - 1] + share * basis[:, right]
        rest = at_frames[:, 1:].unflatten(1, (-1, self.stride)).mean(dim=2) if self.num_frames > 1 else at_frames[:, 1:]
        return torch.cat([at_frames[:, :1], rest], dim=1)[:, self.given :]


def frame_credit(
    frame_scores: Float[Tensor, "prompts group scored"], times: Float[Tensor, "scored"], layout: FrameLayout
) -> Float[Tensor, "prompts group latent_frames"]:
    """z_{i,f} - mean_f z_i, where z_{i,f} is the score of latent frame f, standardised over the group."""
    scores = frame_scores.double() @ layout.weights(times).to(frame_scores.device)
    z = torch.stack([group_relative(of_frame) for of_frame in scores.unbind(dim=2)], dim=2)
    return z - z.mean(dim=2, keepdim=True)


def segment_credit(
    per_frame: Mapping[str, Float[Tensor, "prompts group _"]],
    times: Mapping[str, Float[Tensor, "_"] | None],
    weights: Mapping[str, float],
    layout: FrameLayout,
    gamma: float,
) -> dict[str, Float[Tensor, "prompts group latent_frames"]]:
    """gamma (z_{r,i,f} - mean_f z_{r,i}) of each reward r, to be added to A_{r,i}.

    Beyond the paper: it keeps a video's advantage as the mean over latent frames, and moves it towards the frames in
    which the sample beats its group. Rewards that score videos as a whole add nothing.

    Args:
        times: seconds of the scored frames, by reward name; None where a reward scores videos as a whole.
        gamma: weight of a frame's own z-score, at least 0.

    Raises:
        ValueError: no reward of weight above 0 scores frames.
    """
    credits = {
        name: (gamma * frame_credit(per_frame[name], of_reward, layout)).float()
        for name, of_reward in times.items()
        if of_reward is not None and weights[name] > 0
    }
    if not credits:
        raise ValueError(
            f"credit.kind is 'segment', but {sorted(times)} score videos as a whole; set it to 'video', or train on a "
            "reward that scores frames"
        )
    return credits
