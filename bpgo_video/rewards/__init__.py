"""Reward models: the contract in base.py, several at once in suite.py, one model a file."""

from bpgo_video.rewards.base import Clips, FrameSampling, FrameScores, RewardModel

__all__ = ["Clips", "FrameSampling", "FrameScores", "RewardModel"]
