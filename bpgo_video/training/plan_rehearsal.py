"""What does a forward take, and its backward? The real modules run on shapes alone, and what they allocate is counted.

Fake tensors have a shape, a dtype and no memory, so that a policy of 14B parameters is rehearsed in seconds on any
machine: with its checkpointing, its adapters, and the exchanges of a sequence group whose other ranks are not there.
Attention is taken to be computed in tiles (flash or memory-efficient): it saves queries, keys, values, output and one
number a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import diffusers
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from bpgo_video.config.bpgo import ConfigError, LoraConfig
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.policies import kandinsky5_transformer
from bpgo_video.policies.frozen_parts import in_parts
from bpgo_video.policies.lora import add_lora
from bpgo_video.policies.sequence import PLANS, SequencePlan, check_heads, parallelise
from bpgo_video.training.plan_allocations import Allocations
from bpgo_video.training.plan_inputs import Batch, Inputs, arguments
from bpgo_video.training.plan_masks import EveryTokenReal, at_once
from bpgo_video.training.plan_models import Model

VAE_DTYPE = torch.float32  # as policies load it
ONE_VIDEO_AT_A_TIME = ("AutoencoderKLHunyuanVideo15",)  # VAEs that their policies let slice batches unasked
NO_ADAPTERS = LoraConfig()
Latents = tuple[int, int, int, int]


@dataclass(frozen=True)
class Treatment:
    """How a transformer is run; see the settings of the same names.

    Attributes:
        plan, inputs: the family's own, `sequence_plan` and `transformer_inputs`; None takes those of its class.
    """

    gradient_checkpointing: bool = False
    lora: LoraConfig = NO_ADAPTERS
    sequence: int = 1
    plan: SequencePlan | None = None
    inputs: Inputs | None = None


@dataclass(frozen=True)
class Footprint:
    """What one transformer takes on a rank, beside its weights and their gradients.

    Attributes:
        trained, frozen: elements of each parameter; with adapters the transformer's own are frozen.
        largest_block: elements of the largest unit that ZeRO-3 fetches at once.
        forward: bytes at the peak of a forward without gradients.
        replay: bytes at the peak of a forward with its backward, which gives each parameter's gradient away at once.
    """

    trained: tuple[int, ...]
    frozen: tuple[int, ...]
    largest_block: int
    forward: int
    replay: int


def on_shapes(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A module of the meta device with fake weights in its place; to be called under a FakeTensorMode.

    Modules are made and adapted on the meta device, since fake tensors cannot be moved or cast in place.
    """
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=dtype)
                part._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return module


PREPARATIONS = {"Kandinsky5Transformer3DModel": kandinsky5_transformer.prepare}  # what policies do to what they load


@contextmanager
def alone_in_a_group(ranks: int) -> Iterator[Mesh]:
    """Rank 0 of a sequence group whose exchanges have the right shapes and reach nobody.

    Raises:
        RuntimeError: this process is a rank of a real group.
    """
    device = torch.device("cpu")
    if ranks == 1:
        yield Mesh(0, 1, device)
        return
    if dist.is_initialized():
        raise RuntimeError("a plan for sequence groups needs a process of its own; run bpgo-video plan")
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield Mesh(0, ranks, device, ranks, dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def class_of(config: Any, part: str) -> Any:
    """The diffusers class that a part's config.json names.

    Raises:
        ConfigError: the installed diffusers has no such class.
    """
    name = config["_class_name"]
    if not hasattr(diffusers, name):
        raise ConfigError(f"the {part} is a {name}, which the installed diffusers {diffusers.__version__} lacks")
    return getattr(diffusers, name)


@cache
def footprint(model: Model, batch: Batch, treatment: Treatment) -> Footprint:
    """One transformer of the model, rehearsed.

    Raises:
        ConfigError: its arguments are not known, or its heads do not divide over the sequence group.
    """
    transformer_class = class_of(model.transformer, "transformer")
    with torch.device("meta"):
        adapted = transformer_class.from_config(dict(model.transformer))
        if treatment.lora.rank:
            add_lora(adapted, treatment.lora, seed=0)
    name = transformer_class.__name__
    check_heads({**adapted.config, "_class_name": name}, treatment.sequence, treatment.plan)
    with alone_in_a_group(treatment.sequence) as mesh, FakeTensorMode(), EveryTokenReal():
        module: Any = on_shapes(adapted, batch.dtype)
        _prepare(module, treatment, mesh)
        taken_in = arguments(name, adapted.config, batch, treatment.inputs)
        forward, replay = _peaks(module, taken_in)
        parameters = list(module.parameters())
        return Footprint(
            trained=tuple(parameter.numel() for parameter in parameters if parameter.requires_grad),
            frozen=tuple(parameter.numel() for parameter in parameters if not parameter.requires_grad),
            largest_block=max(_elements(block) for block in repeated_blocks(module)),
            forward=forward,
            replay=replay,
        )


def _prepare(module: Any, treatment: Treatment, mesh: Mesh) -> None:
    PREPARATIONS.get(type(module).__name__, lambda _: None)(module)
    if treatment.gradient_checkpointing:
        module.enable_gradient_checkpointing()
    if plan := treatment.plan or PLANS.get(type(module).__name__):
        plan.attention(module)  # on one rank, too: shapes alone do not tell which of Mochi's text tokens are padding
    parallelise(module, mesh, treatment.plan)
    for parameter in module.parameters():
        if parameter.requires_grad:  # ZeRO takes gradients as they come; what it keeps of them is reckoned apart
            parameter.register_post_accumulate_grad_hook(_give_away)


def _give_away(parameter: torch.Tensor) -> None:
    parameter.grad = None


def _peaks(module: nn.Module, taken_in: dict[str, Any]) -> tuple[int, int]:
    """Of a forward without gradients, and of a forward and its backward."""
    with Allocations([*module.parameters(), *module.buffers()]) as counted:
        with torch.no_grad():
            module(**taken_in, return_dict=False)
        forward = counted.mark()
        taken_in["hidden_states"].requires_grad_()  # as in replay
        module(**taken_in, return_dict=False)[0].float().square().mean().backward()
    return forward, counted.peak


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """The members of the module's lists of modules: what ZeRO-3 fetches, and checkpointing recomputes, as one."""
    lists = [part for part in module.children() if isinstance(part, nn.ModuleList)]
    return [block for blocks in lists for block in blocks]


def _elements(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@contextmanager
def _vae(model: Model) -> Iterator[Any]:
    with torch.device("meta"):
        vae = class_of(model.vae, "VAE").from_config(dict(model.vae)).eval()
    with FakeTensorMode(), torch.no_grad():
        at_once(vae)
        yield on_shapes(vae, VAE_DTYPE)


@cache
def vae_bytes(model: Model) -> int:
    with _vae(model) as vae:
        return _elements(vae) * VAE_DTYPE.itemsize


@cache
def decoding(model: Model, latents: Latents, samples: int, tiling: bool = False, slicing: bool = False) -> int:
    """Bytes at the peak of decoding so many videos at once, beside the VAE's weights."""
    with _vae(model) as vae:
        in_parts(vae, tiling=tiling, slicing=slicing or type(vae).__name__ in ONE_VIDEO_AT_A_TIME)
        level = {"temb": torch.empty(samples)} if vae.config.get("timestep_conditioning") else {}  # LTX-Video's
        with Allocations([*vae.parameters(), *vae.buffers()]) as counted:
            vae.decode(torch.empty(samples, *latents), return_dict=False, **level)
    return counted.peak
