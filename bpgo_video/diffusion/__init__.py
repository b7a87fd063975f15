"""Paths of diffusion as pure functions: noise levels, samplers as Gaussian steps, which steps train, flow matching.

The names below are the public ones (docs/api.md).
"""

from bpgo_video.diffusion.sde import SAMPLERS, Step, Transition, shifted_sigmas, steps_of, transition

__all__ = ["SAMPLERS", "Step", "Transition", "shifted_sigmas", "steps_of", "transition"]
