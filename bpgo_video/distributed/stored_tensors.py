"""Which tensors does a model folder hold for its model, and in which safetensors files?"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor


def tensor_files(folder: Path, model_class: Any) -> dict[str, Path]:
    """Which safetensors file of a model folder holds each tensor that a diffusers model reads.

    What its class ignores is left out: Wan 2.1's image-to-video folders have a `norm_added_q` that no code uses.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found.update(dict.fromkeys(file.keys(), path))
    if not found:
        raise FileNotFoundError(f"{folder} holds no .safetensors file; convert the weights to safetensors first")
    ignored = model_class._keys_to_ignore_on_load_unexpected or ()
    return {name: path for name, path in found.items() if not any(re.search(pattern, name) for pattern in ignored)}


def stored(file: Path, name: str) -> Tensor:
    """One tensor of a safetensors file."""
    with safe_open(file, framework="pt") as opened:
        tensor: Tensor = opened.get_tensor(name)
        return tensor
