"""LoRA adapters through peft, by the names of diffusers' layers: adding them, and merging them into the weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from peft import LoraConfig as PeftConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from bpgo_video.config.bpgo import ConfigError
from bpgo_video.config.policy import LoraConfig

ADAPTER = "default"


def add_lora(transformer: nn.Module, lora: LoraConfig, seed: int) -> None:
    """Freeze the weights and add low-rank adapters (arXiv 2106.09685): W + alpha/rank B A, B = 0 at the start.

    Raises:
        ConfigError: no linear layer's name ends with one of `target_modules`.
    """
    names = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    if not any(name.endswith(target) for name in names for target in lora.target_modules):
        raise ConfigError(
            f"policy.lora.target_modules {lora.target_modules} match no linear layer; some are {names[:8]}"
        )
    transformer.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # every rank draws the same A
        transformer.add_adapter(peft_config(lora), ADAPTER)  # type: ignore[operator]


def peft_config(lora: LoraConfig) -> PeftConfig:
    """The settings as peft's."""
    return PeftConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.target_modules))


def merged_parameters(engine: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Every base parameter of the transformer `name` under its original name, with adapters: W + alpha/rank B A.

    The buffers that its files store follow. One parameter at a time is gathered, so all ranks must iterate to the end
    together.

    Args:
        engine: the `Engine` that holds the transformers.
    """
    module = engine.module.get_submodule(name)
    layers: dict[str, Any] = {name: layer for name, layer in module.named_modules() if isinstance(layer, LoraLayer)}
    for key, parameter in module.named_parameters():
        if ".lora_" in key:
            continue
        owner = key.removesuffix(".weight").removesuffix(".base_layer")
        layer = layers.get(owner) if key.endswith(".base_layer.weight") else None
        adapters = [] if layer is None else [layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight]
        with engine.gathered([parameter, *adapters]):
            value = parameter.detach()
            if layer is not None:
                down, up = (adapter.detach() for adapter in adapters)
                value = add_adapter_in(value, down, up, layer.scaling[ADAPTER])
            yield key.replace(".base_layer.", "."), value
    in_files = module.state_dict()
    yield from ((key, buffer) for key, buffer in module.named_buffers() if key in in_files)


def add_adapter_in(weight: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
    """W + scaling B A, in fp32 and then in W's own dtype.

    Args:
        weight: W [out, in].
        down, up: A [rank, in] and B [out, rank].
    """
    return (weight.float() + scaling * (up.float() @ down.float())).to(weight.dtype)


def check_adapter(layer: str, weight: Tensor, down: Tensor, up: Tensor) -> None:
    """Check the shapes of a layer's adapter.

    Args:
        weight: W [out, in ...].
        down, up: A, which must be [rank, in ...], and B, [out, rank ...].

    Raises:
        ValueError: they are not.
    """
    out, rest = tuple(weight.shape[:1]), tuple(weight.shape[1:])
    if tuple(down.shape[1:]) != rest or tuple(up.shape[:2]) != (*out, *down.shape[:1]):
        raise ValueError(
            f"the adapter of {layer} has A {[*down.shape]} and B {[*up.shape]}, but the layer's weight is "
            f"{[*weight.shape]}: A must be [rank, in] and B [out, rank] of a weight [out, in]"
        )


def merged_tensors(
    base: Iterable[tuple[str, Tensor]], adapters: Mapping[str, Tensor], lora: LoraConfig
) -> Iterator[tuple[str, Tensor]]:
    """As `merged_parameters`, from the tensors of a base model and a checkpoint's adapters.

    Adapters are rounded to the dtype of the weight that they are added to.

    Raises:
        ValueError: an adapter lacks its other half, has another shape, or the base model has no such layer.
    """
    unused = set(adapters)
    for name, weight in base:
        layer = name.removesuffix(".weight")
        down, up = (f"{layer}.lora_{half}.{ADAPTER}.weight" for half in "AB")
        if unused.issuperset((down, up)):
            unused -= {down, up}
            halves = {half: adapters[half].to(weight.dtype) for half in (down, up)}  # as training held them
            check_adapter(layer, weight, halves[down], halves[up])
            weight = add_adapter_in(weight, halves[down], halves[up], lora.alpha / lora.rank)
        yield name, weight
    if unused:
        raise ValueError(f"adapters {sorted(unused)[:3]} fit no layer of the base model; is it the one of this run?")
