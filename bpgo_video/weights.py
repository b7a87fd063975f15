"""Networks from their folders: every weight is there, is used, has its shape, and is a finite floating-point number.

diffusers and transformers fill missing weights at random, skip unknown ones, and round integers and unscaled 8-bit
numbers into weights. All of these are errors here.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig

from bpgo_video.documents import MalformedFile, plain_json
from bpgo_video.errors import InputError, some_of

LIBRARIES = {"diffusers": "torch_dtype", "transformers": "dtype"}  # library -> its from_pretrained argument for a dtype
FLOATS = ("F64", "F32", "F16", "BF16")  # dtypes of weights in a safetensors header
NAMES = ("diffusion_pytorch_model", "model")  # of weight files, without their endings
OF_CONFIGS = (  # what a class may raise for a config that makes no network
    *(ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError),
    StrictDataclassError,
)
AGAIN = "download the folder again, or name another one"

# What a folder may hold although its network has no such weight. Everything else that is unknown is refused: it may be
# a sign of a config.json with fewer layers than were trained.
# Last words of buffers that classes compute themselves, and that their older versions stored:
BUFFERS = ("position_ids", "inv_freq", "original_inv_freq", "masked_bias", "_extra_state")
CLIP_HEADS = ("text_projection.", "visual_projection.", "logit_scale")
BESIDES = {  # an encoder -> parts of the larger models that it is taken from, which it never runs
    "CLIPTextModel": ("vision_model.", *CLIP_HEADS),  # of openai/clip-vit-large-patch14
    "CLIPTextModelWithProjection": ("vision_model.", *CLIP_HEADS),
    "CLIPVisionModel": ("text_model.", *CLIP_HEADS),  # Wan 2.1 image-to-video publishes it with its projection
    "CLIPVisionModelWithProjection": ("text_model.", *CLIP_HEADS),
    "LlamaModel": ("lm_head.",),
    "Qwen2_5_VLTextModel": ("visual.", "model.visual.", "lm_head."),
    "SiglipVisionModel": ("text_model.", "logit_scale", "logit_bias"),
    "T5EncoderModel": ("decoder.", "lm_head."),
    "UMT5EncoderModel": ("decoder.", "lm_head."),
}

Shape = Sequence[int]
Mismatch = tuple[str, Shape, Shape]  # a tensor, its shape in the files, its shape in the network


class WeightsError(InputError):
    """A model folder does not hold the weights that it claims to hold."""


def load_network(
    network: Any, source: Path, dtype: torch.dtype, unused: Sequence[str] = (), *,
    whole: bool = True, config: Any = None, weights: Mapping[str, Tensor] | None = None,
) -> nn.Module:  # fmt: skip
    """The class `network`: from the folder `source`, or of `config` with `weights` converted from it.

    Args:
        network: a class of diffusers or transformers.
        unused: prefixes of parameters that may be missing.
        whole: whether all of the folder's weights must be used; False takes a part of a larger network's.

    Raises:
        WeightsError: see `check_names`, `check_finite`, `weight_files` and `without_weights`, or a weight is no float.
    """
    given: dict[str, Any] = {"config": config, "state_dict": weights}
    stored: dict[str, str] = {}
    if weights is None:
        without_weights(network, source)
        given, stored = {}, {name: dtype for name, (dtype, _) in headers(weight_files(source)).items()}
    given[LIBRARIES[network.__module__.partition(".")[0]]] = dtype
    with _without_reports():
        model, loading = network.from_pretrained(
            source if weights is None else None, output_loading_info=True, ignore_mismatched_sizes=True, **given
        )
    missing = [name for name in loading["missing_keys"] if not name.startswith(tuple(unused))]
    skipped = loading["unexpected_keys"]
    unknown = skipped if whole or weights is not None else ()
    check_names(source, model, missing, unknown, loading["mismatched_keys"])
    integers = {name.rpartition(".")[2] for name, one in model.named_buffers() if not one.is_floating_point()}
    for name in sorted(set(stored) - set(skipped)):
        if name.rpartition(".")[2] not in integers:
            check_dtype(source, name, stored[name])
    check_finite(source, model.state_dict().items())
    loaded: nn.Module = model
    return loaded


def check_names(
    source: Path, network: nn.Module, missing: Iterable[str], unknown: Iterable[str], mismatched: Iterable[Mismatch]
) -> None:
    """Raise WeightsError for tensors that the files lack, that the network does not have, or of another shape."""
    name_of_class = type(network).__name__
    kind = f"{name_of_class} of its config.json"
    for name, found, needed in sorted(mismatched):
        raise WeightsError(f"{source}: {name} has shape {[*found]}, but the {kind} needs {[*needed]}; {AGAIN}")
    if lacking := set(missing):
        raise WeightsError(
            f"{source} does not hold a whole {name_of_class}: it lacks {len(lacking)} of the weights that its "
            f"config.json asks for, {some_of(lacking)}; {AGAIN}"
        )
    if extra := {name for name in unknown if not is_harmless(network, name)}:
        raise WeightsError(f"{source} holds weights that the {kind} does not have: {some_of(extra)}; {AGAIN}")


def is_harmless(network: nn.Module, name: str) -> bool:
    """Whether a folder may hold the tensor `name`, which is no weight of the network.

    That is a buffer that the network computes itself, or a part of the larger model that an encoder is taken from. An
    encoder's own weights still have to be there, all of them, so such a part changes no result: Wan 2.1's
    image-to-video folders name a CLIPVisionModel, and hold it with a projection (huggingface/diffusers#11007).
    """
    computed = name.rpartition(".")[2] in BUFFERS or name in dict(network.named_buffers())
    return computed or name.startswith(BESIDES.get(type(network).__name__, ()))


def check_finite(source: Path, tensors: Iterable[tuple[str, Tensor]], way_out: str = AGAIN) -> None:
    """Raise WeightsError for the first tensor with a NaN or an infinity; reads each once and holds no copy."""
    for name, tensor in tensors:
        if tensor.is_meta or not tensor.is_floating_point() or not tensor.numel():
            continue
        for value in (float(extreme) for extreme in torch.aminmax(tensor)):  # a NaN is both extremes
            if not math.isfinite(value):
                raise WeightsError(f"{source}: {name} holds {value}, but weights must be finite numbers; {way_out}")


def check_stored(network: Any, folder: Path, files: Mapping[str, Path]) -> dict[str, Path]:
    """Check a diffusers model's safetensors files against its config, by their headers alone.

    Args:
        files: the file of each tensor.

    Returns:
        `files` of the model's own tensors.

    Raises:
        WeightsError: see `check_names`, or a weight is no floating-point number.
    """
    model = without_weights(network, folder)
    needed: dict[str, Tensor] = model.state_dict()
    mismatched, stored = [], headers(set(files.values()))
    for name in sorted(needed.keys() & files):
        dtype, shape = stored[name]
        if needed[name].is_floating_point():
            check_dtype(folder, name, dtype)
        if shape != tuple(needed[name].shape):
            mismatched.append((name, shape, needed[name].shape))
    check_names(folder, model, needed.keys() - files, files.keys() - needed, mismatched)
    return {name: file for name, file in files.items() if name in needed}


def check_dtype(source: Path, name: str, dtype: str, way_out: str = AGAIN) -> None:
    """Raise WeightsError for a dtype of integers, or of 8 bits, which are no weights without a scale."""
    if dtype not in FLOATS:
        raise WeightsError(f"{source}: {name} is {dtype}, but weights must be {', '.join(FLOATS)}; {way_out}")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a network, by its index if it has one; none for weights in another format.

    Raises:
        WeightsError: there are no weights, or the index is damaged or names a file that is missing.
    """
    for name in NAMES:
        index = folder / f"{name}.safetensors.index.json"
        if index.is_file():
            files = sorted({folder / file for file in dict(read_json(index).get("weight_map", {})).values()})
            if absent := [path.name for path in files if not path.is_file()]:
                raise WeightsError(f"{folder} lacks {some_of(absent)}, which its {index.name} names; {AGAIN}")
            return files
    single = (folder / f"{name}.safetensors" for name in NAMES)
    found = [path for path in single if path.is_file()] or sorted(folder.glob("*.safetensors"))
    if not found and not any(folder.glob("*.bin")):
        raise WeightsError(f"{folder} holds no weights, which are .safetensors files; {AGAIN}")
    return found


def headers(files: Iterable[Path]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The dtype, as safetensors names it, and the shape of every tensor of some files; reads no values.

    Raises:
        WeightsError: a file is damaged.
    """
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no dictionary
                found |= {name: (one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()}
        except SafetensorError as error:
            raise WeightsError(f"{path} is damaged ({error}); download it again") from None
    return found


def without_weights(network: Any, folder: Path) -> nn.Module:
    """The network of the folder's config.json, with parameters on the meta device and its own buffers.

    Raises:
        WeightsError: the config does not make such a network.
    """
    read_config(folder, network)
    try:
        with init_empty_weights(include_buffers=False):
            if hasattr(network, "load_config"):
                return network.from_config(network.load_config(folder))
            if hasattr(network, "config_class"):
                return network(network.config_class.from_pretrained(folder))
            return network.from_config(AutoConfig.from_pretrained(folder))  # AutoModel
    except OF_CONFIGS as error:
        words = " ".join(str(error).split())
        raise WeightsError(
            f"{folder / config_name(network)} makes no {network.__name__} ({type(error).__name__}: {words}); {AGAIN}"
        ) from error


def config_name(network: Any) -> str:
    return getattr(network, "config_name", "config.json")


def read_config(folder: Path, network: Any) -> dict[str, Any]:
    """A part's config over its class's defaults: folders of an older diffusers lack newer settings.

    Raises:
        WeightsError: it is damaged, or has no number, or a negative one, in place of a positive number.
    """
    arguments = inspect.signature(network.__init__).parameters.values()
    defaults = {argument.name: argument.default for argument in arguments if argument.default is not argument.empty}
    file = folder / config_name(network)
    config = read_json(file)
    for name in sorted(config.keys() & defaults):
        value, default = config[name], defaults[name]
        counts = isinstance(default, int) and not isinstance(default, bool) and default > 0
        if counts and (isinstance(value, str) or (isinstance(value, int) and value < 0)):
            raise WeightsError(
                f"{file}: {name} is {value!r}, but it must be a number above 0, such as {default}; {AGAIN}"
            )
    return {**defaults, **config}


def read_json(file: Path) -> dict[str, Any]:
    """The content of a model's JSON file.

    Raises:
        WeightsError: it does not exist, is not JSON, or is no table.
    """
    try:
        content = plain_json(file.read_bytes(), file, finite=False)
    except FileNotFoundError:
        raise WeightsError(f"{file} does not exist; {AGAIN}") from None
    except MalformedFile as error:
        raise WeightsError(f"{error}; download it again") from None
    if not isinstance(content, dict):
        raise WeightsError(f"{file} holds {type(content).__name__} in place of a table; download it again")
    return content


@contextmanager
def _without_reports() -> Iterator[None]:
    """Hide the libraries' reports of a loading, which the errors here replace."""
    loggers = [logging.getLogger(library) for library in LIBRARIES]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
