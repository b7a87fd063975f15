"""Real clips under VBench's file names, and scores of VBench's code for them with small networks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from bpgo_video.data.media import as_bytes, write_video
from bpgo_video.evaluation.vbench_dimensions import DIMENSIONS
from bpgo_video.evaluation.vbench_files import Result, SuitePrompt
from bpgo_video.evaluation.vbench_networks import Sources
from bpgo_video.evaluation.vbench_scoring import Item, Task
from tests.made.real_clips import real_clip
from tests.made.tiny_vbench import BACKBONES
from tests.vbench_side import tiny_networks as tiny

CLIPS = {  # prompt -> clip, frames, rows, columns, fps
    "a man talks, camera pans left": ("carphone_pristine", 21, slice(0, 144), slice(0, 176), 29.97),
    "people ride bikes, camera static": ("bikes", 16, slice(0, 272), slice(0, 640), 25.0),
    "a rabbit, camera zooms in": ("bigbuckbunny", 9, slice(40, 600), slice(300, 620), 8.0),
}
INFO = {"auxiliary_info": {"appearance_style": {"appearance_style": "watercolor painting"}}}


def write_clips(folder: Path) -> list[dict[str, str]]:
    """One video per prompt, of different sizes, lengths and rates, and an image of its first frame at half size."""
    entries = []
    for number, (prompt, (name, count, rows, columns, fps)) in enumerate(CLIPS.items()):
        frames = real_clip(name, 0, count)[:, :, rows, columns]
        video, image = folder / f"{prompt}-0.mp4", folder.parent / f"picture{number}.png"
        write_video(video, frames, fps, crf=0)  # lossless, so that no frame depends on the encoder's version
        half = torch.nn.functional.avg_pool2d(frames[:1], 2)
        Image.fromarray(as_bytes(half)[0]).save(image)
        entries.append({"prompt": prompt, "video": str(video), "image": str(image), "style": "watercolor painting"})
    return entries


def measured(name: str, entries: list[dict[str, str]], folder: Path) -> Result:
    """Our result of one dimension, with the small networks of `tiny_vbench`."""
    weight, bias = tiny.head()
    save_file({"weight": weight, "bias": bias}, folder / "head.safetensors")
    sources = Sources(torch.device("cpu"), head=folder / "head.safetensors")
    network = DIMENSIONS[name].network(BACKBONES.get(name), sources)
    items = tuple(Item(Path(e["video"]), SuitePrompt(e["prompt"], info=INFO), Path(e["image"])) for e in entries)
    return measured_alone(Task(DIMENSIONS[name], network, items, sources))


def measured_alone(task: Task) -> Result:
    """The result of a single process without kept numbers."""
    return task.result(dict(enumerate(map(task.measure, task.items))))


def assert_equal(ours: Result, score: float, values: list[float]) -> None:
    """Checks equality to 1e-6; the scale of imaging quality's videos is 100."""
    points = 100 if ours.dimension == "imaging_quality" else 1
    assert [float(video.video_results) for video in ours.videos] == pytest.approx(values, abs=1e-6 * points), (
        ours.dimension
    )
    assert ours.score == pytest.approx(score, abs=1e-6), ours.dimension


VBENCH: dict[str, tuple[float, list[float]]] = {  # from VBench's code (distributed/test_vbench_package.py)
    "subject_consistency": (0.8890934707813485, [0.9791271463036537, 0.7277260233958562, 0.9665732458233833]),
    "background_consistency": (0.9596251512682715, [0.9673521801829338, 0.9571306645870209, 0.9449847415089607]),
    "temporal_flickering": (0.9823909507078282, [0.981088576597326, 0.9885152751324223, 0.9775690003937366]),
    "motion_smoothness": (0.982150347465014, [0.9806103828315837, 0.9883247300145549, 0.9775159295489029]),
    "dynamic_degree": (0.6666666666666666, [0.0, 1.0, 1.0]),
    "aesthetic_quality": (0.38829972346623737, [0.41982772946357727, 0.36754801869392395, 0.37752342224121094]),
    "imaging_quality": (0.5005131628021362, [46.97861844017392, 50.68497395515442, 52.4903564453125]),
    "overall_consistency": (0.2000556712349256, [0.07400482892990112, 0.12492725998163223, 0.4012349247932434]),
    "temporal_style": (0.2000556712349256, [0.07400482892990112, 0.12492725998163223, 0.4012349247932434]),
    "appearance_style": (0.11395261964072356, [0.035312195051284065, 0.08958534307777881, 0.3407665464613172]),
    "i2v_subject": (0.9581184991200765, [0.94798064827919, 0.9881271982192994, 0.9382476508617401]),
    "i2v_background": (0.9384767261644203, [0.9885828879475593, 0.9334122765064239, 0.8934350140392779]),
    "camera_motion": (0.6666666666666666, [1.0, 0.0, 1.0]),
}
