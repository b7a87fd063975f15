"""How does the pipeline's shipped scheduler sample? The same loop, with diffusers' solver where ours would step."""

from __future__ import annotations

from collections.abc import Callable, Collection
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch

from bpgo_video.config.bpgo import Config, ConfigError
from bpgo_video.policies import Policy
from bpgo_video.rollouts.rollout import Denoiser, Path
from bpgo_video.types import Guidance, Latents

EULERS_OWN = (  # Euler's steps on the family's noise levels, as tests/policies/test_families.py shows of each
    "FlowMatchEulerDiscreteScheduler",
    "CogVideoXDDIMScheduler",
)


@dataclass(frozen=True)
class ScheduledDenoiser(Denoiser):
    """A denoiser without stochastic steps whose ODE a diffusers scheduler of flow models solves.

    Attributes:
        scheduler: its timesteps set, and not used: it remembers the steps of a video.
    """

    scheduler: Any = None

    @torch.no_grad()
    def denoise(
        self,
        latents: Latents,
        guidance: Guidance,
        noise_of: Callable[[int], Latents],
        trained_steps: Collection[int] = (),
    ) -> Path:
        """From noise to data; only the data is kept."""
        scheduler = deepcopy(self.scheduler)
        for index, timestep in enumerate(scheduler.timesteps):
            velocity = self.velocity(latents, index, guidance)
            latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        unknown = torch.full((len(latents), len(scheduler.timesteps)), torch.nan, device=latents.device)
        return Path(latents[:, None], unknown, None)


def evaluation_denoiser(policy: Policy, config: Config) -> Denoiser:
    """What samples held-out videos, as `evaluation` says.

    Raises:
        ConfigError: `solver` is `shipped`, and the folder's scheduler cannot be driven by a policy's velocity.
    """
    wanted = config.evaluation
    shift = wanted.shift_or(config.sampler)
    settings: dict[str, Any] = {
        "policy": policy,
        "sampler": "ode",
        "eta": 0.0,
        "guidance_scale": wanted.guidance_scale,
        "guidance_scale_2": wanted.guidance_scale_2,
        "latents_dtype": torch.float32,
        "records_path": False,
    }
    own = policy.pipeline.scheduler
    if wanted.solver != "shipped" or type(own).__name__ in EULERS_OWN:
        solver = "euler" if wanted.solver == "shipped" else wanted.solver
        return Denoiser(sigmas=policy.sigmas(wanted.num_steps, config.video, shift), solver=solver, **settings)
    if not own.config.get("use_flow_sigmas"):
        raise ConfigError(
            f"evaluation.solver is 'shipped', but {policy.folder} ships a {type(own).__name__}, which does not take a "
            "velocity of rectified flow; set it to 'euler' or 'adams_bashforth'"
        )
    scheduler = own if shift is None else type(own).from_config(own.config, flow_shift=shift)
    scheduler = deepcopy(scheduler)
    scheduler.set_timesteps(wanted.num_steps)
    levels = scheduler.timesteps / own.config.num_train_timesteps  # whole timesteps, as the pipeline tells them
    return ScheduledDenoiser(sigmas=torch.cat([levels, levels.new_zeros(1)]), scheduler=scheduler, **settings)
