"""Reward models: base.py states the contract, building.py lists the models, suite.py scores with several at once."""

from bpgo_video.rewards.base import Clips, FrameSampling, FrameScores, RewardModel

__all__ = ["Clips", "FrameSampling", "FrameScores", "RewardModel"]
