"""HPSv3 (arXiv 2508.03789) of frames, with the std that it states, as a reward worker.

Follows the interface of the package `hpsv3` 1.0. Tested with a stub of that interface, never with published weights.

    python -m venv /opt/hpsv3 && /opt/hpsv3/bin/pip install hpsv3==1.0.0

    rewards:
      preference:
        model: worker
        trust: uncertainty
        options: {python: /opt/hpsv3/bin/python, script: hps_v3, settings: {frames: 8}}

Its network, a Qwen2-VL of 7B, takes about 17 GB in bf16 on each rank. This file is not named hpsv3.py, which would hide
the package.
"""

import math
import os
from importlib.metadata import version

import torch
from hpsv3 import HPSv3RewardInferencer
from reward_worker import serve

REWARD_TOKEN = "<|Reward|>"  # at which the network's head reads


class HumanPreference:
    """mu of each frame, and the std of its error, sigma = exp(the head's second output), as in HPSv3's loss.

    Scores are on the network's own scale, and unbounded.

    Args:
        frames: of a video that are scored, all in one pass of the network.
        checkpoint_path, config_path: files that `HPSv3RewardInferencer` takes; None for the published ones.

    Raises:
        ValueError: (from a call) a prompt contains the token at which the head reads.
    """

    name = "hps_v3"
    range = (-math.inf, math.inf)

    def __init__(self, device, frames=8, checkpoint_path=None, config_path=None):
        self.frames = frames
        weights = os.path.basename(checkpoint_path or "HPSv3.safetensors")
        self.version = f"hpsv3-{version('hpsv3')}-{weights}-{frames}"
        self.model = HPSv3RewardInferencer(config_path, checkpoint_path, device=device)

    def __call__(self, clips):
        chosen = clips.spread(self.frames)
        outputs = [self._outputs(clips, sample, chosen) for sample in range(len(clips.texts))]
        times = [frame / clips.fps for frame in chosen]
        return [of[:, 0].tolist() for of in outputs], times, [of[:, 1].exp().tolist() for of in outputs]

    def _outputs(self, clips, sample, chosen):
        """The head's two outputs for each frame."""
        text = clips.texts[sample]
        if REWARD_TOKEN in text:
            raise ValueError(f"the prompt {text!r} contains {REWARD_TOKEN}; remove it")
        pictures = [clips.picture(sample, frame) for frame in chosen]
        with torch.no_grad():  # by keyword: versions of the package order them differently
            outputs = self.model.reward(image_paths=pictures, prompts=[text] * len(pictures))
        return outputs.float().cpu()


if __name__ == "__main__":
    serve(HumanPreference)
