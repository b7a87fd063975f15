"""Rates of this machine, measured at a recipe's own shapes: what `bpgo-video plan --calibrate` writes.

Timed are whole passes: a denoising step with its log-prob, a replayed step with its backward, the VAE, an optimizer
update and, where their weights are present, the rewards. Weights are random. Of a large transformer a few blocks run,
and the rate of their operations is taken for all. Sequence groups and ZeRO are left out: one process measures, so links
keep their card's figures.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bpgo_video.config.bpgo import ConfigError
from bpgo_video.distributed.ds_config import compute_dtype, parameter_dtype
from bpgo_video.planning.cards import Rates
from bpgo_video.planning.fake import Counts
from bpgo_video.planning.job import Job
from bpgo_video.planning.models import diffusers_class
from bpgo_video.planning.zero import FP32
from bpgo_video.policies import Policy
from bpgo_video.policies.lora import add_lora
from bpgo_video.policies.networks import Transformers, checkpoint_blocks, shorten, split_vae_work
from bpgo_video.policies.vae import prepare_vae
from bpgo_video.rewards.base import Clips
from bpgo_video.rewards.suite import RewardSuite
from bpgo_video.rollouts.denoiser import LATENTS_DTYPES, Denoiser
from bpgo_video.types import Audio, Guidance

ROUNDS = 5
BLOCKS = 4  # of each list, where the transformer is larger than this many parameters
LARGE = 200_000_000
STEP = 1  # index of the timed denoising step
SOUND_RATE = 24_000  # of the random sound that rewards score


def calibrate(job: Job, rates: Rates, device: torch.device) -> Rates:
    """`rates` with what one process reaches on `device`."""
    torch.manual_seed(0)
    policy = _policy(job, device)
    denoise, replay = _passes(job, policy, device)
    forward, backward = rate_of(denoise, device), rate_of(replay, device)
    del policy, denoise, replay
    decode = rate_of(_decoding(job, device), device)
    return replace(
        rates,
        source=f"measured on {_name(device)}",
        forward=forward,
        replay=backward,
        decode=decode,
        decode_memory=None,
        memory=_optimizer_rate(job, device),
        video_seconds=_reward_seconds(job, device),
    )


def rate_of(run: Callable[[], object], device: torch.device) -> float:
    """Operations a second of a call, the median of some after a warm-up."""
    with Counts() as counts:
        run()
    return counts.operations / seconds_of(run, device)


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(1 + ROUNDS):
        _wait(device)
        started = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({torch.get_num_threads()} threads)"


def _policy(job: Job, device: torch.device) -> Policy:
    """The job's policy with a transformer of random weights, of a few blocks if it is large."""
    settings, dtype = job.config.policy, compute_dtype(job.ds_config)
    policy: Any = copy(job.policy)
    blocks = BLOCKS if job.footprint.weights.elements > LARGE else None
    module = _random(policy.transformer_config, blocks, device, dtype)
    if settings.lora.rank:
        add_lora(module, settings.lora, seed=0)
    policy.prepare(module)
    if settings.checkpointed:
        checkpoint_blocks(module, settings.checkpointed)
    if policy.sequence_plan is not None:
        policy.sequence_plan.attention(module)
    policy.transformers = Transformers({policy.transformer_names[0]: module})
    return policy


def _random(config: Any, blocks: int | None, device: torch.device, dtype: torch.dtype) -> Any:
    """A diffusers network of random weights; with `blocks`, that many of each list."""
    with torch.device("meta"):
        module: Any = diffusers_class(config).from_config(dict(config))
    shorten(module, blocks)
    module = module.to_empty(device=device)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.normal_(std=0.02)
            else:
                tensor.zero_()
    for name, parameter in module.named_parameters():
        parameter.data = parameter.data.to(parameter_dtype(type(module), name, dtype))
    return module


def _passes(job: Job, policy: Policy, device: torch.device) -> tuple[Callable[[], object], Callable[[], object]]:
    """A denoising step with its log-prob, and the same step in replay."""
    config, dtype = job.config, compute_dtype(job.ds_config)
    sampler, samples = config.sampler, config.rollout.micro_batch_size
    denoiser = Denoiser(
        policy, torch.linspace(1, 0, sampler.num_steps + 1), sampler.name, sampler.eta,
        sampler.guidance_scale if job.guided else 1.0, LATENTS_DTYPES[sampler.latents_dtype],
    )  # fmt: skip
    shapes = policy.conditioning_shapes(job.latents, policy.max_sequence_length)
    conditioning = {
        name: torch.ones(samples, *shape, dtype=torch.bool if "mask" in name else dtype, device=device)
        for name, shape in shapes.items()
    }
    for name, row in policy.video_conditioning(config.video).items():
        conditioning[name] = row.to(device).expand(samples, *row.shape[1:])
    guidance = Guidance(conditioning, conditioning)
    latents, noise = (torch.randn(samples, *job.latents, device=device) for _ in range(2))

    @torch.no_grad()
    def denoise() -> Tensor:
        transition = denoiser.transition(latents, STEP, guidance)
        return transition.log_prob(transition.sample(noise))

    def replay() -> None:
        with_gradient = latents.detach().requires_grad_()
        denoiser.transition(with_gradient, STEP, guidance).log_prob(noise).mean().backward()

    return denoise, replay


def _decoding(job: Job, device: torch.device) -> Callable[[], object]:
    """The VAE on the videos that a rank decodes together."""
    policy, settings = job.policy, job.config.policy
    vae: Any = prepare_vae(_random(policy.vae_config, None, device, job.vae_dtype).eval(), job.vae_dtype)
    split_vae_work(vae, tiling=settings.vae_tiling, slicing=settings.vae_slicing or policy.slices_vae)
    latents = torch.randn(job.decoded_at_once, *job.decoded, device=device, dtype=job.vae_dtype)
    timestep = {"temb": latents.new_zeros(len(latents))} if vae.config.get("timestep_conditioning") else {}

    @torch.no_grad()
    def decode() -> object:
        return vae.decode(latents, return_dict=False, **timestep)

    return decode


def _optimizer_rate(job: Job, device: torch.device) -> float:
    """Bytes a second of AdamW on a rank's share of fp32 weights, or on a part of it: see `optimizer_seconds`."""
    elements = min(job.zero.share(sum(job.weights.trained)), LARGE)
    weights = nn.Parameter(torch.zeros(elements, device=device))
    weights.grad = torch.ones_like(weights)
    return 7 * FP32 * elements / seconds_of(torch.optim.AdamW([weights]).step, device)


def _reward_seconds(job: Job, device: torch.device) -> float | None:
    """Seconds of scoring one video; None if a reward of the recipe cannot be built here."""
    config = job.config
    try:
        suite = RewardSuite(config.rewards, device, config.video.fps)
    except (ConfigError, FileNotFoundError):
        return None
    video = config.video
    pixels = torch.rand(job.decoded_at_once, video.num_frames, 3, video.height, video.width, device=device)
    sound = torch.rand(job.decoded_at_once, 2, round(video.num_frames / video.fps * SOUND_RATE), device=device)
    audio = Audio(sound, SOUND_RATE) if job.policy.makes_audio else None

    @torch.no_grad()
    def score(clips: Clips, groupwise: bool) -> None:
        for reward in suite.rewards.values():
            for model in reward.models if reward.groupwise == groupwise else ():
                model(clips)

    clips = Clips(pixels, video.fps, ("a red circle moving left",) * len(pixels), audio=audio)
    seconds = seconds_of(partial(score, clips, False), device) / len(pixels)
    if suite.groupwise:
        group = clips.select(torch.zeros(config.rollout.group_size, dtype=torch.int64))
        group = replace(group, groups=torch.zeros(len(group), dtype=torch.int64))
        seconds += seconds_of(partial(score, group, True), device) / len(group)
    return seconds
