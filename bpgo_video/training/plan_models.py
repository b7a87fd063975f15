"""Of what shape is a policy? From its folder's configs, or from a table of published models that needs no download."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch

from bpgo_video.config.bpgo import ConfigError, PolicyConfig
from bpgo_video.paths import resolve_folder
from bpgo_video.policies import Policy, family_of
from bpgo_video.policies.pipeline_policy import PipelinePolicy


@dataclass(frozen=True, eq=False)
class Model:
    """A diffusers video pipeline without its weights.

    Attributes:
        name: of the table, or the folder that it was read from.
        source: where its numbers come from.
        index: its model_index.json but for the parts: the pipeline's `_class_name`, and settings.
        transformers: names of its transformers, all of one shape: two where experts share the denoising.
        transformer, vae: their config.json; `_class_name` is a class of diffusers.
        text_tokens: the length that the model was trained with; None where the folder does not tell.
        image_encoder_parameters: of the encoder of conditioning images; 0 where there is none.
        folder: that it was read from; None of the table.
    """

    name: str
    source: str
    index: Mapping[str, Any]
    transformers: tuple[str, ...]
    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    text_tokens: int | None = None
    image_encoder_parameters: int = 0
    folder: Path | None = None


@cache
def known_models() -> dict[str, Model]:
    """The table, by short names."""
    return {name: _from_table(name, dict(entry)) for name, entry in _table().items()}


@cache
def _table() -> dict[str, Any]:
    return json.loads(files(__package__).joinpath("plan_models.json").read_text("utf-8"))


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
    index = json.loads((folder / "model_index.json").read_text("utf-8"))
    configs = {part: folder / part / "config.json" for part in ("transformer", "transformer_2", "vae")}
    present = tuple(part for part in ("transformer", "transformer_2") if configs[part].is_file())
    return Model(
        name=name,
        source=str(folder),
        index=index,
        transformers=present,
        transformer=json.loads(configs["transformer"].read_text("utf-8")),
        vae=json.loads(configs["vae"].read_text("utf-8")),
        image_encoder_parameters=_stored_parameters(folder / "image_encoder"),
        folder=folder,
    )


def _stored_parameters(folder: Path) -> int:
    """Of a part of a pipeline, from the shapes in its config; 0 where the part is absent."""
    if not (folder / "config.json").is_file():
        return 0
    from transformers import AutoConfig, AutoModel  # slow to import, and few pipelines have such a part

    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.from_pretrained(folder))
    return sum(parameter.numel() for parameter in model.parameters())


def described(model: Model, settings: PolicyConfig) -> Policy:
    """The model as its family's policy without any network or scheduler: what it makes of the configs.

    Raises:
        ConfigError: a family that is not known, or one that does not say by configs what it samples.
    """
    found = family_of(model.name, _index(model), settings.family)
    if not issubclass(found, PipelinePolicy):
        raise ConfigError(f"{found.__name__} is no PipelinePolicy: what it samples is not known without its weights")
    with _configs(model) as folder:
        empty = SimpleNamespace(**dict.fromkeys(model.transformers))
        policy: Any = found.variant(folder)(folder, empty, settings.max_sequence_length)
    known: Policy = policy
    return known


def _parts(model: Model) -> dict[str, Mapping[str, Any]]:
    """The configs of its transformers and VAE."""
    return {**dict.fromkeys(model.transformers, model.transformer), "vae": model.vae}


def _index(model: Model) -> dict[str, Any]:
    """Its model_index.json, with their classes."""
    return {**model.index, **{name: ["diffusers", config["_class_name"]] for name, config in _parts(model).items()}}


@contextmanager
def _configs(model: Model) -> Iterator[Path]:
    """A pipeline folder without weights: the model's own, or one that is written from the table."""
    if model.folder is not None:
        yield model.folder
        return
    with TemporaryDirectory() as scratch:
        (Path(scratch) / "model_index.json").write_text(json.dumps(_index(model)), "utf-8")
        for name, config in _parts(model).items():
            (Path(scratch) / name).mkdir()
            (Path(scratch) / name / "config.json").write_text(json.dumps(dict(config)), "utf-8")
        yield Path(scratch)
