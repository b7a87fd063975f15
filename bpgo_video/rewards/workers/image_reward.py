"""ImageReward (arXiv 2304.05977) of frames, as a reward worker.

Follows the interface of the package `image-reward` 1.5. Tested with a stub of that interface, never with published
weights.

    python -m venv /opt/image-reward && /opt/image-reward/bin/pip install image-reward==1.5

    rewards:
      preference:
        model: worker
        options: {python: /opt/image-reward/bin/python, script: image_reward, settings: {frames: 8}}
"""

import os

import ImageReward
import torch
from reward_worker import serve


class ImageRewardOfFrames:
    """Scores of evenly spread frames; unbounded, standardised over human preferences. It reads 35 tokens of a prompt.

    Args:
        frames: of a video that are scored.
        model: name or file that `ImageReward.load` takes.
    """

    name = "image_reward"
    range = (-3.0, 3.0)  # of nearly all pictures

    def __init__(self, device, frames=8, model="ImageReward-v1.0"):
        self.frames = frames
        self.version = f"{os.path.basename(model)}-{frames}"
        self.model = ImageReward.load(model, device=device)

    def __call__(self, clips):
        chosen = clips.spread(self.frames)
        with torch.no_grad():
            rows = [
                [self.model.score(text, clips.picture(sample, frame)) for frame in chosen]
                for sample, text in enumerate(clips.texts)
            ]
        return rows, [frame / clips.fps for frame in chosen]


if __name__ == "__main__":
    serve(ImageRewardOfFrames)
