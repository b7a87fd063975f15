"""ImageReward (arXiv 2304.05977) as a reward worker, which scores frames for the prompt in a separate environment.

**Not tested**: it follows the published interface of `image-reward` 1.5, whose pinned dependencies conflict with ours.

    python -m venv /opt/image-reward && /opt/image-reward/bin/pip install image-reward

    rewards:
      preference:
        model: worker
        options: {python: /opt/image-reward/bin/python, script: tools/workers/image_reward.py, settings: {frames: 8}}

Workers for VideoScore, VideoPhy or VideoCLIP-XL have the same structure: load the model in `__init__`, and return one
row per video from `__call__`, with a single number if the model scores whole videos.
"""

import ImageReward
import torch
from PIL import Image
from reward_worker import serve


class FramePreference:
    """ImageReward of evenly spaced frames; scores are unbounded and standardised over human preferences."""

    name = "image_reward"
    range = (-3.0, 3.0)

    def __init__(self, device, frames=8, model="ImageReward-v1.0"):
        self.frames = frames
        self.version = f"{model}-{frames}"
        self.model = ImageReward.load(model, device=device)

    def __call__(self, clips):
        samples, total, height, width = clips.shape
        count = min(self.frames, total)
        chosen = [round(i * (total - 1) / max(1, count - 1)) for i in range(count)]

        def score(sample, frame):
            picture = Image.frombytes("RGB", (width, height), clips.frame(sample, frame))
            return self.model.score(clips.texts[sample], picture)

        with torch.no_grad():
            rows = [[score(sample, frame) for frame in chosen] for sample in range(samples)]
        return rows, [frame / clips.fps for frame in chosen]


serve(FramePreference)
