"""Preferences within a group: which of two samples is better, how probably, DPO's loss on such pairs, and KTO's.

Let y = t + n be a sample's score within its group, t ~ N(0, tau^2) the score without noise, n ~ N(0, nu^2) the noise,
rho = tau^2/(tau^2 + nu^2) the reliability and A = y/sqrt(tau^2 + nu^2) the z-score. The posterior of the clean z-score
is that of a normal mean with a normal prior:

    t/tau | A  ~  N(sqrt(rho) A, 1 - rho)

Samples err independently, so the difference of two has mean sqrt(rho) (A_w - A_l) and variance 2 (1 - rho), and

    p = P(t_w > t_l | A) = Phi(sqrt(rho) (A_w - A_l) / sqrt(2 (1 - rho)))

Several rewards that err independently add up: S = sum_r weight_r t_r/tau_r has the mean sum_r weight_r sqrt(rho_r) A_r
and the variance sum_r weight_r^2 (1 - rho_r). A reward of unknown reliability counts as exact, rho = 1; if all are, p
is 1, which is plain DPO.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import softplus

from bpgo_video.types import Loss


@dataclass(frozen=True)
class Pairs:
    """Pairs of samples of each group, best first.

    Attributes:
        winner, loser: positions in the group.
        probability: p, that the winner is truly better: above 1/2; nan for equal samples, which are no pair.
    """

    winner: Int[Tensor, "prompts pairs"]
    loser: Int[Tensor, "prompts pairs"]
    probability: Float[Tensor, "prompts pairs"]


@dataclass(frozen=True)
class Posterior:
    """What a step's rewards tell of their samples' clean scores S: independent normal distributions.

    Attributes:
        variance: of each sample of a group; 0 if no reward's reliability is known.
    """

    mean: Float[Tensor, "prompts group"]
    variance: Float[Tensor, "prompts"]

    def best_against_worst(self, count: int) -> Pairs:
        """The best sample of each group against the worst, the second best against the second worst, `count` pairs.

        Equal samples are ordered by their position in the group.
        """
        order = self.mean.argsort(dim=1, stable=True)
        winner, loser = order.flip(1)[:, :count], order[:, :count]
        ahead = self.mean.gather(1, winner) - self.mean.gather(1, loser)
        probability = torch.special.ndtr(ahead / (2 * self.variance[:, None]).sqrt())  # ahead/0 is inf, or nan for 0/0
        return Pairs(winner, loser, probability.masked_fill(ahead == 0, torch.nan))


def posterior_of(
    advantages: Mapping[str, Float[Tensor, "prompts group"]],
    weights: Mapping[str, float],
    reliability: Mapping[str, Float[Tensor, "prompts"]],
) -> Posterior:
    """The posterior of S, fp64.

    Args:
        advantages: z-scores A of each reward within its groups, before any trust.
        weights: by reward name.
        reliability: rho in [0, 1] of the rewards where it is known.
    """
    exact = {name: values.double() for name, values in advantages.items()}
    known = {name: reliability[name].double() if name in reliability else torch.ones_like(exact[name][:, 0])
             for name in exact}  # fmt: skip
    means = [weights[name] * known[name].sqrt()[:, None] * values for name, values in exact.items()]
    variances = [weights[name] ** 2 * (1 - rho) for name, rho in known.items()]
    return Posterior(torch.stack(means).sum(dim=0), torch.stack(variances).sum(dim=0))


def dpo_loss(
    gain: Float[Tensor, "pairs 2"], probability: Float[Tensor, "pairs"], beta: float, scale: float = 1.0
) -> Loss:
    """mean [-p log sigmoid(z) - (1 - p) log sigmoid(-z)],   z = beta/2 (gain_w - gain_l)

    p = 1 is Diffusion-DPO (arXiv 2311.12908) on velocities with a constant beta, Flow-DPO (arXiv 2501.13918). p below 1
    are the soft labels of conservative DPO (E. Mitchell, 2023), here one for each pair: the loss is smallest where
    sigmoid(z) = p.

    Args:
        gain: |v_ref - target|^2 - |v - target|^2 of winner and loser: how much better than the reference the policy
            predicts them.
        probability: p; nan where there is no pair. Such rows add 0 to the loss and to all metrics, but their number
            counts in the means.
        scale: factor of loss and metrics, for rows that fill up a batch.
    """
    margin, counts = beta / 2 * (gain[:, 0] - gain[:, 1]), scale * probability.isfinite()
    p = probability.nan_to_num(0.5)
    loss = counts * (p * softplus(-margin) + (1 - p) * softplus(margin))
    found = {"probability": p, "margin": margin.detach(), "accuracy": (margin > 0).to(p), "pairs": torch.ones_like(p)}
    return Loss(loss.mean(), {f"preference/{name}": (counts * values).mean() for name, values in found.items()})


def kto_loss(
    gain: Float[Tensor, "samples"],
    divergence: Float[Tensor, "samples"],
    advantage: Float[Tensor, "samples"],
    trust: Float[Tensor, "samples"],
    beta: float,
) -> Loss:
    """mean w (1 - sigmoid(s z)),   z = beta/2 (gain - divergence),   s = sign(A)

    Diffusion-KTO (arXiv 2404.04465, Eq 8) with the utility of Kahneman and Tversky: a sample above its group (s = 1) is
    desirable, one below is not, and one at its mean adds 0. beta/2 gain is the implicit reward and beta/2 divergence
    the reference point beta KL, here in closed form at each sample, where the paper averages log-ratios of a batch.

    Args:
        gain: |v_ref - target|^2 - |v - target|^2.
        divergence: |v - v_ref|^2, the KL of transitions in units of `gain`; it has no gradient.
        trust: w of the sample's group.
    """
    sign = advantage.sign()
    margin = beta / 2 * (gain - divergence.detach())
    utility = torch.sigmoid(sign * margin)
    loss = trust * sign.abs() * (1 - utility)
    found = {"utility": utility.detach(), "margin": (sign * margin).detach(), "desirable": (advantage > 0).to(gain)}
    return Loss(loss.mean(), {f"preference/{name}": values.mean() for name, values in found.items()})
