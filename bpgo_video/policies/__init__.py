"""Video policies: the table of families, and how the policy of a diffusers pipeline folder is loaded.

policy = load_policy("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", max_sequence_length=512)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, get_args

import diffusers
import torch
from torch import nn

from bpgo_video.config.bpgo import ConfigError
from bpgo_video.files import resolve_folder
from bpgo_video.policies.base import Policy, guided_velocity
from bpgo_video.policies.networks import (
    COMPONENTS,
    Build,
    Load,
    component_of,
    from_pretrained,
    load_frozen,
    networks_of,
)
from bpgo_video.policies.vae import prepare_vae
from bpgo_video.weights import read_json

__all__ = ["FAMILIES", "Policy", "family", "guided_velocity", "load_policy"]

FAMILIES: dict[str, str] = {  # diffusers' pipeline -> the class of its policy, imported on demand
    "WanPipeline": "bpgo_video.policies.wan:WanPolicy",
    "WanImageToVideoPipeline": "bpgo_video.policies.wan:WanImagePolicy",
    "WanVACEPipeline": "bpgo_video.policies.wan_vace:ControlVideoPolicy",
    "SkyReelsV2Pipeline": "bpgo_video.policies.skyreels:SkyReelsPolicy",
    "SkyReelsV2ImageToVideoPipeline": "bpgo_video.policies.skyreels:SkyReelsImagePolicy",
    "SkyReelsV2DiffusionForcingPipeline": "bpgo_video.policies.skyreels:DiffusionForcingPolicy",
    "LTXPipeline": "bpgo_video.policies.ltx:LTXPolicy",
    "LTXImageToVideoPipeline": "bpgo_video.policies.ltx:LTXImagePolicy",
    "LTX2Pipeline": "bpgo_video.policies.ltx2:LTX2Policy",
    "HunyuanVideoPipeline": "bpgo_video.policies.hunyuan:HunyuanVideoPolicy",
    "HunyuanVideoImageToVideoPipeline": "bpgo_video.policies.hunyuan:HunyuanImagePolicy",
    "HunyuanVideo15Pipeline": "bpgo_video.policies.hunyuan15:HunyuanVideo15Policy",
    "HunyuanVideo15ImageToVideoPipeline": "bpgo_video.policies.hunyuan15:HunyuanVideo15ImagePolicy",
    "CogVideoXPipeline": "bpgo_video.policies.cogvideox:CogVideoXPolicy",
    "CogVideoXImageToVideoPipeline": "bpgo_video.policies.cogvideox:CogVideoXImagePolicy",
    "MochiPipeline": "bpgo_video.policies.mochi:MochiPolicy",
    "Kandinsky5T2VPipeline": "bpgo_video.policies.kandinsky5:Kandinsky5Policy",
    "Kandinsky5I2VPipeline": "bpgo_video.policies.kandinsky5:Kandinsky5ImagePolicy",
    "FluxPipeline": "bpgo_video.policies.flux:FluxPolicy",
    "StableDiffusion3Pipeline": "bpgo_video.policies.sd3:SD3Policy",
    "QwenImagePipeline": "bpgo_video.policies.qwen_image:QwenImagePolicy",
}
ORIGINAL_NAMES = {  # diffusers' pipeline -> the function that maps its transformer's tensor names to the authors'
    "WanPipeline": "bpgo_video.policies.wan:original_name",
    "WanImageToVideoPipeline": "bpgo_video.policies.wan:original_name",
}


def family(path: Path, name: str | None = None) -> Any:
    """The class of a pipeline folder's policy, such as `WanPolicy`.

    Args:
        name: a key of `FAMILIES`, or your own class as `my_pkg.module:Name`; None reads the folder's model_index.json.

    Raises:
        FileNotFoundError: no pipeline folder.
        ConfigError: an unknown family, or a pipeline that is made of other networks than the folder's; the message
            names those that fit.
    """
    index = path / "model_index.json"
    if not index.is_file():
        raise FileNotFoundError(f"{path} has no model_index.json; a policy is a diffusers pipeline folder")
    return family_of(str(path), read_json(index), name)


def family_of(folder: str, index: Mapping[str, Any], name: str | None = None) -> Any:
    """`family`, given the content of model_index.json; `folder` is its name in errors."""
    pipeline_class = index.get("_class_name")
    path = FAMILIES.get(name or pipeline_class or "", name or "")
    if ":" not in path:
        unknown = f"policy.family is {name!r}" if name else f"{folder} is a {pipeline_class}"
        raise ConfigError(
            f"{unknown}; known families are {sorted(FAMILIES)}. Write a class for it (docs/new_family.md) and name it "
            "in policy.family as 'my_pkg.module:Name'"
        )
    if name in FAMILIES and name != pipeline_class and not _takes_networks(name, index):
        networks = " and ".join(f"{'an' if part[0] in 'AEIOU' else 'a'} {part}" for part in _networks(index).values())
        fitting = [other for other in FAMILIES if _takes_networks(other, index)]
        raise ConfigError(
            f"policy.family is {name!r}, but {folder} holds {networks}; leave family out, or name one of {fitting}"
        )
    try:
        return resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"policy.family {path!r} cannot be imported: {error}") from error


def _networks(index: Mapping[str, Any]) -> dict[str, str]:
    """The class names of a folder's transformer and VAE."""
    return {part: index[part][1] for part in ("transformer", "vae") if index.get(part, [None])[0]}


def _takes_networks(name: str, index: Mapping[str, Any]) -> bool:
    """Whether diffusers' pipeline `name` takes a folder's networks, by its annotations."""
    parameters = inspect.signature(getattr(diffusers, name)).parameters
    kinds = {part: parameters[part].annotation for part in ("transformer", "vae")}
    names = {part: {one.__name__ for one in (get_args(kind) or (kind,))} for part, kind in kinds.items()}
    return all(network in names[part] for part, network in _networks(index).items())


def load_policy(
    folder: str,
    *,
    max_sequence_length: int,
    components: Collection[str] = COMPONENTS,
    dtype: torch.dtype = torch.float32,
    vae_dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    build: Build = from_pretrained,
    load: Load = load_frozen,
    name: str | None = None,
    options: Mapping[str, float] | None = None,
) -> Policy:
    """A policy from a diffusers pipeline.

    Args:
        folder: local folder, hub id, or `package:module/folder`.
        components: which networks to load, where the folder has them; the others are None.
        dtype: of transformers and text encoders.
        vae_dtype: of the VAE; by default fp32, as Wan's authors run it. Networks of sound compute in fp32.
        build: makes the transformers: `from_pretrained`, or the engine's sharded construction.
        load: makes the other networks.
        name: of the family; see `family`.
        options: the family's own settings, where they differ from the pipeline's; see `PolicyConfig.options`.

    Raises:
        FileNotFoundError: no such folder.
        ConfigError: an unknown family, or an option that it does not have; the message names those that it has.
    """
    path = resolve_folder(folder)
    unknown = set(components) - set(COMPONENTS)
    if unknown:
        raise ValueError(f"components {sorted(unknown)} are unknown; they are among {COMPONENTS}")
    policy_class, given = family(path, name), dict(options or {})
    if foreign := sorted(set(given) - set(policy_class.options)):
        raise ConfigError(
            f"policy.{foreign[0]} is {given[foreign[0]]}, but {policy_class.__name__} knows "
            f"{sorted(policy_class.options) or 'no such settings'}; leave it out"
        )
    policy_class.check(path)
    networks = networks_of(path)
    parts: dict[str, nn.Module | None] = dict.fromkeys(networks)
    for part, model_class in networks.items():
        component = component_of(part)
        if component not in components:
            continue
        if component == "transformer":
            parts[part] = build(model_class, path / part, dtype).to(device)
        else:
            network = load(model_class, path / part, torch.float32 if component == "vae" else dtype, device)
            parts[part] = prepare_vae(network, vae_dtype) if part == "vae" else network
    pipeline = policy_class.assemble(path, parts)
    policy: Policy = policy_class.variant(path)(path, pipeline, max_sequence_length)
    policy.options = {**policy_class.options, **given}
    return policy


def original_names(pipeline_class: str) -> Callable[[str], str]:
    """The function from a tensor's or layer's name in a pipeline's transformers to the name that ComfyUI uses.

    Raises:
        ConfigError: the names of this pipeline are unknown.
    """
    if pipeline_class not in ORIGINAL_NAMES:
        raise ConfigError(
            f"ComfyUI's names for a {pipeline_class} are unknown; known are {sorted(ORIGINAL_NAMES)}. Write --format "
            "lora or diffusers"
        )
    function: Callable[[str], str] = resolve_name(ORIGINAL_NAMES[pipeline_class])
    return function
