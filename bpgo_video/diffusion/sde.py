"""Noise schedules and samplers of rectified flow.

    latents = (1 - sigma) data + sigma noise,   velocity = noise - data,   sigma falls from 1 to 0

A sampler maps (velocity, latents, step, eta) to a Gaussian `Transition`. At eta = 0 every sampler is the Euler step of
the probability-flow ODE. Rollout and replay call the same function.

The stochastic samplers keep the ODE's marginals only as the number of steps grows. On Gaussian data of variance .25
(exact velocity, shift 3), flow_sde at eta .7 ends at .67 of the variance after 8 steps and at .84 after 20; cps never
exceeds .72.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bpgo_video.types import Latents, Table, Velocity

TRUNCATED_STD = 0.45  # largest std of one step of `truncated` (arXiv 2510.22200)
TRAIN_TIMESTEPS = 1000  # Wan's num_train_timesteps: the last sigma before 0 is the shifted 1/1000


@dataclass(frozen=True)
class Step:
    """One interval of a schedule, in 0-dim fp64 tensors; in fp32 the coefficients would cancel at the schedule's ends.

    Attributes:
        sigma: noise level at the start, in (0, 1].
        next_sigma: noise level at the end, in [0, sigma).
        sigma_g: noise level in 1/(1 - sigma_g). It equals sigma except on the first step, where sigma is (nearly) 1 and
            the quotient would be infinite: there it is next_sigma.
    """

    sigma: Float[Tensor, ""]
    next_sigma: Float[Tensor, ""]
    sigma_g: Float[Tensor, ""]

    @property
    def dt(self) -> Float[Tensor, ""]:
        """next_sigma - sigma, negative."""
        return self.next_sigma - self.sigma


@dataclass(frozen=True)
class Transition:
    """x' ~ N(mean, std^2), the result of one denoising step; std is 0 for a deterministic step."""

    mean: Latents
    std: Float[Tensor, ""]

    @property
    def is_deterministic(self) -> bool:
        return bool(self.std == 0)

    def sample(self, noise: Latents) -> Latents:
        """mean + std noise, in the mean's dtype."""
        return self.mean + self.std * noise.to(self.mean.dtype)

    def repeated(self, times: int) -> Transition:
        """Each sample's transition so many times: of the children of a node."""
        return self if times == 1 else Transition(self.mean.repeat_interleave(times, dim=0), self.std)

    def log_prob(self, next_latents: Latents) -> Float[Tensor, "samples"]:
        """log N(x'; mean, std^2), averaged (not summed) over latent dimensions, in the mean's dtype.

        The usual clip ranges of 1e-5 to 1e-3 assume this average.

        Raises:
            ValueError: the step is deterministic.
        """
        return self._log_density(next_latents).flatten(1).mean(dim=1)

    def frame_log_prob(self, next_latents: Latents) -> Float[Tensor, "samples latent_frames"]:
        """`log_prob` of each latent frame, averaged over the frame's dimensions."""
        return self._log_density(next_latents).mean(dim=(1, 3, 4))

    def _log_density(self, next_latents: Latents) -> Latents:
        if self.is_deterministic:
            raise ValueError(
                "std is 0: a deterministic transition has no density; train stochastic steps only (eta > 0, not the "
                "last step, not the ode sampler)"
            )
        error = (next_latents.to(self.mean.dtype) - self.mean) / self.std
        return -0.5 * error.square() - self.std.log() - 0.5 * math.log(2 * math.pi)


def joined(transitions: Sequence[Transition]) -> Transition:
    """The transitions of several batches of samples at the same step."""
    if len(transitions) == 1:
        return transitions[0]
    return Transition(torch.cat([one.mean for one in transitions]), transitions[0].std)


Sampler = Callable[[Velocity, Latents, Step, float], Transition]


def flow_shift(sigmas: Float[Tensor, "*points"], shift: float) -> Float[Tensor, "*points"]:
    """sigma' = shift sigma / (1 + (shift - 1) sigma). A shift above 1 spends more steps at high noise (Wan: 3, 5)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def shifted_sigmas(num_steps: int, shift: float) -> Float[Tensor, "points"]:
    """The num_steps + 1 noise levels of diffusers' FlowMatchEulerDiscreteScheduler(shift=shift), in fp32.

    Levels are evenly spaced from 1 to flow_shift(1/1000), then shifted, then 0 is appended. Like diffusers, this shifts
    the smallest level twice.

    Raises:
        ValueError: num_steps is below 1, or shift is not positive.
    """
    if num_steps < 1 or not shift > 0:
        raise ValueError(f"num_steps={num_steps}, shift={shift}: a schedule needs num_steps >= 1 and shift > 0")
    smallest = flow_shift(torch.tensor(1 / TRAIN_TIMESTEPS), shift).item()
    sigmas = flow_shift(torch.linspace(1, smallest, num_steps, dtype=torch.float64), shift)
    return torch.cat([sigmas, sigmas.new_zeros(1)]).float()


def steps_of(sigmas: Float[Tensor, "points"]) -> list[Step]:
    """The intervals of a schedule.

    Raises:
        ValueError: the levels do not fall strictly within [1, 0].
    """
    levels = sigmas.double()
    if len(levels) < 2 or not bool((levels.diff() < 0).all()) or levels[0] > 1 or levels[-1] < 0:
        raise ValueError(f"sigmas={levels.tolist()}: a schedule has two or more levels that fall within [1, 0]")
    sigma_g = torch.cat([levels[1:2], levels[1:]])
    return [Step(levels[i], levels[i + 1], sigma_g[i]) for i in range(len(levels) - 1)]


def ode(velocity: Velocity, latents: Latents, step: Step, eta: float = 0.0) -> Transition:
    """x' = x + v dt

    Euler's method, as FlowMatchEulerDiscreteScheduler.step. eta is ignored; std is 0.
    """
    velocity, latents = _at_least_fp32(velocity), _at_least_fp32(latents)
    return Transition(mean=latents + step.dt * velocity, std=torch.zeros_like(step.sigma))


def flow_sde(velocity: Velocity, latents: Latents, step: Step, eta: float) -> Transition:
    """x' = x + [v + g^2/(2 sigma) (x + (1 - sigma) v)] dt + g sqrt|dt| eps,   g = eta sqrt(sigma/(1 - sigma_g))

    Flow-GRPO (arXiv 2505.05470), which uses eta = .7.
    """
    g = eta * (step.sigma / (1 - step.sigma_g)).sqrt()
    return _marginal_preserving(velocity, latents, step, variance=-(g**2) * step.dt)


def dance_sde(velocity: Velocity, latents: Latents, step: Step, eta: float) -> Transition:
    """x' = x + [v + g^2/(2 sigma) (x + (1 - sigma) v)] dt + g sqrt|dt| eps,   g = eta

    DanceGRPO (arXiv 2505.07818), which uses eta = .25 for video and .3 for images.
    """
    return _marginal_preserving(velocity, latents, step, variance=-(eta**2) * step.dt)


def sage(velocity: Velocity, latents: Latents, step: Step, eta: float) -> Transition:
    """x' = x + v dt - S/(2 sigma) (x + (1 - sigma) v) + sqrt(S) eps

    S = eta^2 [log((1 - next_sigma)/(1 - sigma)) + dt]

    SAGE (arXiv 2603.21872): S integrates Flow-GRPO's g^2 over the step. The integral diverges at sigma = 1; the first
    step uses S = eta^2 sigma |dt| / (1 - sigma_g) instead.
    """
    if bool(step.sigma_g == step.sigma):
        integral = torch.log1p(-step.dt / (1 - step.sigma)) + step.dt
    else:
        integral = -step.dt * step.sigma / (1 - step.sigma_g)
    return _marginal_preserving(velocity, latents, step, variance=eta**2 * integral)


def truncated(velocity: Velocity, latents: Latents, step: Step, eta: float) -> Transition:
    """flow_sde with std = min(g sqrt|dt|, .45), and g = std/sqrt|dt| in the drift as well.

    LongCat-Video (arXiv 2510.22200), which uses eta = 1.
    """
    g = eta * (step.sigma / (1 - step.sigma_g)).sqrt()
    std = (g * (-step.dt).sqrt()).clamp(max=TRUNCATED_STD)
    return _marginal_preserving(velocity, latents, step, variance=std**2)


def cps(velocity: Velocity, latents: Latents, step: Step, eta: float) -> Transition:
    """x' = (1 - next_sigma) data + sqrt(next_sigma^2 - std^2) noise + std eps,   std = next_sigma sin(eta pi/2)

    Coefficient-preserving sampling (arXiv 2509.05952), eta in [0, 1]. data = x - sigma v and noise = x + (1 - sigma) v
    are the velocity's predictions. It is exact for a single data point and loses variance everywhere else.

    Raises:
        ValueError: eta is outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta}: cps rotates the noise by eta * 90 degrees and needs 0 <= eta <= 1")
    velocity, latents = _at_least_fp32(velocity), _at_least_fp32(latents)
    data, noise = latents - step.sigma * velocity, latents + (1 - step.sigma) * velocity
    kept = step.next_sigma * math.cos(eta * math.pi / 2)  # sqrt(next_sigma^2 - std^2)
    std = step.next_sigma * math.sin(eta * math.pi / 2)
    return Transition(mean=(1 - step.next_sigma) * data + kept * noise, std=std)


def _marginal_preserving(velocity: Velocity, latents: Latents, step: Step, variance: Float[Tensor, ""]) -> Transition:
    """x' = x + v dt - variance/(2 sigma) (x + (1 - sigma) v) + sqrt(variance) eps

    x + (1 - sigma) v is the predicted noise, so (x + (1 - sigma) v)/sigma is minus the score. The drift cancels on
    average what eps adds: as dt -> 0 the marginals are the ODE's.
    """
    velocity, latents = _at_least_fp32(velocity), _at_least_fp32(latents)
    noise = latents + (1 - step.sigma) * velocity
    mean = latents + step.dt * velocity - variance / (2 * step.sigma) * noise
    return Transition(mean=mean, std=variance.sqrt())


def _at_least_fp32(latents: Latents) -> Latents:
    return latents if latents.dtype == torch.float64 else latents.float()


SAMPLERS: Table[Sampler] = Table(
    {
        "ode": ode,
        "flow_sde": flow_sde,
        "dance_sde": dance_sde,
        "cps": cps,
        "sage": sage,
        "truncated": truncated,
    }
)


def transition(
    sampler: str | Sampler, velocity: Velocity, latents: Latents, step: Step, eta: float = 0.0
) -> Transition:
    """One denoising step x' ~ N(mean, std^2), differentiable in velocity and latents.

    Args:
        sampler: a name in SAMPLERS, or a function of the same signature.
        velocity: the policy's prediction of noise - data at `step.sigma`.
        latents: x at noise level `step.sigma`.
        step: one of `steps_of(sigmas)`.
        eta: noise level of the sampler, at least 0; 0 gives the ODE's Euler step, which has no density.

    Raises:
        ValueError: no sampler has this name.
    """
    try:
        take_step = SAMPLERS[sampler] if isinstance(sampler, str) else sampler
    except KeyError:
        known = ", ".join(SAMPLERS)
        raise ValueError(f"sampler {sampler!r} is unknown; use one of {known}, or pass a function") from None
    return take_step(velocity, latents, step, eta)


OdeStep = tuple[Velocity, Step]  # a step of the ODE and the velocity at its start
Solver = Callable[[Velocity, Latents, Step, OdeStep | None], Latents]


def euler(velocity: Velocity, latents: Latents, step: Step, previous: OdeStep | None) -> Latents:
    """x' = x + v dt

    First order; `previous` is ignored.
    """
    return ode(velocity, latents, step).mean


def adams_bashforth(velocity: Velocity, latents: Latents, step: Step, previous: OdeStep | None) -> Latents:
    """x' = x + [(1 + r/2) v - r/2 v_previous] dt,   r = dt/dt_previous

    The two-step Adams-Bashforth method on uneven steps: second order with one velocity a step. Without a previous ODE
    step it is Euler's.
    """
    if previous is None:
        return euler(velocity, latents, step, previous)
    previous_velocity, previous_step = previous
    ratio = step.dt / previous_step.dt
    return latents + step.dt * ((1 + ratio / 2) * velocity - ratio / 2 * previous_velocity)


SOLVERS: Table[Solver] = Table({"euler": euler, "adams_bashforth": adams_bashforth})
