"""How a loaded VAE computes: its precision, the layout of its weights, and fewer operations in Wan's.

Layout and operations differ from diffusers' own computation by rounding only.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    AutoencoderKLWan,
    WanCausalConv3d,
    WanDecoder3d,
    WanRMS_norm,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHANNELS_LAST = ("AutoencoderKLWan", "AutoencoderKLCogVideoX", "AutoencoderKLMochi")  # faster so on a CPU; others not
LAYOUTS = {nn.Conv2d: torch.channels_last, nn.Conv3d: torch.channels_last_3d}


def prepare_vae(vae: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Change how a frozen VAE computes, once after loading; returns it.

    On a CPU, convolutions of `CHANNELS_LAST` take weights with channels last; activations follow them. On a GPU the
    layout stays diffusers' (channels last was not measured).

    Args:
        dtype: of the weights. Buffers stay exact: LTX-Video's are the statistics of its latents.
    """
    for weight in vae.parameters():
        weight.data = weight.data.to(dtype)
    if type(vae).__name__ in CHANNELS_LAST and all(weight.device.type == "cpu" for weight in vae.parameters()):
        _put_channels_last(vae)
    if isinstance(vae, AutoencoderKLWan):
        _use_fewer_operations(vae)
    return vae


def _put_channels_last(vae: nn.Module) -> None:
    for part in vae.modules():
        for kind, layout in LAYOUTS.items():
            if isinstance(part, kind):
                part.weight.data = part.weight.data.contiguous(memory_format=layout)


def _use_fewer_operations(vae: nn.Module) -> None:
    for part in vae.modules():
        if type(part) is WanCausalConv3d:
            part.__class__ = CausalConv3d
        elif type(part) is WanRMS_norm:
            part.__class__ = RMSNorm
        elif type(part) is WanDecoder3d:
            part.__class__ = CheckpointedDecoder
        elif isinstance(part, nn.SiLU):
            part.inplace = True  # each follows a norm, whose output nothing else reads


class CausalConv3d(WanCausalConv3d):
    """A convolution over this and earlier frames; rows and columns are padded by the kernel, not by a copy.

    A clip's first frame sees only zeros before it, so that the kernel's last frame computes it: a third of the work.
    """

    def forward(self, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        """
        Args:
            x: samples, channels, frames, height, width.
            cache_x: the last frames before x, at most as many as the kernel sees; None at the start of a clip.
        """
        columns, _, rows, _, earlier, _ = (int(size) for size in self._padding)
        weight = self.weight
        if earlier and cache_x is None and x.shape[2] == 1:
            weight = weight[:, :, -1:]
        elif earlier:
            if cache_x is not None:
                x, earlier = torch.cat([cache_x, x], dim=2), earlier - cache_x.shape[2]
            if earlier:
                x = F.pad(x, (0, 0, 0, 0, earlier, 0))
        return F.conv3d(x, weight, self.bias, self.stride, (0, rows, columns))


class RMSNorm(WanRMS_norm):
    """x sqrt(channels) gamma / |x| over channels, in fp32, scaled in place; this VAE's norms have no bias."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x.float(), dim=1).to(x.dtype).mul_(self.scale * self.gamma)


class CheckpointedDecoder(WanDecoder3d):
    """With gradients, one latent frame's activations (of one tile) exist at a time: backward computes them again.

    What later frames need of earlier ones, the inputs of convolutions, is kept.
    """

    def forward(
        self,
        x: Tensor,
        feat_cache: list[Any] | None = None,
        feat_idx: list[int] | None = None,
        first_chunk: bool = False,
    ) -> Tensor:
        """
        Args:
            x: samples, channels, frames, height, width.
            feat_cache: inputs of the convolutions at earlier frames, changed in place; None decodes the clip at once.
            feat_idx: position in it.
            first_chunk: x is the start of the clip.
        """
        if feat_cache is None or not x.requires_grad:
            found: Tensor = super().forward(x, feat_cache, feat_idx or [0], first_chunk)
            return found

        def run(x: Tensor, *cache: Any) -> tuple[Any, ...]:
            own = list(cache)  # a second run must start from the same cache
            return WanDecoder3d.forward(self, x, own, [0], first_chunk), *own

        found, *feat_cache[:] = checkpoint(run, x, *feat_cache, use_reentrant=False)
        return found
