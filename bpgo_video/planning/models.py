"""Models without their weights, for plans: found by name in a table, or read from a folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import diffusers
import torch

from bpgo_video.config.bpgo import ConfigError
from bpgo_video.files import resolve_folder
from bpgo_video.policies import Policy, family_of
from bpgo_video.policies.networks import repeated_blocks
from bpgo_video.weights import WeightsError, read_json, without_weights

TRAIN_TIMESTEPS = 1000
SCHEDULER = SimpleNamespace(  # its numbers change values, not the shapes of the transformer's inputs
    config=SimpleNamespace(num_train_timesteps=TRAIN_TIMESTEPS), alphas_cumprod=torch.linspace(1, 0, TRAIN_TIMESTEPS)
)


@dataclass(frozen=True, eq=False)
class Model:
    """A diffusers video pipeline without its weights.

    Attributes:
        name: in the table, or the folder that it was read from.
        source: where its numbers come from.
        index: its model_index.json without the parts: the pipeline's `_class_name`, and settings.
        transformers: names of its transformers, all of one shape: two if experts share the denoising.
        transformer, vae: their config.json; `_class_name` is a class of diffusers.
        text_tokens: the length that the model was trained with; None for a folder, which does not state it.
        image_encoder_parameters: of the encoder of conditioning images; 0 if there is none.
        folder: that it was read from; None for the table.
        hub: ids of the hub's repositories that hold it, and folders of shipped recipes that hold its shapes.
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
    hub: Sequence[str] = ()


@cache
def known_models() -> dict[str, Model]:
    """The table by short names."""
    table = json.loads(files(__package__).joinpath("models.json").read_text("utf-8"))
    return {
        name: Model(name, **{**entry, "transformers": tuple(entry["transformers"])}) for name, entry in table.items()
    }


def find_model(name: str) -> Model:
    """A model by its short name, its hub id or its folder; those of the table are not downloaded.

    Raises:
        ConfigError: neither a known name nor a folder; the message lists the known names.
    """
    for model in known_models().values():
        if name in (model.name, *model.hub):
            return model
    try:
        return _from_folder(name)
    except FileNotFoundError as error:
        raise ConfigError(f"{error}; known without a download are {sorted(known_models())}") from error


@cache
def _from_folder(name: str) -> Model:
    folder = resolve_folder(name, only=["*.json"])
    configs = {
        part: read_json(folder / part / "config.json")
        for part in ("transformer", "transformer_2", "vae")
        if (folder / part / "config.json").is_file()
    }
    for part, config in configs.items():
        network = without_weights(diffusers_class(config), folder / part)
        if part != "vae" and not repeated_blocks(network):
            raise WeightsError(f"{folder / part}/config.json makes a transformer without blocks; correct its layers")
    return Model(
        name=name,
        source=str(folder),
        index=read_json(folder / "model_index.json"),
        transformers=tuple(part for part in configs if part != "vae"),
        transformer=configs["transformer"],
        vae=configs["vae"],
        image_encoder_parameters=_parameters(folder / "image_encoder"),
        folder=folder,
    )


def _parameters(folder: Path) -> int:
    """The number of parameters of a part from its config; 0 if the part is absent."""
    if not (folder / "config.json").is_file():
        return 0
    from transformers import AutoConfig, AutoModel  # slow to import, and few pipelines have such a part

    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.from_pretrained(folder))
    return sum(parameter.numel() for parameter in model.parameters())


@cache
def policy_of(model: Model, family: str | None, max_sequence_length: int) -> Policy:
    """The model's policy without networks, with a stand-in for the scheduler.

    Raises:
        ConfigError: an unknown family, or one that is no `Policy`.
    """
    parts = {**dict.fromkeys(model.transformers, model.transformer), "vae": model.vae}
    index = {**model.index, **{name: ["diffusers", config["_class_name"]] for name, config in parts.items()}}
    policy_class = family_of(model.name, index, family)
    if not issubclass(policy_class, Policy):
        raise ConfigError(f"policy.family {family!r} is no subclass of bpgo_video.policies.Policy, so it has no plan")
    networks: dict[str, Any] = dict.fromkeys(model.transformers)
    pipeline = SimpleNamespace(**networks, scheduler=SCHEDULER, config=SimpleNamespace(boundary_ratio=None))
    with _folder_of(model, index, parts) as folder:
        return policy_class.variant(folder)(folder, pipeline, max_sequence_length)


@contextmanager
def _folder_of(model: Model, index: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]]) -> Iterator[Path]:
    """A pipeline folder without weights: the model's own, or one written from the table."""
    if model.folder is not None:
        yield model.folder
        return
    with TemporaryDirectory() as scratch:
        (Path(scratch) / "model_index.json").write_text(json.dumps(index), "utf-8")
        for name, config in parts.items():
            (Path(scratch) / name).mkdir()
            (Path(scratch) / name / "config.json").write_text(json.dumps(dict(config)), "utf-8")
        yield Path(scratch)


def diffusers_class(config: Mapping[str, Any]) -> Any:
    """The class of diffusers that a config.json names.

    Raises:
        ConfigError: the installed diffusers has no such class.
    """
    name = config["_class_name"]
    if not hasattr(diffusers, name):
        raise ConfigError(f"the installed diffusers {diffusers.__version__} has no {name}; install a newer one")
    return getattr(diffusers, name)
