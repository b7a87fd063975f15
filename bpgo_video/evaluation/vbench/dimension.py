"""What is a dimension? A number of one video, by VBench's formula, with the network that the formula stands on.

A network of one's own is a factory by its dotted path, `my_pkg.vbench:build`, called with the device (a string). What
it must return is in the docstring of each dimension's `adopt` function.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from bpgo_video.data.video import VideoError, read_header, read_pixels
from bpgo_video.evaluation.vbench.pixels import Frames
from bpgo_video.evaluation.vbench.suite import SuitePrompt
from bpgo_video.rewards.backbones import Backbones

Label = Literal["exact", "native", "proxy"]


class DimensionError(ValueError):
    """A dimension that cannot be measured; the message says what is needed."""


@dataclass(frozen=True)
class Footage:
    """One video as it is measured.

    Attributes:
        frames: RGB in the bytes of the file.
        image: what the video was to continue (image-to-video).
    """

    path: Path
    prompt: SuitePrompt
    frames: Frames
    fps: float
    image: Path | None = None

    def opened_image(self) -> Image.Image:
        if self.image is None:
            raise DimensionError(f"{self.path} continues no image; give the suite's images (--suite, --images)")
        return Image.open(self.image)


def read_footage(path: Path, prompt: SuitePrompt, image: Path | None = None) -> Footage:
    """
    Raises:
        VideoError: the file cannot be decoded, or holds fewer frames than it says.
    """
    pixels, fps = read_pixels(path)
    promised = read_header(path).frames
    if len(pixels) < promised:
        raise VideoError(f"{path} holds {len(pixels)} of {promised} frames; is it complete?")
    return Footage(path, prompt, torch.from_numpy(pixels).permute(0, 3, 1, 2), fps, image)


@dataclass(frozen=True)
class Measured:
    """What a dimension found in one video.

    Attributes:
        value: VBench's `video_results`.
        weight: how much the video counts in the dimension's score; VBench takes the mean over frames in some.
    """

    value: float | bool
    weight: float = 1.0


@dataclass(frozen=True)
class Network:
    """What a dimension's formula stands on.

    Attributes:
        call: as the dimension's formula calls it.
        label: exact (VBench's numbers, no network), native (VBench's formula and kind of network) or proxy.
        name: where it comes from; written beside the results.
    """

    call: Any
    label: Label
    name: str


@dataclass(frozen=True)
class Sources:
    """Where networks come from and go to.

    Attributes:
        head: file of the aesthetic head's weights.
    """

    device: torch.device
    backbones: Backbones = field(default_factory=Backbones)
    head: Path | None = None


NONE = Network(None, "exact", "none")


@dataclass(frozen=True)
class Dimension:
    """One dimension.

    Attributes:
        measure: the formula, of a network's `call` and a video.
        default: the network that is taken where none is named; None: one must be.
        named: networks by a short name.
        folder: builds one from a folder, a file or a hub id.
        adopt: makes a `call` of what a user's factory returned.
        usual: VBench's own network, for messages.
        scale: of the dimension's score to the videos' results.
    """

    measure: Callable[[Any, Footage], Measured]
    default: str | None = None
    named: Mapping[str, Callable[[Sources], Network]] = field(default_factory=dict)
    folder: Callable[[str, Sources], Network] | None = None
    adopt: Callable[[Any, Sources], Any] | None = None
    usual: str = ""
    scale: float = 1.0

    def network(self, name: str, asked: str | None, sources: Sources) -> Network:
        """The network that `asked` names, or the default one.

        Raises:
            DimensionError: none is named and there is no default; or it cannot be built.
        """
        if self.adopt is None and asked is None:
            return NONE
        if self.adopt is None:
            raise DimensionError(f"{name} stands on no network, and takes no --backbone {name}={asked}")
        spec = asked or self.default
        if spec is None:
            raise DimensionError(f"{name} needs {self.usual}: --backbone {name}={self.forms}")
        try:
            if spec in self.named:
                return self.named[spec](sources)
            if is_dotted(spec):
                return Network(self.adopt(build(spec, sources), sources), "native", spec)
            if self.folder is not None:
                return self.folder(spec, sources)
        except (ImportError, AttributeError, TypeError, ValueError, OSError) as error:
            raise DimensionError(
                f"{name}: the network {spec!r} could not be built: {type(error).__name__}: {error}; another one: "
                f"--backbone {name}={self.forms}"
            ) from error
        raise DimensionError(f"{name}: {spec!r} is no network of it; --backbone {name}={self.forms}")

    @property
    def forms(self) -> str:
        """What can be named, for messages."""
        folder = ["FOLDER, FILE or hub id"] if self.folder is not None else []
        return " | ".join([*self.named, *folder, "my_pkg.module:build"])


def is_dotted(spec: str) -> bool:
    """Whether `spec` is `module:attribute`, and no path or package data."""
    module, _, attribute = spec.partition(":")
    return attribute.isidentifier() and all(part.isidentifier() for part in module.split("."))


def build(spec: str, sources: Sources) -> Any:
    module, _, attribute = spec.partition(":")
    return getattr(importlib.import_module(module), attribute)(str(sources.device))
