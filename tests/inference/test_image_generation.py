"""Generation of images: png files without loss, kept if they are whole, made again if they are not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bpgo_video.config.generation import GenerationError
from bpgo_video.inference.generate import generate
from tests.families import CASES
from tests.inference.videos import case_settings, videos


def test_images_are_png_files_that_are_kept_or_repaired(tmp_path: Path) -> None:
    case = CASES["flux"]
    folder = tmp_path / "pipeline"
    case.write(folder)
    settings = case_settings(case, folder, tmp_path)
    expected = (videos(settings)[:, 0].permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()
    manifest = generate(settings)
    files = [settings.output / video["file"] for video in json.loads(manifest.read_text())["videos"]]
    assert [file.name for file in files] == ["00000-00.png", "00001-00.png"]
    for file, pixels in zip(files, expected, strict=True):
        assert np.array_equal(np.asarray(Image.open(file)), pixels)
    assert len(list((settings.output / "sheets").glob("*.jpg"))) == 2
    kept, whole = files[0].stat().st_mtime_ns, files[1].read_bytes()
    files[1].write_bytes(whole[: len(whole) // 2])
    generate(settings)
    assert files[0].stat().st_mtime_ns == kept
    assert files[1].read_bytes() == whole
    with pytest.raises(GenerationError, match="holds videos of other settings: seed 5"):
        generate(replace(settings, seed=6))
