"""What a policy's networks take: memory and operations of transformer and VAE, from a run on fake tensors.

Attention counts as tiled (flash or memory-efficient): it saves queries, keys, values, output and one number per row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from bpgo_video.config.bpgo import ConfigError, VideoConfig
from bpgo_video.config.policy import LoraConfig
from bpgo_video.planning.fake import (
    Allocations,
    Counts,
    EveryTokenReal,
    alone_in_a_group,
    fake_of,
    make_fake,
)
from bpgo_video.planning.models import diffusers_class
from bpgo_video.policies import Policy
from bpgo_video.policies.attention import check_heads, parallelise
from bpgo_video.policies.lora import add_lora
from bpgo_video.policies.networks import checkpoint_blocks, repeated_blocks, shorten, split_vae_work
from bpgo_video.policies.vae import prepare_vae

NO_ADAPTERS = LoraConfig()


@dataclass(frozen=True)
class Weights:
    """The parameters that an engine shards.

    Attributes:
        trained, frozen: elements of each parameter; with adapters a transformer's own are frozen.
        largest_block: elements of the largest unit that ZeRO-3 fetches at once.
    """

    trained: tuple[int, ...]
    frozen: tuple[int, ...]
    largest_block: int

    @property
    def elements(self) -> int:
        return sum(self.trained) + sum(self.frozen)


@dataclass(frozen=True)
class Work:
    """What a pass takes on a rank.

    Attributes:
        peak: bytes at its peak, besides weights.
        operations: floating-point operations of matrix products, convolutions and attention.
        moved: bytes that its kernels read and write if none are fused.
        exchanged: bytes that the rank sends to its sequence group, its own part included.
    """

    peak: int
    operations: int
    moved: int
    exchanged: int


@dataclass(frozen=True)
class Footprint:
    """What one transformer takes on a rank.

    Attributes:
        weights: its parameters.
        blocks: how many of its parts ZeRO-3 fetches as one.
        forward: of a forward without gradients.
        replay: of a forward and its backward, which releases each parameter's gradient at once.
    """

    weights: Weights
    blocks: int
    forward: Work
    replay: Work


@cache
def footprint(
    policy: Policy,
    video: VideoConfig,
    samples: int,
    dtype: torch.dtype,
    *,
    checkpointed: float = 0.0,
    blocks: int | None = None,
    lora: LoraConfig = NO_ADAPTERS,
    sequence: int = 1,
) -> Footprint:
    """One of the policy's transformers, run on fake tensors.

    Args:
        samples: rows of a forward, both halves of classifier-free guidance counted.
        dtype: that the transformer computes in.
        checkpointed: share of the blocks that the backward computes again.
        blocks: how many of each list of blocks the transformer has; None is all.
        sequence: ranks of a sequence group.

    Raises:
        ConfigError: the heads do not divide over the sequence group, or the policy lacks something that a plan needs.
    """
    check_heads(policy.transformer_config, sequence, policy.sequence_plan)
    inputs = transformer_inputs(policy, video, samples, dtype)
    with torch.device("meta"):  # fake tensors cannot be moved or cast in place, so modules are made here
        module: Any = diffusers_class(policy.transformer_config).from_config(dict(policy.transformer_config))
        shorten(module, blocks)
        if lora.rank:
            add_lora(module, lora, seed=0)
    with alone_in_a_group(sequence) as mesh, FakeTensorMode(), EveryTokenReal():
        make_fake(module, dtype)
        policy.prepare(module)
        if checkpointed:
            checkpoint_blocks(module, checkpointed)
        if policy.sequence_plan is not None:
            policy.sequence_plan.attention(module)  # on one rank, too: Mochi's own processor needs values of the mask
        parallelise(module, mesh, policy.sequence_plan)
        forward, replay = measure(module, tree_map(fake_of, inputs))
        found = repeated_blocks(module)
        trained, frozen = (
            tuple(parameter.numel() for parameter in module.parameters() if parameter.requires_grad == learns)
            for learns in (True, False)
        )
        return Footprint(Weights(trained, frozen, max(map(_elements, found))), len(found), forward, replay)


def transformer_inputs(policy: Policy, video: VideoConfig, samples: int, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments that the policy's `velocity` passes to its transformer, on the meta device.

    Raises:
        ConfigError: see `footprint`.
    """

    class Recorded(Exception):
        """The transformer was called."""

    recorded: dict[str, Any] = {}

    def record(name: str, **inputs: Any) -> None:
        recorded.update(inputs)
        raise Recorded

    recorder, shape = copy(policy), policy.latent_shape(video)
    recorder.transformers = record
    try:
        shapes = policy.conditioning_shapes(shape, policy.max_sequence_length)
        conditioning = {
            name: torch.empty(samples, *size, dtype=torch.bool if "mask" in name else dtype, device="meta")
            for name, size in shapes.items()
        }
        for name, row in policy.video_conditioning(video).items():
            conditioning[name] = row.to("meta").expand(samples, *row.shape[1:])
        recorder.velocity(torch.empty(samples, *shape, device="meta"), torch.tensor(0.5), conditioning)
    except Recorded:
        pass
    except (AttributeError, NotImplementedError) as error:
        raise ConfigError(f"the memory of {type(policy).__name__} cannot be planned: {error}") from error
    return recorded


def measure(module: nn.Module, inputs: dict[str, Any]) -> tuple[Work, Work]:
    """A forward without gradients, and a forward with its backward."""
    for parameter in module.parameters():
        if parameter.requires_grad:  # ZeRO reduces gradients as they come; the plan counts what it keeps
            parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    weights = kept_tensors(module)

    def forward() -> None:
        with torch.no_grad():
            module(**inputs)

    def replay() -> None:
        inputs["hidden_states"].requires_grad_()  # as in replay
        module(**inputs)[0].float().square().mean().backward()

    return work_of(forward, weights), work_of(replay, weights)


def kept_tensors(module: nn.Module) -> list[Tensor]:
    """What a module holds between forwards: parameters, buffers, and its parts' other tensors, as tables of angles."""
    others = (value for part in module.modules() for value in vars(part).values() if isinstance(value, Tensor))
    return [*module.parameters(), *module.buffers(), *others]


def work_of(run: Callable[[], object], weights: Iterable[Tensor]) -> Work:
    """What a call takes; its inputs exist already, and `weights` are not counted in its peak."""
    with Counts() as counts, Allocations(weights) as held:
        run()
    return Work(held.peak, counts.operations, counts.moved, counts.exchanged)


def _elements(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@contextmanager
def _fake_vae(policy: Policy, dtype: torch.dtype) -> Iterator[Any]:
    with torch.device("meta"):
        vae = diffusers_class(policy.vae_config).from_config(dict(policy.vae_config)).eval()
    for part in vae.modules():
        if hasattr(part, "prepare_causal_attention_mask"):  # HunyuanVideo 1.5 fills it row by row, which takes minutes
            part.prepare_causal_attention_mask = _empty_mask
    with FakeTensorMode(), torch.no_grad():
        yield prepare_vae(make_fake(vae, dtype), dtype).requires_grad_(False)


def _empty_mask(
    n_frame: int, n_hw: int, dtype: torch.dtype, device: torch.device, batch_size: int
) -> Float[Tensor, "samples tokens tokens"]:
    return torch.empty(n_frame * n_hw, n_frame * n_hw, dtype=dtype, device=device).expand(batch_size, -1, -1)


@cache
def vae_bytes(policy: Policy, dtype: torch.dtype) -> int:
    """Bytes of the VAE's weights."""
    with _fake_vae(policy, dtype) as vae:
        return _elements(vae) * dtype.itemsize


@cache
def decoding(
    policy: Policy,
    latents: tuple[int, ...],
    samples: int,
    *,
    tiling: bool = False,
    slicing: bool = False,
    dtype: torch.dtype = torch.float32,
    backward: bool = False,
) -> Work:
    """What decoding that many videos at once takes, besides the VAE's weights; with `backward` to the latents, too."""
    with _fake_vae(policy, dtype) as vae:
        split_vae_work(vae, tiling=tiling, slicing=slicing or policy.slices_vae)
        timestep = {"temb": torch.empty(samples, dtype=dtype)} if vae.config.get("timestep_conditioning") else {}
        weights = [*vae.parameters(), *vae.buffers()]

        def decode() -> None:
            with torch.set_grad_enabled(backward):
                inputs = torch.empty(samples, *latents, dtype=dtype, requires_grad=backward)
                pixels = vae.decode(inputs, return_dict=False, **timestep)[0]
                if backward:
                    pixels.float().mean().backward()

        return work_of(decode, weights)
