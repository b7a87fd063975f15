"""Rectified flow as pure functions: schedules, samplers, trained steps, flow matching.

The names below are public (docs/api.md).
"""

from bpgo_video.diffusion.sde import SAMPLERS, Step, Transition, shifted_sigmas, steps_of, transition

__all__ = ["SAMPLERS", "Step", "Transition", "shifted_sigmas", "steps_of", "transition"]
