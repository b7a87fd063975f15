"""Where does a prior anchor come from? A table of sources; each gives the anchors of a batch by reward name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from bpgo_video.config import PriorConfig
from bpgo_video.types import PriorAnchor, PromptBatch

Source = Callable[[PriorConfig, PromptBatch, Mapping[str, str]], Mapping[str, PriorAnchor]]


def reference(prior: PriorConfig, prompts: PromptBatch, versions: Mapping[str, str]) -> Mapping[str, PriorAnchor]:
    """What tools/estimate_priors.py measured on the starting policy and stored with the prompts."""
    return prompts.priors


def constant(prior: PriorConfig, prompts: PromptBatch, versions: Mapping[str, str]) -> Mapping[str, PriorAnchor]:
    """One number for every prompt, from the recipe."""
    zeros = torch.zeros(len(prompts))
    return {
        name: PriorAnchor(zeros + prior.mean, zeros, zeros.long(), prior.scale, version)
        for name, version in versions.items()
    }


def none(prior: PriorConfig, prompts: PromptBatch, versions: Mapping[str, str]) -> Mapping[str, PriorAnchor]:
    """No anchor: plain GRPO."""
    return {}


PRIORS: dict[str, Source] = {"reference": reference, "constant": constant, "none": none}
