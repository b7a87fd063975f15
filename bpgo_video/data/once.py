"""How is a text encoded once though many prompts have it? Its conditioning is kept in a file until the build ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import safetensors.torch
from torch import Tensor

from bpgo_video.atomic import atomic_file
from bpgo_video.data.prompt_files import prompt_id
from bpgo_video.data.prompt_records import tensor_bytes

Encode = Callable[[Sequence[str]], Mapping[str, Tensor]]  # texts -> tensors whose axis 0 is the texts


class EncodeOnce:
    """An encoder that keeps what it made of repeated texts.

    A repeated text is encoded alone, so that its bits depend neither on which prompt came first nor on a build's
    interruptions; the others of a batch are encoded together.

    Args:
        folder: where the files are kept; several ranks may share it.
        is_repeated: whether several prompts of the build have a text.
    """

    def __init__(self, encode: Encode, folder: Path, is_repeated: Callable[[str], bool]) -> None:
        self._encode, self._folder, self._is_repeated = encode, folder, is_repeated

    def __call__(self, texts: Sequence[str]) -> list[dict[str, Tensor]]:
        """The conditioning of each text, without a batch axis."""
        single = [text for text in texts if not self._is_repeated(text)]
        tensors = self._encode(single) if single else {}
        rows = iter(range(len(single)))
        return [self._kept(text) if self._is_repeated(text) else _row(tensors, next(rows)) for text in texts]

    def _kept(self, text: str) -> dict[str, Tensor]:
        name = f"{prompt_id(text):016x}"
        path = self._folder / name[:2] / f"{name}.safetensors"  # at most 256 folders, for file systems that mind
        if not path.is_file():
            data = tensor_bytes(_row(self._encode([text]), 0))
            with atomic_file(path) as aside:
                aside.write_bytes(data)
        return safetensors.torch.load(path.read_bytes())


def _row(tensors: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
    return {name: value[row] for name, value in tensors.items()}
