"""Which families of policies are there, and how is one loaded?

policy = load_policy("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", max_sequence_length=512)
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

import torch

from bpgo_video.config import ConfigError
from bpgo_video.paths import resolve_folder
from bpgo_video.policies.base import Build, Policy, from_pretrained, guided_velocity
from bpgo_video.policies.wan import WanPolicy
from bpgo_video.policies.wan_image import WanImagePolicy

__all__ = ["FAMILIES", "Policy", "family", "guided_velocity", "load_policy"]

FAMILIES: dict[str, type[WanPolicy]] = {"WanPipeline": WanPolicy, "WanImageToVideoPipeline": WanImagePolicy}
COMPONENTS = ("transformer", "text_encoder", "image_encoder", "vae")


def family(path: Path) -> type[WanPolicy]:
    """The class of a pipeline folder's policy.

    Raises:
        FileNotFoundError: no pipeline folder.
        ConfigError: a family that is not known; the message names those that are.
    """
    index = path / "model_index.json"
    if not index.is_file():
        raise FileNotFoundError(f"{path} holds no model_index.json; a policy is a diffusers pipeline folder")
    name = json.loads(index.read_text()).get("_class_name")
    if name not in FAMILIES:
        raise ConfigError(f"{path} is a {name}; known families are {sorted(FAMILIES)}")
    return FAMILIES[name]


def load_policy(
    folder: str,
    *,
    max_sequence_length: int,
    components: Collection[str] = COMPONENTS,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    build: Build = from_pretrained,
) -> Policy:
    """A policy from a diffusers pipeline; its family is what the folder's own model_index.json says.

    Args:
        folder: local folder, hub id, or `package:module/folder`.
        components: which heavy parts to load, where the folder has them; what is absent raises when it is asked for.
        dtype: of the transformer and the text encoder; the VAE stays in fp32, as Wan's authors run it.
        build: how the trained modules come into being: `from_pretrained`, or the engine's sharded construction.

    Raises:
        FileNotFoundError: no such folder.
        ConfigError: a family that is not known; the message names those that are.
    """
    path = resolve_folder(folder)
    unknown = set(components) - set(COMPONENTS)
    if unknown:
        raise ValueError(f"components {sorted(unknown)} are unknown; they are among {COMPONENTS}")
    return family(path).load(path, max_sequence_length, frozenset(components), dtype, torch.device(device), build)
