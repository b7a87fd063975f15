"""Statistics of the videos themselves: how much they move, and how different the samples of a prompt are.

A policy that games its rewards often stops moving, or makes the same video in all samples of a prompt. Both numbers are
in units of pixel values, whose range is [0, 1].

    pixel_motion      mean |I_{t+1} - I_t| of a video
    pixel_diversity   of a sample: mean over the prompt's other samples of the RMS difference of their thumbnails

Thumbnails are means over cells of space and time: grain counts little; what is shown, where and when counts.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool3d

from bpgo_video.data.media import write_video
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.evaluation.compare_scores import Measure, ScoresFolder
from bpgo_video.training.heldout import Scores
from bpgo_video.types import RolloutChunk, Videos

MOTION, DIVERSITY = "pixel_motion", "pixel_diversity"
CELLS = (8, 16, 16)  # frames, rows and columns of a thumbnail, at most


def video_measures(num_frames: int, samples: int) -> dict[str, Measure]:
    """What can be measured of such videos: a single frame has no motion, a single sample no diversity."""
    found = {MOTION: num_frames > 1, DIVERSITY: samples > 1}
    return {name: Measure("video", "1") for name, possible in found.items() if possible}


def motion(videos: Videos) -> Float[Tensor, "samples"]:
    return videos.float().diff(dim=1).abs().mean(dim=(1, 2, 3, 4))


def thumbnails(videos: Videos) -> Float[Tensor, "samples cells"]:
    frames, _, height, width = videos.shape[1:]
    cells = (min(CELLS[0], frames), min(CELLS[1], height), min(CELLS[2], width))
    return adaptive_avg_pool3d(videos.float().transpose(1, 2), cells).flatten(1)


def diversity(small: Float[Tensor, "prompts samples cells"]) -> Scores:
    distances = torch.cdist(small, small, compute_mode="donot_use_mm_for_euclid_dist") / small.shape[2] ** 0.5
    return distances.sum(dim=2) / (small.shape[1] - 1)


class VideoStats:
    """Receives the videos of a block of prompts while they are scored, and writes the first sample of each.

    Args:
        folder: of the model's results.
        rows: of each prompt in the block, its place among all prompts.
    """

    def __init__(self, folder: ScoresFolder, rows: list[int], samples: int, fps: float) -> None:
        self._folder, self._rows, self._samples, self._fps = folder, rows, samples, fps
        self._items: list[int] = []
        self._motion: list[Tensor] = []
        self._small: list[Tensor] = []

    def __call__(self, chunk: RolloutChunk) -> None:
        self._items += (chunk.prompt_rows * self._samples + chunk.sample_index).tolist()
        self._motion.append(motion(chunk.videos))
        self._small.append(thumbnails(chunk.videos))
        for video, row, sample in zip(chunk.videos, chunk.prompt_rows, chunk.sample_index, strict=True):
            if sample == 0:
                write_video(self._folder.video(self._rows[int(row)]), video.cpu(), self._fps)

    def scores(self, mesh: Mesh) -> dict[str, Scores]:
        """Both statistics of all ranks' samples, on every rank; see `video_measures` for which mean something."""
        total = len(self._rows) * self._samples
        moves, small = (
            mesh.gather(torch.cat(parts), self._items, total).unflatten(0, (-1, self._samples)).cpu()
            for parts in (self._motion, self._small)
        )
        return {MOTION: moves, DIVERSITY: diversity(small)}
