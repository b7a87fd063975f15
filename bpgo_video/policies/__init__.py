"""Which families of policies are there, and how is one loaded?

policy = load_policy("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", max_sequence_length=512)
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, get_args

import diffusers
import torch

from bpgo_video.config.bpgo import ConfigError
from bpgo_video.paths import resolve_folder
from bpgo_video.policies.base import Build, Policy, from_pretrained, guided_velocity
from bpgo_video.policies.pipeline_policy import COMPONENTS

__all__ = ["FAMILIES", "Policy", "family", "guided_velocity", "load_policy"]

FAMILIES: dict[str, str] = {  # diffusers' name of a pipeline -> who makes a policy of it; read when it is asked for
    "WanPipeline": "bpgo_video.policies.wan:WanPolicy",
    "WanImageToVideoPipeline": "bpgo_video.policies.wan_image:WanImagePolicy",
    "LTXPipeline": "bpgo_video.policies.ltx:LTXPolicy",
    "LTXImageToVideoPipeline": "bpgo_video.policies.ltx_image:LTXImagePolicy",
    "HunyuanVideoPipeline": "bpgo_video.policies.hunyuan:HunyuanVideoPolicy",
    "HunyuanVideoImageToVideoPipeline": "bpgo_video.policies.hunyuan_image:HunyuanImagePolicy",
    "HunyuanVideo15Pipeline": "bpgo_video.policies.hunyuan15:HunyuanVideo15Policy",
    "HunyuanVideo15ImageToVideoPipeline": "bpgo_video.policies.hunyuan15_image:HunyuanVideo15ImagePolicy",
    "CogVideoXPipeline": "bpgo_video.policies.cogvideox:CogVideoXPolicy",
    "CogVideoXImageToVideoPipeline": "bpgo_video.policies.cogvideox_image:CogVideoXImagePolicy",
    "MochiPipeline": "bpgo_video.policies.mochi:MochiPolicy",
    "Kandinsky5T2VPipeline": "bpgo_video.policies.kandinsky5:Kandinsky5Policy",
    "Kandinsky5I2VPipeline": "bpgo_video.policies.kandinsky5_image:Kandinsky5ImagePolicy",
}


def family(path: Path, name: str | None = None) -> Any:
    """The class of a pipeline folder's policy, such as `WanPolicy`.

    Args:
        name: a key of `FAMILIES`, or a class of the user's own as `my_pkg.module:Name`; None takes what the folder's
            model_index.json says.

    Raises:
        FileNotFoundError: no pipeline folder.
        ConfigError: a family that is not known, or one of diffusers' pipelines that is made of other networks than the
            folder's; the message names those that can be, and the way out.
    """
    index = path / "model_index.json"
    if not index.is_file():
        raise FileNotFoundError(f"{path} holds no model_index.json; a policy is a diffusers pipeline folder")
    return family_of(str(path), json.loads(index.read_text("utf-8")), name)


def family_of(what: str, index: Mapping[str, Any], name: str | None = None) -> Any:
    """`family` of what a model_index.json holds; `what` is its folder's name in errors."""
    pipeline_class = index.get("_class_name")
    place = FAMILIES.get(name or pipeline_class or "", name or "")
    if ":" not in place and name:
        raise ConfigError(
            f"policy.family is {name!r}; known are {sorted(FAMILIES)}, or a class of your own as 'my_pkg.module:Name' "
            "(docs/new_family.md)"
        )
    if ":" not in place:
        raise ConfigError(
            f"{what} is a {pipeline_class}; known families are {sorted(FAMILIES)}. Write a class for it "
            "(docs/new_family.md) and name it in policy.family as 'my_pkg.module:Name'"
        )
    if name in FAMILIES and name != pipeline_class and not _is_made_of(name, index):
        held = " and ".join(f"{'an' if part[0] in 'AEIOU' else 'a'} {part}" for part in _networks(index).values())
        fitting = [other for other in FAMILIES if _is_made_of(other, index)]
        raise ConfigError(
            f"policy.family is {name!r}, but {what} holds {held}; leave family out, or name one of {fitting}"
        )
    try:
        return resolve_name(place)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"policy.family {place!r} cannot be imported: {error}") from error


def _networks(index: Mapping[str, Any]) -> dict[str, str]:
    """The classes of a folder's transformer and VAE, where its model_index.json names them."""
    return {part: index[part][1] for part in ("transformer", "vae") if index.get(part, [None])[0]}


def _is_made_of(name: str, index: Mapping[str, Any]) -> bool:
    """Whether diffusers' pipeline of that name takes a folder's networks."""
    taken = inspect.signature(getattr(diffusers, name)).parameters
    classes = {part: taken[part].annotation for part in ("transformer", "vae")}
    names = {part: {one.__name__ for one in (get_args(kind) or (kind,))} for part, kind in classes.items()}
    return all(network in names[part] for part, network in _networks(index).items())


def load_policy(
    folder: str,
    *,
    max_sequence_length: int,
    components: Collection[str] = COMPONENTS,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    build: Build = from_pretrained,
    name: str | None = None,
    options: Mapping[str, float] | None = None,
) -> Policy:
    """A policy from a diffusers pipeline.

    Args:
        folder: local folder, hub id, or `package:module/folder`.
        components: which heavy parts to load, where the folder has them; what is absent raises when it is asked for.
        dtype: of the transformers and the text encoders; the VAE stays in fp32, as Wan's authors run it.
        build: how the trained modules come into being: `from_pretrained`, or the engine's sharded construction.
        name: of the family; see `family`.
        options: of the family's own settings, those that are not to be its pipeline's; see `PolicyConfig.options`.

    Raises:
        FileNotFoundError: no such folder.
        ConfigError: a family that is not known, or an option that it does not have; the message names those that are.
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
    policy: Policy = policy_class.load(
        path, max_sequence_length, frozenset(components), dtype, torch.device(device), build
    )
    policy.options = {**policy_class.options, **given}
    return policy
