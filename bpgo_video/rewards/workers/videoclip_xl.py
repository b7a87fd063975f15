"""VideoCLIP-XL (arXiv 2410.00741): the cosine of a video and its prompt, as a reward worker.

Follows the code of the hub's alibaba-pai/VideoCLIP-XL and its demo. Tested with a stub of that interface, never with
published weights (CC BY-NC-SA 4.0: read the card). Version 2 has weights alone, and runs with the same code.

    python -m venv /opt/videoclip-xl
    /opt/videoclip-xl/bin/pip install torch torchvision numpy 'setuptools<70' huggingface_hub
    /opt/videoclip-xl/bin/huggingface-cli download alibaba-pai/VideoCLIP-XL --local-dir /opt/VideoCLIP-XL
    /opt/videoclip-xl/bin/huggingface-cli download alibaba-pai/VideoCLIP-XL-v2 --local-dir /opt/VideoCLIP-XL-v2
    /opt/videoclip-xl/bin/pip install -r /opt/VideoCLIP-XL/requirements.txt

    rewards:
      alignment:
        model: worker
        options:
          python: /opt/videoclip-xl/bin/python
          script: videoclip_xl
          settings: {folder: /opt/VideoCLIP-XL, weights: /opt/VideoCLIP-XL-v2/VideoCLIP-XL-v2.bin}
"""

import os
import sys

import cv2
import numpy as np
import torch
from reward_worker import serve

FRAMES, SIDE = 8, 224  # of the network's input
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class VideoTextCosine:
    """cos(video, prompt) in [-1, 1], one score per video. It reads 248 tokens of a prompt.

    Args:
        folder: with the authors' modeling.py and utils/, which are run.
        weights: a .bin file; VideoCLIP-XL.bin in the folder by default. Only tensors are unpickled.
    """

    name = "videoclip_xl"
    range = (-1.0, 1.0)

    def __init__(self, device, folder, weights=None):
        weights = weights or os.path.join(folder, "VideoCLIP-XL.bin")
        sys.path.insert(0, folder)
        from modeling import VideoCLIP_XL
        from utils.text_encoder import text_encoder

        self.version = os.path.basename(weights)
        self.device, self.tokenize = device, text_encoder.tokenize
        self.model = VideoCLIP_XL()
        self.model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        self.model.to(device).eval()

    def __call__(self, clips):
        chosen = frames_of(clips.shape[1])
        videos = np.stack([network_input(video[chosen]) for video in clips.array()])
        with torch.no_grad():
            pixels = torch.from_numpy(videos).float().to(self.device)
            seen = self.model.vision_model.get_vid_features(pixels).float()
            tokens = self.tokenize(list(clips.texts), truncate=True).to(self.device)
            read = self.model.text_model.encode_text(tokens).float()
        return torch.nn.functional.cosine_similarity(seen, read, dim=1)[:, None].tolist()


def frames_of(total):
    """The frames that the authors' demo chooses: every (total // 8)-th; a video of fewer than 8 repeats some."""
    if total < FRAMES:
        return [frame * total // FRAMES for frame in range(FRAMES)]
    return [frame * (total // FRAMES) for frame in range(FRAMES)]


def network_input(frames):
    """RGB frames in 8 bits, (8, height, width, 3), as the demo prepares them: (8, 3, 224, 224)."""
    small = np.stack([cv2.resize(frame, (SIDE, SIDE)) for frame in frames])
    return ((small / 255.0 - np.array(MEAN)) / np.array(STD)).transpose(0, 3, 1, 2)


if __name__ == "__main__":
    serve(VideoTextCosine)
