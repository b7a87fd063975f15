"""Samples on their way from noise to data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from bpgo_video.diffusion import sde
from bpgo_video.types import Latents, Velocity

Of = TypeVar("Of")
Known = tuple[Tensor, Of] | None  # numbers of each sample, and what they are of


class PartialPath(NamedTuple):
    """Samples that are denoised up to the start of denoising step `step`.

    Attributes:
        points: latents of the noise levels so far; only the last if the denoiser records no path.
        previous: the ODE step that led here; None at the start and after a stochastic step.
        guided: v_towards - v_away of the guidance and the ODE step that computed it, if later ones may use it.
        scheduler: the samples' own copy of the denoiser's, which remembers its steps.
    """

    points: tuple[Latents, ...]
    step: int = 0
    previous: sde.OdeStep | None = None
    guided: tuple[Velocity, int] | None = None
    scheduler: Any = None

    @property
    def latents(self) -> Latents:
        return self.points[-1]

    def part(self, rows: slice) -> PartialPath:
        """Some of the samples, as views."""
        points = tuple(point[rows] for point in self.points)
        return self._replace(points=points, previous=_rows(self.previous, rows), guided=_rows(self.guided, rows))


def joined(paths: Sequence[PartialPath]) -> PartialPath:
    """The samples of paths of one denoiser to the same step."""
    if len(paths) == 1:
        return paths[0]
    points = tuple(torch.cat(level) for level in zip(*(path.points for path in paths), strict=True))
    previous, guided = _joined([path.previous for path in paths]), _joined([path.guided for path in paths])
    return paths[0]._replace(points=points, previous=previous, guided=guided)


def _rows(known: Known[Of], rows: slice) -> Known[Of]:
    return None if known is None else (known[0][rows], known[1])


def _joined(known: Sequence[Known[Of]]) -> Known[Of]:
    given = [one for one in known if one is not None]
    return (torch.cat([numbers for numbers, _ in given]), given[0][1]) if given else None
