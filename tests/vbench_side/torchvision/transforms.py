"""torchvision transforms used by VBench, in torch and Pillow; torchvision is never installed."""

import enum

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image


class InterpolationMode(enum.Enum):
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"


PILLOW = {InterpolationMode.BILINEAR: Image.BILINEAR, InterpolationMode.BICUBIC: Image.BICUBIC}


class Compose:
    def __init__(self, steps):
        self.steps = steps

    def __call__(self, image):
        for step in self.steps:
            image = step(image)
        return image


class Resize:
    """Resize, for an int by the shorter side; bytes are rounded and, if cubic, clamped; Pillow images use Pillow."""

    def __init__(self, size, interpolation=InterpolationMode.BILINEAR, antialias=True):
        self.size, self.interpolation, self.antialias = size, interpolation, antialias

    def __call__(self, image):
        width, height = image.size if isinstance(image, Image.Image) else (image.shape[-1], image.shape[-2])
        size = self.size
        if isinstance(size, int):
            short, long = (width, height) if width <= height else (height, width)
            longer = int(size * long / short)
            size = (longer, size) if width <= height else (size, longer)
        if isinstance(image, Image.Image):
            return image.resize((size[1], size[0]), PILLOW[self.interpolation])
        if (height, width) == tuple(size):
            return image
        options = {"mode": self.interpolation.value, "align_corners": False, "antialias": self.antialias}
        resized = F.interpolate(image.float(), size, **options)
        if image.dtype == torch.uint8:
            resized = resized.clamp(0, 255) if self.interpolation is InterpolationMode.BICUBIC else resized
            return resized.round().to(torch.uint8)
        return resized


class CenterCrop:
    def __init__(self, size):
        self.size = size

    def __call__(self, image):
        pillow = isinstance(image, Image.Image)
        width, height = image.size if pillow else (image.shape[-1], image.shape[-2])
        top, left = round((height - self.size) / 2.0), round((width - self.size) / 2.0)
        if pillow:
            return image.crop((left, top, left + self.size, top + self.size))
        return image[..., top : top + self.size, left : left + self.size]


class Normalize:
    def __init__(self, mean, std):
        self.mean, self.std = mean, std

    def __call__(self, image):
        mean, std = (torch.as_tensor(v, dtype=image.dtype).view(-1, 1, 1) for v in (self.mean, self.std))
        return (image - mean) / std


class Lambda:
    def __init__(self, function):
        self.function = function

    def __call__(self, image):
        return self.function(image)


class ToTensor:
    def __call__(self, image):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


class ToPILImage:
    def __call__(self, image):
        raise NotImplementedError("no dimension of the test composes it")
