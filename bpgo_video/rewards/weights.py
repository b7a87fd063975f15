"""What does a file of weights hold? Tensors by name; nothing else of a pickle is run."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


def read_weights(path: Path) -> dict[str, Tensor]:
    """Of a .safetensors file, or of one that torch.save wrote (a state dict, or one under the key `state_dict`).

    Raises:
        FileNotFoundError: no such file.
        ValueError: the pickle holds more than tensors.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    if path.suffix == ".safetensors":
        return load_file(path)
    found = unpickled(path)
    return found.get("state_dict", found)


def unpickled(path: Path) -> dict[str, Any]:
    """What torch.save wrote: tensors, and dictionaries of them.

    Raises:
        ValueError: the pickle holds more.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds more than tensors, and is not unpickled: {error}") from error
