"""A training step as peers write it: plain PyTorch around diffusers' WanPipeline, for `step.py` to compare with.

After the loops of github.com/yifan123/flow_grpo and github.com/X-GenGroup/Flow-Factory: the pipeline's transformer,
scheduler and VAE called one by one, an SDE step with log-prob (arXiv 2505.05470), GRPO's advantages, one forward under
DistributedDataParallel for each trained step, and torch's AdamW. Every sample computes every denoising step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from jaxtyping import Float
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from bpgo_video.config.bpgo import Config
from bpgo_video.diffusion.steps import split_updates
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.files import resolve_folder
from bpgo_video.rewards.suite import RewardSuite
from bpgo_video.rollouts.rules import TrainedSteps
from bpgo_video.types import Latents, PromptBatch, RolloutChunk, Velocity

NoiseOf = Callable[[Tensor, Tensor, int | str, tuple[int, ...]], Latents]  # rows, samples, denoising step, shape


@dataclass
class Samples:
    """A micro-batch: latents before each denoising step and after the last, and log-probs of the trained ones."""

    rows: Tensor
    numbers: Tensor
    embeds: Tensor
    latents: list[Latents]
    log_probs: dict[int, Float[Tensor, "samples"]]


def standard_normal(rows: Tensor, numbers: Tensor, step: int | str, shape: tuple[int, ...]) -> Latents:
    """Fresh noise from torch's generator."""
    return torch.randn(len(rows), *shape)


class PlainLoop:
    """Steps of a recipe without guidance, on whole weights.

    Attributes:
        noise_of: draws the noise of a micro-batch.
    """

    def __init__(
        self, config: Config, mesh: Mesh, batches: Iterator[PromptBatch], latent_shape: tuple[int, ...]
    ) -> None:
        self.config, self.mesh, self.batches, self.latent_shape = config, mesh, batches, latent_shape
        self.pipeline: Any = WanPipeline.from_pretrained(
            resolve_folder(config.policy.folder), text_encoder=None, tokenizer=None
        )
        self.pipeline.vae.requires_grad_(False)
        shift = {"shift": self.pipeline.scheduler.config.flow_shift}
        self.scheduler: Any = FlowMatchEulerDiscreteScheduler.from_config(shift)
        self.scheduler.set_timesteps(config.sampler.num_steps)
        self.suite = RewardSuite(config.rewards, mesh.device, config.video.fps)
        self.model = DistributedDataParallel(self.pipeline.transformer)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.optim.learning_rate)
        self.noise_of: NoiseOf = standard_normal

    def train_step(self, trained_steps: TrainedSteps) -> list[float]:
        """Sample, decode, score, replay, update; the gradient's norm of each update."""
        prompts, group = next(self.batches), self.config.rollout.group_size
        micro_batches, scored = [], []
        for items in self.mesh.share(len(prompts) * group, self.config.rollout.micro_batch_size):
            rows, numbers = torch.tensor(items) // group, torch.tensor(items) % group
            samples = self.sample(prompts, rows, numbers, trained_steps(int(prompts.ids[rows[0]])))
            videos = self.decode(samples.latents[-1])
            scored.append(self.suite.score(RolloutChunk((), videos, rows, numbers), prompts))
            micro_batches.append(samples)
        rewards = self.suite.gather(scored, prompts, group, self.mesh).total
        advantages = (rewards - rewards.mean(dim=1, keepdim=True)) / (rewards.std(dim=1, keepdim=True) + 1e-4)
        return self.update(micro_batches, advantages)

    @torch.no_grad()
    def sample(self, prompts: PromptBatch, rows: Tensor, numbers: Tensor, trained: tuple[int, ...]) -> Samples:
        """Denoise a micro-batch: stochastic at the trained steps, the ODE's Euler steps elsewhere."""
        self.model.eval()
        embeds = prompts.conditioning["prompt_embeds"][rows]
        latents = [self.noise_of(rows, numbers, "start", self.latent_shape)]
        log_probs = {}
        for step, timestep in enumerate(self.scheduler.timesteps):
            velocity = self.pipeline.transformer(
                latents[-1], timestep.expand(len(rows)), encoder_hidden_states=embeds, return_dict=False
            )[0]
            if step in trained:
                mean, std = self.sde_step(velocity, latents[-1], step)
                reached = mean + std * self.noise_of(rows, numbers, step, self.latent_shape)
                log_probs[step] = log_prob(reached, mean, std)
            else:
                sigmas = self.scheduler.sigmas
                reached = latents[-1] + (sigmas[step + 1] - sigmas[step]) * velocity
            latents.append(reached)
        return Samples(rows, numbers, embeds, latents, log_probs)

    def sde_step(self, velocity: Velocity, latents: Latents, step: int) -> tuple[Latents, Float[Tensor, ""]]:
        """Mean and standard deviation of Flow-GRPO's step."""
        sigmas = self.scheduler.sigmas
        sigma, dt = sigmas[step], sigmas[step + 1] - sigmas[step]
        std = self.config.sampler.eta * (sigma / (1 - torch.where(sigma == 1, sigmas[1], sigma))).sqrt()
        mean = latents * (1 + std**2 / (2 * sigma) * dt) + velocity * (1 + std**2 * (1 - sigma) / (2 * sigma)) * dt
        return mean, std * (-dt).sqrt()

    @torch.no_grad()
    def decode(self, latents: Latents) -> Tensor:
        """Pixels in [0, 1], as the pipeline decodes them."""
        vae = self.pipeline.vae
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        videos = vae.decode(latents * std + mean, return_dict=False)[0]
        pixels: Tensor = self.pipeline.video_processor.postprocess_video(videos, output_type="pt")
        return pixels

    def update(self, micro_batches: list[Samples], advantages: Float[Tensor, "prompts group"]) -> list[float]:
        """The updates of a rollout, each on its own share of the trained steps."""
        self.model.train()
        norms, count = [], self.config.optim.updates_per_rollout
        for number in range(count):
            passes = [
                (samples, step)
                for samples in micro_batches
                for step in split_updates(sorted(samples.log_probs), count)[number]
            ]
            for position, (samples, step) in enumerate(passes, start=1):
                with nullcontext() if position == len(passes) else self.model.no_sync():
                    loss = self.loss(samples, step, advantages[samples.rows, samples.numbers])
                    (loss / len(passes)).backward()
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
            norms.append(float(norm))
        return norms

    def loss(self, samples: Samples, step: int, advantages: Float[Tensor, "samples"]) -> Float[Tensor, ""]:
        """The clipped surrogate of one transition."""
        timestep = self.scheduler.timesteps[step].expand(len(samples.rows))
        inputs = {"encoder_hidden_states": samples.embeds, "return_dict": False}
        velocity = self.model(samples.latents[step], timestep, **inputs)[0]
        mean, std = self.sde_step(velocity, samples.latents[step], step)
        ratio = (log_prob(samples.latents[step + 1], mean, std) - samples.log_probs[step]).exp()
        low, high = self.config.loss.clip_range
        return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high)).mean()


def log_prob(reached: Latents, mean: Latents, std: Float[Tensor, ""]) -> Float[Tensor, "samples"]:
    """log N(reached; mean, std^2), averaged over latent dimensions."""
    density = -((reached - mean) ** 2) / (2 * std**2) - std.log() - math.log(math.sqrt(2 * math.pi))
    return density.mean(dim=tuple(range(1, density.ndim)))
