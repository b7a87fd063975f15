"""The table of VBench's dimensions that are measured here: name, formula, networks."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from bpgo_video.evaluation import vbench_formulas as formulas
from bpgo_video.evaluation import vbench_networks as networks
from bpgo_video.evaluation import vbench_pixels as pixels
from bpgo_video.evaluation.vbench_formulas import DimensionError, Footage, Measured
from bpgo_video.evaluation.vbench_networks import CLIP_B32, CLIP_L14, DINO_B16, Network, Sources, of_encoder
from bpgo_video.evaluation.vbench_totals import BENCHMARKS


@dataclass(frozen=True)
class Dimension:
    """One dimension.

    Attributes:
        formula: of a network's `call` and a video.
        own: makes a `call` of what a user's factory returned; None: the formula needs no network.
        folder: builds a network from a folder, a file or a hub id.
        default: the network without --backbone; None: one must be named.
        short: networks by short name.
        usual: VBench's own network, for messages.
        scale: of the dimension's score relative to the videos' results.
        continues: whether videos are compared with the image that they continue.
    """

    name: str
    formula: Callable[[Any, Footage], Measured]
    own: Callable[[Any, Sources], Any] | None = None
    folder: Callable[[str, Sources], Network] | None = None
    default: str | None = None
    short: Mapping[str, Callable[[Sources], Network]] = field(default_factory=dict)
    usual: str = ""
    scale: float = 1.0
    continues: bool = False

    def network(self, requested: str | None, sources: Sources) -> Network:
        """The requested network, or the default one.

        Raises:
            DimensionError: none is named and there is no default; or it cannot be built.
        """
        if self.own is None:
            if requested is not None:
                raise DimensionError(f"{self.name} needs no network; remove --backbone {self.name}={requested}")
            return Network(None, "exact", "none")
        spec = requested or self.default
        kinds = [*self.short, *(["FOLDER, FILE or hub id"] if self.folder else []), "my_pkg.module:build"]
        usage = f"--backbone {self.name}={' | '.join(kinds)}"
        if spec is None:
            raise DimensionError(f"{self.name} needs {self.usual}: {usage}")
        try:
            if spec in self.short:
                return self.short[spec](sources)
            if is_dotted(spec):
                module, _, attribute = spec.partition(":")
                factory = getattr(importlib.import_module(module), attribute)
                return Network(self.own(factory(str(sources.device)), sources), "native", spec)
            if self.folder is not None:
                return self.folder(spec, sources)
        except (ImportError, AttributeError, TypeError, ValueError, OSError) as error:
            raise DimensionError(
                f"{self.name}: the network {spec!r} could not be built: {type(error).__name__}: {error}; {usage}"
            ) from error
        raise DimensionError(f"{self.name}: {spec!r} is not one of its networks; {usage}")


def is_dotted(spec: str) -> bool:
    """Whether `spec` is `module:attribute`, and no path or package data."""
    module, _, attribute = spec.partition(":")
    return attribute.isidentifier() and all(part.isidentifier() for part in module.split("."))


STAND_IN = {"efficientnet": networks.efficientnet}
VIDEO_TEXT: dict[str, Any] = {
    "own": networks.of_video_text,
    "folder": networks.xclip,
    "usual": "ViCLIP, or X-CLIP as a proxy",
}

# fmt: off
ROWS = (
    Dimension("subject_consistency", formulas.consistency, of_encoder(pixels.DINO),
              partial(networks.dino, pixels.DINO), DINO_B16, STAND_IN),
    Dimension("background_consistency", formulas.consistency, of_encoder(pixels.CLIP),
              networks.clip, CLIP_B32, STAND_IN),
    Dimension("temporal_flickering", formulas.flickering),
    Dimension("motion_smoothness", formulas.smoothness, networks.of_interpolator,
              usual="a frame interpolation (VBench's is AMT-S)"),
    Dimension("dynamic_degree", formulas.dynamic_degree, networks.of_flow, None, "dis", {"dis": networks.dis}),
    Dimension("aesthetic_quality", formulas.mean_points, networks.of_embedding, networks.clip_aesthetic, CLIP_L14),
    Dimension("imaging_quality", formulas.mean_points, networks.of_points, networks.musiq, scale=0.01,
              usual="MUSIQ's weights (VBench's file is musiq_spaq_ckpt-358bb6af.pth)"),
    Dimension("appearance_style", formulas.appearance, of_encoder(pixels.CLIP), networks.clip_text, CLIP_B32),
    Dimension("temporal_style", formulas.likeness, **VIDEO_TEXT),
    Dimension("overall_consistency", formulas.likeness, **VIDEO_TEXT),
    Dimension("i2v_subject", formulas.continuation, of_encoder(pixels.DINO_OF_IMAGES),
              partial(networks.dino, pixels.DINO_OF_IMAGES), DINO_B16, STAND_IN, continues=True),
    Dimension("i2v_background", formulas.continuation, of_encoder(pixels.DREAMSIM),
              short=STAND_IN, usual="DreamSim", continues=True),
    Dimension("camera_motion", formulas.camera_motion, networks.of_tracker,
              usual="point tracking (VBench's is CoTracker2)"),
)
# fmt: on
DIMENSIONS = {dimension.name: dimension for dimension in ROWS}


def find_dimension(name: str) -> Dimension:
    """
    Raises:
        DimensionError: only VBench's own package measures it, or it is no dimension.
    """
    if name in DIMENSIONS:
        return DIMENSIONS[name]
    if any(name in benchmark.dimensions for benchmark in BENCHMARKS.values()):
        raise DimensionError(f"{name} is measured only by VBench's own package: bpgo-video evaluate vbench")
    raise DimensionError(f"there is no dimension {name!r}; known are {', '.join(DIMENSIONS)}")
