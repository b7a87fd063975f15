"""A random CLIP model in open_clip's layout, and an HPSv2 checkpoint of it."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn

from tests.made import random_rewards as folders


class OpenClipBlock(nn.Module):
    def __init__(self, width: int, heads: int, inner: int):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(
            OrderedDict(c_fc=nn.Linear(width, inner), gelu=nn.GELU(), c_proj=nn.Linear(inner, width))
        )

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class OpenClipTransformer(nn.Module):
    def __init__(self, shape: dict[str, int]):
        super().__init__()
        sizes = shape["hidden_size"], shape["num_attention_heads"], shape["intermediate_size"]
        self.resblocks = nn.ModuleList(OpenClipBlock(*sizes) for _ in range(shape["num_hidden_layers"]))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class OpenClipVision(nn.Module):
    def __init__(self, shape: dict[str, int], out: int):
        super().__init__()
        width, patch = shape["hidden_size"], shape["patch_size"]
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn((shape["image_size"] // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = OpenClipTransformer(shape)
        self.proj = nn.Parameter(torch.randn(width, out))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        patches = self.conv1(pixels).flatten(2).mT
        first = self.class_embedding.expand(len(pixels), 1, -1)
        x = self.transformer(self.ln_pre(torch.cat([first, patches], dim=1) + self.positional_embedding))
        return self.ln_post(x[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """Text and vision transformers under open_clip's names."""

    def __init__(self, text: dict[str, int], vision: dict[str, int], out: int):
        super().__init__()
        width = text["hidden_size"]
        self.visual = OpenClipVision(vision, out)
        self.token_embedding = nn.Embedding(text["vocab_size"], width)
        self.positional_embedding = nn.Parameter(torch.randn(text["max_position_embeddings"], width))
        self.transformer, self.ln_final = OpenClipTransformer(text), nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, out))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def encode_text(self, ids: torch.Tensor) -> torch.Tensor:
        length = ids.shape[1]
        mask = torch.full((length, length), -torch.inf).triu(1)
        x = self.transformer(self.token_embedding(ids) + self.positional_embedding[:length], mask)
        return self.ln_final(x[:, -1]) @ self.text_projection


def random_hps(folder: Path) -> OpenClip:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = OpenClip(folders.TEXT, folders.VISION, 16)
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape)
    folder.mkdir()
    torch.save({"state_dict": model.state_dict()}, folder / "HPS_v2.1_compressed.pt")
    return model.eval()
