"""The table of priors, each a function that gives the anchors of a batch by reward name, and what they are made of.

A prior measured on a prompt's own samples by the starting policy (`reference`, `shrunk`) tests whether the policy has
improved on that prompt. A shared prior (`global`, `constant`, and `ema` until a prompt is sampled again) tests whether
the prompt is easy.

Running averages are plain numbers, which checkpoints store. Every rank computes them from the same gathered rewards in
float64, so they are equal on all ranks and exact after a resume.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypedDict

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bpgo_video.config.learner import PriorConfig
from bpgo_video.learner.advantages import equal_groups
from bpgo_video.types import PriorAnchor, PromptBatch, Table

STORED = ("reference", "shrunk")  # measured by bpgo-video priors
FROM_IMAGES = ("first_frame", "first_frame_centred")  # need the rewards of conditioning images
RUNNING = ("ema", "global", "first_frame", "first_frame_centred")  # need averages over the run


class RunningReward(TypedDict):
    """Moving averages of one reward.

    Attributes:
        mean: of the groups' mean rewards, over all prompts.
        spread: s_ref, of the pooled within-group standard deviation; None until the rewards of a group differ.
        prompts: prompt id -> average of that prompt's group means.
    """

    mean: float
    spread: float | None
    prompts: dict[int, float]


RunningRewards = dict[str, RunningReward]  # by reward name


@dataclass(frozen=True)
class PriorInputs:
    """What priors are computed from.

    Attributes:
        versions: of the reward models, by reward name; anchors carry them.
        rewards: of this batch; only the first batch of a run uses them, for want of averages.
        running: averages over the batches before this one.
        image_rewards: each reward of the prompts' conditioning images.
    """

    prompts: PromptBatch
    versions: Mapping[str, str]
    rewards: Mapping[str, Float[Tensor, "prompts group"]] = field(default_factory=dict)
    running: Mapping[str, RunningReward] = field(default_factory=dict)
    image_rewards: Mapping[str, Float[Tensor, "prompts"]] = field(default_factory=dict)


Anchors = Mapping[str, PriorAnchor]


def stored(prior: PriorConfig, inputs: PriorInputs) -> Anchors:
    """The anchors that bpgo-video priors measured on the starting policy; for `shrunk`, shrunk at loading."""
    return inputs.prompts.priors


def constant(prior: PriorConfig, inputs: PriorInputs) -> Anchors:
    """One number for every prompt, from the recipe."""
    mean = torch.full((len(inputs.prompts),), prior.mean)
    scale = prior.scale or 1.0
    return {name: PriorAnchor.without_samples(mean, scale, version) for name, version in inputs.versions.items()}


def ema(prior: PriorConfig, inputs: PriorInputs) -> Anchors:
    """Each prompt's own moving average; for new prompts the average over all prompts."""
    ids = inputs.prompts.ids.tolist()

    def means(name: str, running: RunningReward) -> Tensor:
        return torch.tensor([running["prompts"].get(id_, running["mean"]) for id_ in ids], dtype=torch.float64)

    return _with_running_scale(prior, inputs, means)


def over_all_prompts(prior: PriorConfig, inputs: PriorInputs) -> Anchors:
    """One moving average over all prompts."""
    count = len(inputs.prompts)
    return _with_running_scale(
        prior, inputs, lambda name, running: torch.full((count,), running["mean"], dtype=torch.float64)
    )


def first_frame(prior: PriorConfig, inputs: PriorInputs) -> Anchors:
    """The reward of the conditioning image itself: the paper's prior for image-to-video.

    Raises:
        ValueError: the prompts have no image.
    """
    if missing := sorted(set(inputs.versions) - set(inputs.image_rewards)):
        raise ValueError(f"prior.kind is 'first_frame', but no conditioning image was scored by {missing}")
    return _with_running_scale(prior, inputs, lambda name, running: inputs.image_rewards[name].double().cpu())


def first_frame_centred(prior: PriorConfig, inputs: PriorInputs) -> Anchors:
    """The reward of the conditioning image, minus the average excess of images over videos in this run.

    Beyond the paper: a still image has no blur and no drift, so its reward is above that of its videos, and an anchor
    above all videos makes all of them failures. The difference between prompts remains.
    """
    images = first_frame(prior, inputs)
    images = first_frame(prior, inputs)
    gaps = {name: _level(inputs, name) - _level(inputs, image_key(name)) for name in images}
    return {name: replace(anchor, mean=anchor.mean + gaps[name]) for name, anchor in images.items()}


def none(prior: PriorConfig, inputs: PriorInputs) -> Anchors:
    """No anchor: plain GRPO."""
    return {}


PRIORS: Table[Callable[[PriorConfig, PriorInputs], Anchors]] = Table(
    {
        "reference": stored,
        "shrunk": stored,
        "ema": ema,
        "global": over_all_prompts,
        "first_frame": first_frame,
        "first_frame_centred": first_frame_centred,
        "constant": constant,
        "none": none,
    }
)


def image_key(name: str) -> str:
    """Key of the running average of a reward's scores of conditioning images."""
    return f"{name} of images"


def _level(inputs: PriorInputs, name: str) -> float:
    """The run's average of a reward, or the first batch's."""
    running = inputs.running.get(name)
    return running["mean"] if running else float(inputs.rewards[name].double().mean())


def _with_running_scale(
    prior: PriorConfig, inputs: PriorInputs, means: Callable[[str, RunningReward], Float[Tensor, "prompts"]]
) -> dict[str, PriorAnchor]:
    """Anchors with the run's s_ref, or 1 until the rewards of a group differ: any scale gives the same then."""
    anchors = {}
    for name, version in inputs.versions.items():
        running = inputs.running.get(name) or first_average(inputs.rewards[name], prior.scale)
        anchors[name] = PriorAnchor.without_samples(means(name, running), running["spread"] or 1.0, version)
    return anchors


def first_average(rewards: Float[Tensor, "prompts group"], scale: float | None) -> RunningReward:
    """The averages before a run's first batch: that batch's mean and spread, and no prompts.

    Args:
        scale: a first s_ref instead of the batch's.
    """
    return RunningReward(mean=float(rewards.double().mean()), spread=scale or pooled_spread(rewards), prompts={})


def pooled_spread(rewards: Float[Tensor, "prompts group"]) -> float | None:
    """sqrt(mean_i s_i^2), s_i the standard deviation of group i (ddof 1); None if the rewards of no group differ."""
    if bool(equal_groups(rewards).all()):
        return None
    return float(rewards.double().var(dim=1).mean().sqrt())


def update_running_rewards(
    running: Mapping[str, RunningReward],
    ids: Sequence[int],
    rewards_by_name: Mapping[str, Float[Tensor, "prompts group"]],
    decay: float,
    scale: float | None,
) -> RunningRewards:
    """The averages after a batch: m <- decay m + (1 - decay) new, for mean, spread and each prompt of the batch.

    A new prompt starts at its group's mean; a batch without spread does not change s_ref.

    Args:
        scale: the first s_ref; None takes the batch's.
    """

    def moved(old: float | None, new: float) -> float:
        return new if old is None else decay * old + (1 - decay) * new

    averages = {}
    for name, rewards in rewards_by_name.items():
        before = running.get(name) or first_average(rewards, scale)
        means, spread = rewards.double().mean(dim=1), pooled_spread(rewards)
        prompts = {id_: moved(before["prompts"].get(id_), mean) for id_, mean in zip(ids, means.tolist(), strict=True)}
        averages[name] = RunningReward(
            mean=moved(before["mean"], float(means.mean())),
            spread=before["spread"] if spread is None else moved(before["spread"], spread),
            prompts={**before["prompts"], **prompts},
        )
    return averages


def reference_moments(rewards: Float[Tensor, "groups samples"]) -> tuple[float, float, int, float]:
    """Mean, std, count and spread of a prompt's reference samples: groups of two or more, fp64, ddof 1.

    Sample k of group g earns mu + a_g + e_gk: what its group shares, its start and the choice of steps, and the noise
    of these steps, independent with variances B and W.

    Returns:
        mean: over all samples.
        std, count: std^2/count is the sampling variance of the mean. Of G groups of m it is (B + W/m)/G, and B + W/m is
            what the variance of the G group means estimates, so they are those of the group means; of a single group
            those of its samples.
        spread: s_i = sqrt(mean_g var_k R_gk), which estimates sqrt(W), the deviation within a training group.
    """
    rewards = rewards.double()
    independent = rewards.mean(dim=1) if len(rewards) > 1 else rewards[0]
    spread = rewards.var(dim=1).mean().sqrt()
    return float(rewards.mean()), float(independent.std()), len(independent), float(spread)


def pooled_scale(spreads: Iterable[float]) -> float:
    """s_ref = sqrt(mean_i s_i^2) over prompts, whatever their order."""
    squares = [spread**2 for spread in spreads]
    return math.sqrt(math.fsum(squares) / len(squares))


def shrunk_means(
    mean: Float[Tensor, "prompts"], std: Float[Tensor, "prompts"], count: Int[Tensor, "prompts"]
) -> Float[Tensor, "prompts"]:
    """p_i = (K R_i/v_i + p_g/tau2) / (K/v_i + 1/tau2), fp64: the empirical-Bayes form of James and Stein (1961).

    R_i is the mean of prompt i's samples, v_i/K its sampling variance (`reference_moments`), p_g the mean of R_i, and
    tau2 = max(0, var_i R_i - mean_i v_i/K) the variance between prompts that sampling does not explain (ddof 1). At
    tau2 = 0 all anchors are p_g. v_i is the mean of the prompt's own variance and that of all prompts: K samples can
    be equal by chance, and a variance of 0 would claim certainty.

    Args:
        std: of what each prompt's mean averages, ddof 1; not all 0.
        count: how many it averages, 1 or more.
    """
    mean, variance, count = mean.double(), std.double().square(), count.double()
    sampling = (variance + variance.mean()) / 2 / count  # v_i / K
    if len(mean) < 2:
        return mean
    tau2 = (mean.var() - sampling.mean()).clamp(min=0)
    weight = tau2 / (tau2 + sampling)  # the formula times v_i tau2 / K, which also holds at tau2 = 0
    return weight * mean + (1 - weight) * mean.mean()
