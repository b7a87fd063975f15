"""A table of sources of prior anchors; each gives the anchors of a batch by reward name.

Two kinds of question: a prior of a prompt's own samples by the starting policy (`reference`, `shrunk`) asks whether the
policy has improved on it; a shared one (`global`, `constant`, and `ema` until a prompt comes again) asks whether the
prompt is easy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from bpgo_video.config.bpgo import ConfigError
from bpgo_video.config.learner import PriorConfig
from bpgo_video.learner.running_priors import RunningReward, per_prompt, started
from bpgo_video.types import PriorAnchor, PromptBatch

STORED = ("reference", "shrunk")  # what bpgo-video priors measures
FROM_IMAGES = ("first_frame", "first_frame_centred")  # what asks for the rewards of conditioning images
RUNNING = ("ema", "global", "first_frame", "first_frame_centred")  # what takes numbers from the run's own rewards


@dataclass(frozen=True)
class PriorInputs:
    """What a source may look at.

    Attributes:
        versions: of the reward models, by reward name; anchors carry them.
        rewards: of this batch. Only a run's first batch is seen with them, as there is nothing else.
        running: averages over the batches before this one.
        first_frames: each reward of the prompts' conditioning images.
    """

    prompts: PromptBatch
    versions: Mapping[str, str]
    rewards: Mapping[str, Float[Tensor, "prompts group"]] = field(default_factory=dict)
    running: Mapping[str, RunningReward] = field(default_factory=dict)
    first_frames: Mapping[str, Float[Tensor, "prompts"]] = field(default_factory=dict)


Source = Callable[[PriorConfig, PriorInputs], Mapping[str, PriorAnchor]]


def stored(prior: PriorConfig, seen: PriorInputs) -> Mapping[str, PriorAnchor]:
    """What bpgo-video priors measured on the starting policy; for `shrunk`, shrunk as it was loaded."""
    return seen.prompts.priors


def constant(prior: PriorConfig, seen: PriorInputs) -> Mapping[str, PriorAnchor]:
    """One number for every prompt, from the recipe."""
    mean = torch.full((len(seen.prompts),), prior.mean)
    scale = prior.scale or 1.0
    return {name: PriorAnchor.without_samples(mean, scale, version) for name, version in seen.versions.items()}


def ema(prior: PriorConfig, seen: PriorInputs) -> Mapping[str, PriorAnchor]:
    """Each prompt's own moving average, and the one over all prompts until it was seen."""
    ids = seen.prompts.ids.tolist()
    return _running(prior, seen, lambda name, running: per_prompt(running, ids))


def over_all_prompts(prior: PriorConfig, seen: PriorInputs) -> Mapping[str, PriorAnchor]:
    """One moving average over all prompts."""
    count = len(seen.prompts)
    return _running(prior, seen, lambda name, running: torch.full((count,), running["mean"], dtype=torch.float64))


def first_frame(prior: PriorConfig, seen: PriorInputs) -> Mapping[str, PriorAnchor]:
    """What the conditioning image itself earns: the paper's prior for image-to-video.

    Raises:
        ConfigError: the prompts carry no image.
    """
    if missing := sorted(set(seen.versions) - set(seen.first_frames)):
        raise ConfigError(f"prior.kind is 'first_frame', but no conditioning image was scored by {missing}")
    return _running(prior, seen, lambda name, running: seen.first_frames[name].double().cpu())


def first_frame_centred(prior: PriorConfig, seen: PriorInputs) -> Mapping[str, PriorAnchor]:
    """What the conditioning image earns, less what images earn more than videos on average over the run.

    A still picture has no blur and no drift, so that it earns more than a video of it, and an anchor above all videos
    calls all of them failures. What is left is whether this prompt's picture earns more than other prompts' do. Beyond
    the paper.
    """
    images = first_frame(prior, seen)
    gaps = {name: level_of(seen, name) - level_of(seen, image_key(name)) for name in images}
    return {name: replace(anchor, mean=anchor.mean + gaps[name]) for name, anchor in images.items()}


def level_of(seen: PriorInputs, name: str) -> float:
    """The run's average of a reward, or the first batch's."""
    running = seen.running.get(name)
    return running["mean"] if running else float(seen.rewards[name].double().mean())


def image_key(name: str) -> str:
    """Under which a reward's scores of conditioning images are averaged beside those of videos."""
    return f"{name} of images"


def none(prior: PriorConfig, seen: PriorInputs) -> Mapping[str, PriorAnchor]:
    """No anchor: plain GRPO."""
    return {}


PRIORS: dict[str, Source] = {
    "reference": stored,
    "shrunk": stored,
    "ema": ema,
    "global": over_all_prompts,
    "first_frame": first_frame,
    "first_frame_centred": first_frame_centred,
    "constant": constant,
    "none": none,
}


def _running(
    prior: PriorConfig, seen: PriorInputs, mean: Callable[[str, RunningReward], Float[Tensor, "prompts"]]
) -> dict[str, PriorAnchor]:
    """Anchors with the run's s_ref; any scale does while no group has had two different rewards."""
    anchors = {}
    for name, version in seen.versions.items():
        running = seen.running.get(name) or started(seen.rewards[name], prior.scale)
        anchors[name] = PriorAnchor.without_samples(mean(name, running), running["spread"] or 1.0, version)
    return anchors
