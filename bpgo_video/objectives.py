"""What does a rollout teach? A table of objectives, each over what a rollout has to record for it."""

from __future__ import annotations

from collections.abc import Callable

from bpgo_video.bpgo import GroupAdvantages
from bpgo_video.config import Config
from bpgo_video.forward_process import forward_objective
from bpgo_video.policies import Policy
from bpgo_video.replay import Objective, replay_objective
from bpgo_video.types import Conditioning, PromptBatch

Build = Callable[[Policy, Config, PromptBatch, Conditioning, GroupAdvantages, int], Objective]

OBJECTIVES: dict[str, Build] = {
    "policy_gradient": replay_objective,
    "awm": forward_objective,
    "nft": forward_objective,
}
