"""Of what shape is a policy? From its folder's configs, or from a table of published models that needs no download."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from bpgo_video.config.bpgo import ConfigError
from bpgo_video.paths import resolve_folder


@dataclass(frozen=True, eq=False)
class Model:
    """A diffusers video pipeline without its weights.

    Attributes:
        name: of the table, or the folder that it was read from.
        source: where its numbers come from.
        transformers: names of its transformers, all of one shape: two where experts share the denoising.
        transformer, vae: their config.json; `_class_name` is a class of diffusers.
        text_tokens: the length that the model was trained with; None where the folder does not tell.
        token_timesteps: each token has a noise level of its own.
        image_encoder_parameters: of the encoder of conditioning images; 0 where there is none.
    """

    name: str
    source: str
    transformers: tuple[str, ...]
    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    text_tokens: int | None = None
    token_timesteps: bool = False
    image_encoder_parameters: int = 0


@cache
def known_models() -> dict[str, Model]:
    """The table, by short names."""
    return {name: _from_table(name, dict(entry)) for name, entry in _table().items()}


@cache
def _table() -> dict[str, Any]:
    return json.loads(files(__package__).joinpath("models.json").read_text())


def _from_table(name: str, entry: dict[str, Any]) -> Model:
    del entry["hub"]
    return Model(name=name, transformers=tuple(entry.pop("transformers")), **entry)


def find_model(name: str) -> Model:
    """A model by its short name, its hub id or its folder; those of the table are not downloaded.

    Raises:
        ConfigError: a name that is neither known nor a folder; the message lists what is known.
    """
    for short, entry in _table().items():
        if name in (short, *entry["hub"]):
            return known_models()[short]
    try:
        return _from_folder(name)
    except FileNotFoundError as error:
        raise ConfigError(f"{error}; known without a download are {sorted(known_models())}") from error


@cache
def _from_folder(name: str) -> Model:
    folder = resolve_folder(name, only=["*.json"])
    index = json.loads((folder / "model_index.json").read_text())
    configs = {part: folder / part / "config.json" for part in ("transformer", "transformer_2", "vae")}
    present = tuple(part for part in ("transformer", "transformer_2") if configs[part].is_file())
    return Model(
        name=name,
        source=str(folder),
        transformers=present,
        transformer=json.loads(configs["transformer"].read_text()),
        vae=json.loads(configs["vae"].read_text()),
        token_timesteps=bool(index.get("expand_timesteps")),
        image_encoder_parameters=_stored_parameters(folder / "image_encoder"),
    )


def _stored_parameters(folder: Path) -> int:
    """Of a part of a pipeline, from the shapes in its config; 0 where the part is absent."""
    if not (folder / "config.json").is_file():
        return 0
    from transformers import AutoConfig, AutoModel  # slow to import, and few pipelines have such a part

    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.from_pretrained(folder))
    return sum(parameter.numel() for parameter in model.parameters())
