"""A stub with the interface of hpsv3 1.0: mu is a picture's mean green less the prompt's length, sigma the blue."""

import numpy as np
import torch
from PIL import Image


class HPSv3RewardInferencer:
    def __init__(self, config_path=None, checkpoint_path=None, device="cuda", differentiable=False):
        assert (config_path, device, differentiable) == (None, "cpu", False)

    def reward(self, image_paths, prompts):
        assert all(isinstance(image, Image.Image) for image in image_paths)
        assert all(isinstance(prompt, str) for prompt in prompts)
        assert not torch.is_grad_enabled()
        means = torch.tensor(np.stack([np.asarray(image).mean(axis=(0, 1)) for image in image_paths]))
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        return torch.stack([means[:, 1] - lengths, means[:, 2].log()], dim=1)
