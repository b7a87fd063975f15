"""How a run's videos differ from those that its policy is published for, and is used for afterwards.

A policy that learned from short or small videos in few steps need not have learned anything about long or large ones.
"""

from __future__ import annotations

from collections.abc import Iterator

from bpgo_video.config.bpgo import Config
from bpgo_video.policies import Policy

SIZE = ("num_frames", "height", "width")


def differences(config: Config, policy: Policy) -> Iterator[str]:
    """A line for the size of videos, and one for the steps of evaluations, if they are not the pipeline's."""
    defaults, video, evaluation = policy.pipeline_defaults(), config.video, config.evaluation
    size = {name: defaults[name] for name in SIZE if isinstance(defaults.get(name), int)}
    if any(getattr(video, name) != value for name, value in size.items()):
        published = described(**{name: getattr(video, name) for name in SIZE} | size)
        own = described(video.num_frames, video.height, video.width)
        yield (
            f"training videos are {own}, and {policy.pipeline_name} makes {published} by default: what is learned at "
            "one size need not hold at another. Before you rely on it, compare the trained and the starting model at "
            "the size that you use (bpgo-video generate --num-frames --height --width)"
        )
    steps = defaults.get("num_inference_steps")
    states_levels = bool(evaluation.sigmas_or(config.sampler))  # of a policy for few steps
    if evaluation.rewards and evaluation.num_steps != steps and not states_levels:
        yield (
            f"evaluation.num_steps is {evaluation.num_steps}, and {policy.pipeline_name} takes {steps} steps by "
            "default: set it to the number that you use"
        )


def described(num_frames: int, height: int, width: int) -> str:
    return f"{num_frames} frame{'s' * (num_frames != 1)} of {height} x {width}"
