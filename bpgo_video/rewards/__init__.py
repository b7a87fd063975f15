"""Reward models: base.py is the contract, reward.py the table of models, suite.py scores with several of them."""

from bpgo_video.rewards.base import Clips, FrameSampling, FrameScores, RewardModel

__all__ = ["Clips", "FrameSampling", "FrameScores", "RewardModel"]
