"""BPGO on plain tensors: trust, transformed rewards, advantages, priors and losses.

`equations.py` has the method on one reward. The names below are public (docs/api.md).
"""

from bpgo_video.learner.advantages import group_relative
from bpgo_video.learner.equations import (
    BPGOAdvantages,
    bpgo_advantages,
    contrastive_reward_transformation,
    reliability_adaptive_scaling,
)
from bpgo_video.types import PriorAnchor

__all__ = [
    "BPGOAdvantages",
    "PriorAnchor",
    "bpgo_advantages",
    "contrastive_reward_transformation",
    "group_relative",
    "reliability_adaptive_scaling",
]
