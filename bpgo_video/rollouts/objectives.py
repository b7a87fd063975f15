"""What does a rollout teach? A table of objectives, each over what a rollout has to record for it."""

from __future__ import annotations

from collections.abc import Callable

from bpgo_video.learner.bpgo import GroupAdvantages
from bpgo_video.rollouts.forward_process import forward_objective
from bpgo_video.rollouts.replay import Objective, Setting, replay_objective

OBJECTIVES: dict[str, Callable[[Setting, GroupAdvantages, int], Objective]] = {
    "policy_gradient": replay_objective,
    "awm": forward_objective,
    "nft": forward_objective,
}
