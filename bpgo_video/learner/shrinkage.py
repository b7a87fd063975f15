"""What does a prompt really earn, if only a few of its samples were scored? Means drawn towards each other."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor


def shrunk_means(
    mean: Float[Tensor, "prompts"], std: Float[Tensor, "prompts"], count: Int[Tensor, "prompts"]
) -> Float[Tensor, "prompts"]:
    """p_i = (K R_i/v_i + p_g/tau2) / (K/v_i + 1/tau2), fp64: the empirical-Bayes form of James and Stein (1961).

    R_i, K and v_i are mean, number and variance of prompt i's samples, p_g the mean of R_i, and
    tau2 = max(0, var_i R_i - mean_i v_i/K) the variance between prompts that sampling does not explain (ddof 1). At
    tau2 = 0 all anchors are p_g. v_i is the mean of the prompt's own variance and of all prompts': K samples can agree
    by chance, and a variance of 0 would claim certainty.

    Args:
        std: of each prompt's samples, ddof 1; not all 0.
        count: samples per prompt, 1 or more.
    """
    mean, own, count = mean.double(), std.double().square(), count.double()
    sampling = (own + own.mean()) / 2 / count  # v_i / K
    if len(mean) < 2:
        return mean
    tau2 = (mean.var() - sampling.mean()).clamp(min=0)
    trusted = tau2 / (tau2 + sampling)  # the formula times v_i tau2 / K, which also stands at tau2 = 0
    return trusted * mean + (1 - trusted) * mean.mean()
