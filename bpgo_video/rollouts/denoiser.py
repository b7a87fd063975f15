"""The denoising loop with guidance, for rollouts, their replay and held-out videos."""

from __future__ import annotations

from collections.abc import Callable, Collection
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bpgo_video.config.bpgo import Config, ConfigError, LossConfig
from bpgo_video.diffusion import sde
from bpgo_video.policies import Policy, guided_velocity
from bpgo_video.policies.attention_backends import with_backend
from bpgo_video.policies.base import both_velocities
from bpgo_video.policies.schedule import given_sigmas
from bpgo_video.rollouts.paths import PartialPath, joined
from bpgo_video.rollouts.rules import rollout_sigmas
from bpgo_video.rollouts.tree import Tree
from bpgo_video.types import Guidance, Latents, Velocity

LATENTS_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
EULER_SCHEDULERS = (  # they take Euler steps on the family's noise levels (tests/policies/test_families.py)
    "FlowMatchEulerDiscreteScheduler",
    "CogVideoXDDIMScheduler",
)


class DenoisingPath(NamedTuple):
    """What the denoising loop records, named as in `Trajectory`; log-probs are nan at deterministic steps."""

    latents: Float[Tensor, "samples points channels latent_frames latent_height latent_width"]
    log_probs: Float[Tensor, "samples steps"]
    means: Float[Tensor, "samples trained channels latent_frames latent_height latent_width"] | None = None
    frame_log_probs: Float[Tensor, "samples steps latent_frames"] | None = None


@dataclass(frozen=True)
class Denoiser:
    """A policy with a schedule and a sampler; rollout and replay use the same one.

    Attributes:
        sigmas: noise levels of the whole schedule.
        sampler: transition of the stochastic steps, a key of sde.SAMPLERS; the other steps follow the ODE by `solver`.
        latents_dtype: latents are rounded to it after each step, before their log-prob is taken.
        records_means: keep the mean of each stochastic transition, which some trust regions compare.
        records_path: keep the latents of every noise level, not only the last.
        records_frames: keep the log-probs of each latent frame, for credit by frames.
        guidance_scale_2: guidance of a pipeline's second transformer; None uses guidance_scale.
        guidance_every: ODE steps compute v_away once in so many of them, and use v_towards - v_away in between.
        ode_attention: attention backend of ODE steps; None is the policy's.
        scheduler: a diffusers scheduler of flow models, with its timesteps set, that takes the ODE's steps instead of
            `solver`. Each video gets a copy, because a scheduler remembers its steps.
    """

    policy: Policy
    sigmas: Tensor
    sampler: str
    eta: float
    guidance_scale: float
    latents_dtype: torch.dtype
    solver: str = "euler"
    records_means: bool = False
    records_path: bool = True
    records_frames: bool = False
    guidance_scale_2: float | None = None
    guidance_every: int = 1
    ode_attention: str | None = None
    scheduler: Any = None

    @cached_property
    def steps(self) -> list[sde.Step]:
        return sde.steps_of(self.sigmas)

    def velocity(
        self, latents: Latents, index: int, guidance: Guidance, sigma: Float[Tensor, "*samples"] | None = None
    ) -> Velocity:
        """The guided velocity at the start of step `index`; differentiable in the policy's parameters.

        Args:
            sigma: other noise levels, 0-dim or one for each sample, at which the transformer of this step computes.
        """
        level = self.sigmas[index] if sigma is None else sigma
        return guided_velocity(self.policy, latents.float(), level, guidance, self.guidance_at(index))

    def guidance_at(self, index: int) -> float:
        """The guidance scale of the transformer that computes step `index`."""
        is_first = self.transformer_at(index) == self.policy.transformer_names[0]
        return self.guidance_scale if self.guidance_scale_2 is None or is_first else self.guidance_scale_2

    def transformer_at(self, index: int) -> str:
        """The name of the transformer that computes step `index`."""
        return self.policy.transformer_at(float(self.sigmas[index]))

    def ode_velocity(self, path: PartialPath, guidance: Guidance) -> tuple[Velocity, tuple[Velocity, int] | None]:
        """The guided velocity of an ODE step, and `guided` of the path after it.

        With a `difference` of an earlier step it is v_towards + (scale - 1) difference.
        """
        index, scale = path.step, self.guidance_at(path.step)
        if self.guidance_every == 1 or scale == 1.0:
            return self.velocity(path.latents, index, guidance), None
        latents, sigma = path.latents.float(), self.sigmas[index]
        if path.guided is not None:
            difference, computed = path.guided
            if index - computed < self.guidance_every and self.transformer_at(index) == self.transformer_at(computed):
                prompted = self.policy.velocity(latents, sigma, guidance.towards)
                return self.policy.rescaled(prompted + (scale - 1) * difference, prompted), path.guided
        prompted, unprompted = both_velocities(self.policy, latents, sigma, guidance)
        guided = self.policy.rescaled(unprompted + scale * (prompted - unprompted), prompted)
        return guided, (prompted - unprompted, index)

    def transition(self, latents: Latents, index: int, guidance: Guidance) -> sde.Transition:
        """The distribution after stochastic step `index`; differentiable in the policy's parameters."""
        return self.transition_of(self.velocity(latents, index, guidance), latents, index)

    def transition_of(self, velocity: Velocity, latents: Latents, index: int) -> sde.Transition:
        """The distribution after stochastic step `index` with this velocity."""
        return sde.transition(self.sampler, velocity, latents.float(), self.steps[index], self.eta)

    @torch.no_grad()
    def denoise(
        self,
        latents: Latents,
        guidance: Guidance,
        noise_of: Callable[[int], Latents],
        trained_steps: Collection[int] = (),
    ) -> DenoisingPath:
        """Denoise from noise to data.

        Args:
            noise_of: index of a stochastic step -> its standard normal noise.
            trained_steps: the stochastic steps, whose log-probs are recorded.
        """
        return self.complete(self.begin(latents), guidance, noise_of, trained_steps)

    def begin(self, latents: Latents) -> PartialPath:
        """A path that is still at its noise."""
        return PartialPath((latents.to(self.latents_dtype),), scheduler=deepcopy(self.scheduler))

    @torch.no_grad()
    def follow_ode(self, path: PartialPath, guidance: Guidance) -> PartialPath:
        """The path after one more step of the ODE."""
        with with_backend(self.policy.transformers, self.ode_attention):
            velocity, guided = self.ode_velocity(path, guidance)
        if path.scheduler is not None:
            timestep = path.scheduler.timesteps[path.step]
            return self._to(path, path.scheduler.step(velocity, timestep, path.latents, return_dict=False)[0])
        step = self.steps[path.step]
        following = sde.SOLVERS[self.solver](velocity, path.latents.float(), step, path.previous)
        return self._to(path, following)._replace(previous=(velocity, step), guided=guided)

    def _to(self, path: PartialPath, latents: Latents) -> PartialPath:
        kept = path.points if self.records_path else ()
        points = (*kept, latents.to(self.latents_dtype))
        return path._replace(points=points, step=path.step + 1, previous=None, guided=None)

    @torch.no_grad()
    def complete(
        self,
        path: PartialPath,
        guidance: Guidance,
        noise_of: Callable[[int], Latents],
        trained_steps: Collection[int] = (),
        tree: Tree | None = None,
    ) -> DenoisingPath:
        """Denoise the rest of a path; its arguments are those of `denoise`, but with a tree:

        Args:
            path: of the tree's nodes at its step.
            guidance: of each sample.
            noise_of: index of a stochastic step -> the noise of each child of the nodes there.
            tree: what the samples share; None is nothing, so that each node is a sample.

        Raises:
            ValueError: a stochastic step is already behind the path.
        """
        if passed := [index for index in trained_steps if index < path.step]:
            raise ValueError(f"the path is at step {path.step}, beyond its stochastic steps {passed}")
        tree, num_steps, means = tree or Tree(len(path.latents)), len(self.sigmas) - 1, []
        log_probs = torch.full((tree.samples, num_steps), torch.nan, device=path.latents.device)
        by_frame = log_probs[:, :, None].repeat(1, 1, path.latents.shape[2]) if self.records_frames else None
        points = [tree.of_samples(point) for point in path.points]
        for index in range(path.step, num_steps):
            nodes = path._replace(points=path.points[-1:])
            count = len(nodes.latents)
            guided = guidance.part(slice(None, None, tree.samples // count))
            parts = [(nodes.part(rows), guided.part(rows)) for rows in tree.batches(count)]
            if index not in trained_steps:
                path = joined([self.follow_ode(*part) for part in parts])
            else:
                transition = sde.joined([self.transition(part.latents, index, towards) for part, towards in parts])
                means += [tree.of_samples(transition.mean)] if self.records_means else []
                noise = noise_of(index)
                transition = transition.repeated(len(noise) // count)
                path = self._to(nodes, transition.sample(noise))
                log_probs[:, index] = tree.of_samples(transition.log_prob(path.latents))
                if by_frame is not None:
                    by_frame[:, index] = tree.of_samples(transition.frame_log_prob(path.latents))
            points = [*(points if self.records_path else ()), tree.of_samples(path.latents)]
        return DenoisingPath(
            torch.stack(points, dim=1), log_probs, torch.stack(means, dim=1) if means else None, by_frame
        )


def training_denoiser(policy: Policy, config: Config) -> Denoiser:
    """The denoiser of rollouts and their replay."""
    sampler = config.sampler
    return Denoiser(
        policy=policy,
        sigmas=rollout_sigmas(policy, config),
        sampler=sampler.name,
        eta=sampler.eta,
        guidance_scale=sampler.guidance_scale,
        latents_dtype=LATENTS_DTYPES[sampler.latents_dtype],
        solver=sampler.solver,
        records_means=config.loss.compares_means or pulls_to_previous(config.loss),
        records_path=config.loss.records_path,
        records_frames=config.credit.kind == "segment",
        guidance_scale_2=sampler.guidance_scale_2,
        guidance_every=config.rollout.guidance_every,
        ode_attention=config.rollout.attention_backend,
    )


def evaluation_denoiser(policy: Policy, config: Config) -> Denoiser:
    """The denoiser of held-out videos, by the recipe's section `evaluation`.

    Raises:
        ConfigError: `solver` is `shipped`, and the folder's scheduler does not take a rectified-flow velocity.
    """
    evaluation, scheduler = config.evaluation, policy.pipeline.scheduler
    shift, solver = evaluation.shift_or(config.sampler), evaluation.solver
    if solver == "shipped" and type(scheduler).__name__ not in EULER_SCHEDULERS:
        if not scheduler.config.get("use_flow_sigmas"):
            raise ConfigError(
                f"evaluation.solver is 'shipped', but {policy.folder} ships a {type(scheduler).__name__}, which does "
                "not take a velocity of rectified flow; set it to 'euler' or 'adams_bashforth'"
            )
        changes = {} if shift is None else {"flow_shift": shift}
        scheduler = type(scheduler).from_config(scheduler.config, **changes)
        scheduler.set_timesteps(evaluation.num_steps)
        levels = scheduler.timesteps / scheduler.config.num_train_timesteps  # the pipeline passes whole timesteps
        sigmas = torch.cat([levels, levels.new_zeros(1)])
    else:
        scheduler, solver = None, "euler" if solver == "shipped" else solver
        levels = evaluation.sigmas_or(config.sampler)
        sigmas = given_sigmas(levels) if levels else policy.sigmas(evaluation.num_steps, config.video, shift)
    return Denoiser(
        policy=policy,
        sigmas=sigmas,
        sampler="ode",
        eta=0.0,
        guidance_scale=evaluation.guidance_scale,
        guidance_scale_2=evaluation.guidance_scale_2,
        latents_dtype=torch.float32,
        solver=solver,
        scheduler=scheduler,
        records_path=False,
    )


def pulls_to_previous(loss: LossConfig) -> bool:
    """Whether the loss has a divergence from the policy that sampled the rollout."""
    return loss.kl_weight > 0 and loss.kl_reference == "previous"
