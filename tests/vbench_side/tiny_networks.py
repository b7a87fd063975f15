"""Small networks of fixed random weights that replace VBench's, identical on both sides of a comparison.

Requires only torch: it is imported by the tests, and by the interpreter that runs VBench's code.
"""

import torch
import torch.nn.functional as F


def weights(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / shape[-1] ** 0.5


def features(pixels):
    """(images, 3, rows, columns), of any size -> (images, 16)."""
    filters = weights(0, 24, 3, 16, 16)
    patches = torch.tanh(F.conv2d(pixels.float(), filters - filters.mean(dim=(2, 3), keepdim=True), stride=16))
    spread = patches.flatten(2).std(dim=-1)
    return torch.cat((4 * patches.mean(dim=(2, 3)), spread - spread.mean(dim=1, keepdim=True)), dim=1) @ weights(
        1, 48, 16
    )


def head():
    """A linear layer to about 1 to 10 points: weight (1, 16), bias (1,)."""
    return 3 * weights(2, 1, 16), torch.tensor([5.0])


def points(image):
    """(1, 3, rows, columns) in [0, 1] -> points of 100."""
    return 50 + 10 * torch.tanh(features(image)).sum(dim=1)


def flow(before, after):
    """Two frames of 0 to 255 -> (1, 2, rows, columns)."""
    change = F.avg_pool2d(after - before, 5, 1, 2)
    return torch.stack((change[:, 0] + change[:, 1], change[:, 2]), dim=1) / 20


def between(before, after):
    """Two frames in [0, 1] -> one that is sharper than their mean, and leaves [0, 1] in places."""
    mean = (before + after) / 2
    return mean + 0.5 * (mean - F.avg_pool2d(mean, 3, 1, 1))


def text_feature(text):
    """(1, 16)."""
    return weights(sum(text.encode()), 1, 16)


def video_feature(frames):
    """(1, frames, 3, rows, columns) -> (1, 16)."""
    found = features(frames[0])
    return (found * torch.linspace(1, 2, len(found))[:, None]).mean(dim=0, keepdim=True)


def logits(image, text):
    """(1, 3, rows, columns) -> (1,), as CLIP's logits: 100 times a cosine."""
    return 100 * F.cosine_similarity(features(image), text_feature(text))


def tracks(video, grid):
    """(1, frames, 3, rows, columns) -> (1, frames, grid^2, 2): points that drift and spread with the frames' mean."""
    height, width = video.shape[-2:]
    rows, columns = torch.linspace(0, height, grid), torch.linspace(0, width, grid)
    start = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1).flatten(0, 1)
    level = video[0].mean(dim=(2, 3))  # frames x channels
    drift = (level[:, :2] - level[:1, :2])[:, None] * 2
    growth = 1 + (level[:, 2] - level[0, 2])[:, None, None] / 50
    middle = torch.tensor([width / 2, height / 2])
    return ((start - middle) * growth + middle + drift)[None]
