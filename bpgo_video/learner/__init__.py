"""The mathematics of BPGO on plain tensors: trust, transformed rewards and advantages, priors and surrogates.

The names below are the public ones (docs/api.md).
"""

from bpgo_video.learner.advantages import group_relative
from bpgo_video.learner.equations import contrastive_reward_transformation, reliability_adaptive_scaling
from bpgo_video.learner.one_reward import BPGOAdvantages, bpgo_advantages
from bpgo_video.types import PriorAnchor

__all__ = [
    "BPGOAdvantages",
    "PriorAnchor",
    "bpgo_advantages",
    "contrastive_reward_transformation",
    "group_relative",
    "reliability_adaptive_scaling",
]
