"""Is an export what was to be written? Loaded by diffusers, compared tensor by tensor, and by one forward pass.

The forward pass is that of the policy whose base weights were replaced, in memory, by what the checkpoint says. One
transformer is in memory at a time.
"""

from __future__ import annotations

import filecmp
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from tqdm import tqdm

from bpgo_video.config.bpgo import LoraConfig
from bpgo_video.distributed.precision import tensor_files
from bpgo_video.distributed.zero_files import CheckpointError
from bpgo_video.inference.lora_files import load_lora
from bpgo_video.inference.model_card import CARD
from bpgo_video.inference.pipeline_folder import WEIGHTS_NAME
from bpgo_video.inference.run_weights import Source, put_into, read_tensors
from bpgo_video.policies import family, load_policy
from bpgo_video.policies.lora import ADAPTER
from bpgo_video.policies.networks import Transformers, networks_of, transformer_names
from bpgo_video.rollouts.conditioning import cast

NOISE_LEVELS = (0.7, 0.99, 0.05)  # one for each transformer of a pipeline with several
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of a forward pass, relative; merging and adding round apart


def verify_transformer(expected: Iterable[tuple[str, Tensor]], folder: Path) -> Any:
    """Load a transformer's folder through diffusers and compare its tensors with `expected`; what was loaded.

    Raises:
        CheckpointError: names a tensor that differs, is missing, or should not be there.
    """
    module = load_transformer(folder)
    found = {name: tensor for name, tensor in module.state_dict().items() if not tensor.is_meta}  # else not in the file
    compared = set()
    for name, tensor in expected:
        if name not in found or not torch.equal(found[name].float(), tensor.float()):  # some load as fp32 on purpose
            raise CheckpointError(f"{folder}: {name}, as diffusers loads it, is not the checkpoint's")
        compared.add(name)
    if foreign := sorted(set(found) - compared):
        raise CheckpointError(f"{folder}: diffusers loads {foreign[:3]}, which the checkpoint does not have")
    return module


def verify_copies(base: Path, output: Path, trained: Sequence[str]) -> None:
    """Everything in a pipeline folder but the trained weights and the card is as in the base folder.

    Raises:
        CheckpointError: names the file that differs.
    """
    for file in (path for path in output.rglob("*") if path.is_file()):
        relative = file.relative_to(output)
        ours = relative == Path(CARD) or (str(relative.parent) in trained and file.name.startswith(WEIGHTS_NAME))
        if not ours and not filecmp.cmp(file, base / relative, shallow=False):
            raise CheckpointError(f"{file} is not a copy of {base / relative}")


def load_transformer(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """A transformer's folder as diffusers loads it, by default in the narrowest dtype on disk."""
    model_class = getattr(diffusers, json.loads((folder / "config.json").read_text("utf-8"))["_class_name"])
    if dtype is None:
        tensors = read_tensors(tensor_files(folder, model_class))
        dtype = min((tensor.dtype for _, tensor in tensors), key=lambda one: one.itemsize)
    return model_class.from_pretrained(folder, torch_dtype=dtype)


def load_single_file(file: Path, config_folder: Path, dtype: torch.dtype) -> Any:
    """A transformer in one file of its authors' names, as diffusers loads it."""
    model_class = getattr(diffusers, json.loads((config_folder / "config.json").read_text("utf-8"))["_class_name"])
    return model_class.from_single_file(str(file), config=str(config_folder), torch_dtype=dtype)


def verify_adapters(adapters: Mapping[str, Tensor], lora: LoraConfig, source: Source, name: str, file: Path) -> Any:
    """Load adapters through diffusers, on the base model, and compare what each adds to its layer, alpha/rank B A.

    Args:
        adapters: in fp32 or as they were rounded for the file.
        file: what `load_lora_weights` is given.

    Raises:
        CheckpointError: names the layer that differs.
    """
    transformer = load_transformer(source.base / name, next(iter(adapters.values())).dtype)
    load_lora(pipeline_around(source, transformer), file, name)
    layers = {key: layer for key, layer in transformer.named_modules() if isinstance(layer, LoraLayer)}
    expected = {key.partition(".lora_")[0] for key in adapters}
    if missing := sorted(expected - set(layers)):
        raise CheckpointError(f"{file}: diffusers does not adapt layers {missing[:3]}")
    for key, layer in tqdm(layers.items(), desc="Comparing", unit="layer"):
        added = layer.get_delta_weight(ADAPTER).float()
        wanted = torch.zeros_like(added)  # of layers that diffusers adapts on its own, as it does Wan's image keys
        if key in expected:
            down, up = (adapters[f"{key}.lora_{half}.{ADAPTER}.weight"].float() for half in "AB")
            wanted = lora.alpha / lora.rank * (up @ down)
        if not torch.linalg.norm(added - wanted) <= TOLERANCE[transformer.dtype] * torch.linalg.norm(wanted):
            raise CheckpointError(f"{file}: {key}, as diffusers loads it, is not the checkpoint's adapter")
    return transformer


def pipeline_around(source: Source, transformer: Any) -> Any:
    """diffusers' pipeline of the base folder with this transformer in place of each; no other weights are read."""
    parts = dict.fromkeys(networks_of(source.base)) | dict.fromkeys(transformer_names(source.base), transformer)
    return family(source.base, source.config.policy.family).assemble(source.base, parts)


def forward(source: Source, name: str, transformer: Any) -> Tensor:
    """The velocity of the policy's smallest input under these weights, at a noise level of that transformer."""
    asked = source.config.policy
    policy = load_policy(
        str(source.base), max_sequence_length=1, components=(), name=asked.family, options=asked.options
    )
    latents, conditioning = policy.example()
    policy.transformers = Transformers({name: transformer.eval()})
    sigma = next(level for level in NOISE_LEVELS if policy.transformer_at(level) == name)
    with torch.no_grad():
        return policy.velocity(latents, torch.tensor(sigma), cast(conditioning, transformer.dtype))


def expected_forward(source: Source, name: str, trained: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """`forward` under the base transformer's weights, replaced by the checkpoint's."""
    transformer = load_transformer(source.base / name, dtype)
    put_into(transformer, source, name, trained, dtype)
    return forward(source, name, transformer)


def compare_forward(found: Tensor, expected: Tensor, dtype: torch.dtype, output: Path) -> float:
    """The relative error of an export's forward pass.

    Raises:
        CheckpointError: it is larger than rounding.
    """
    error = float((found - expected).norm() / expected.norm())
    if not error <= TOLERANCE[dtype]:
        raise CheckpointError(
            f"{output}: its forward pass is {error:.2g} off the checkpoint's; rounding is {TOLERANCE[dtype]}"
        )
    return error
