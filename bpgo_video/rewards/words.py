"""Which numbers does a network read for a text? Those of the tokenizer in its folder, cut to the network's length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from bpgo_video.rewards.backbones import Backbone


class Words:
    """The tokens of texts, on the network's device.

    Args:
        backbone: a network with a `text_config`.
        folder: of the tokenizer.
        padding: "longest" of the texts that are given, or "max_length", the network's own.
    """

    def __init__(self, backbone: Backbone, folder: Path, padding: str = "longest"):
        self.backbone, self.padding = backbone, padding
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)

    def __call__(self, texts: Sequence[str]) -> Any:
        """`input_ids` and `attention_mask`, [texts, tokens]."""
        length = self.backbone.network.config.text_config.max_position_embeddings
        settings = {"padding": self.padding, "truncation": True, "max_length": length}
        return self.tokenizer(list(texts), return_tensors="pt", **settings).to(self.backbone.device)
