"""Generation from checkpoints, exports and prompt shards, with any solver, and verification of its videos."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from PIL import Image
from safetensors.torch import load_file

from bpgo_video.config.generation import GenerationError, GenerationSettings
from bpgo_video.config.policy import LoraConfig
from bpgo_video.data.media import write_video
from bpgo_video.data.records import EncoderStamp, prompt_id
from bpgo_video.data.writer import build_shards
from bpgo_video.distributed.manifest import CheckpointError
from bpgo_video.inference import generate as generation
from bpgo_video.inference.conversion import Conversion, convert
from bpgo_video.inference.generate import generate, plan, read_records
from bpgo_video.inference.run_weights import WEIGHTS, find_checkpoint, find_model
from tests.inference.videos import jobs_of, pipeline_of, videos
from tests.made.random_wan import random_wan
from tests.made.written_runs import write_run
from tests.made.zero_checkpoints import write_average

TEXTS = ["a red circle moving left", "a blue square moving up", "a shape moving right"]
LORA = LoraConfig(rank=2, alpha=4)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_wan(tmp_path_factory.mktemp("policy") / "wan")


@pytest.fixture
def settings(base: Path, tmp_path: Path) -> GenerationSettings:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(TEXTS) + "\n")
    return GenerationSettings(
        policy=str(base), prompts=prompts, output=tmp_path / "videos", seed=5, num_steps=2, guidance_scale=1.0,
        num_frames=9, height=64, width=64, fps=8, samples_per_prompt=2, batch_size=6,
    )  # fmt: skip


def first_video(settings: GenerationSettings) -> torch.Tensor:
    return videos(settings, jobs=jobs_of(settings)[:1])


@pytest.mark.parametrize("lora", [LoraConfig(), LORA], ids=["full", "lora"])
@pytest.mark.parametrize("named", ["run", "checkpoint"])
def test_a_checkpoint_generates_the_video_of_its_export(
    base: Path, settings: GenerationSettings, tmp_path: Path, lora: LoraConfig, named: str
) -> None:
    run_dir = write_run(base, tmp_path / "run", lora)
    convert(Conversion(find_checkpoint(run_dir), "raw", tmp_path / "export"), "diffusers")
    path = {"run": run_dir, "checkpoint": run_dir / "checkpoints" / "step-000002"}[named]
    found = first_video(replace(settings, policy=str(path)))
    assert torch.equal(found, first_video(replace(settings, policy=str(tmp_path / "export"))))
    assert (found - first_video(settings)).abs().max() > 1e-3


def test_the_average_of_a_checkpoint_generates_the_video_of_its_export(
    base: Path, settings: GenerationSettings, tmp_path: Path
) -> None:
    run_dir = write_run(base, tmp_path / "run", LoraConfig())
    source = find_checkpoint(run_dir)
    from_run = replace(settings, policy=str(run_dir), weights="ema")
    with pytest.raises(CheckpointError, match="kept no average"):
        first_video(from_run)
    write_average(source.folder, {name: 0.5 * tensor for name, tensor in WEIGHTS["raw"](source.folder).items()})
    convert(Conversion(source, "ema", tmp_path / "export"), "diffusers")
    found = first_video(from_run)
    assert torch.equal(found, first_video(replace(settings, policy=str(tmp_path / "export"))))
    assert (found - first_video(replace(from_run, weights="raw"))).abs().max() > 1e-3
    with pytest.raises(GenerationError, match=r"weights is 'ema', but .* is no training checkpoint"):
        find_model(replace(settings, weights="ema"))


def test_the_checkpoint_is_part_of_the_generation_settings(
    base: Path, settings: GenerationSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a given size, the videos have the size of the run's recipe."""
    run_dir = write_run(base, tmp_path / "run", LORA)
    from_run = replace(settings, policy=str(run_dir), num_frames=None, height=None, width=None, fps=None)
    monkeypatch.setattr(generation, "make", lambda *_: None)
    with pytest.raises(GenerationError, match="is not a whole video"):
        generate(from_run)
    content = json.loads((settings.output / "generation.json").read_text())
    assert (content["complete"], content["settings"]["weights"]) == (False, "raw")
    size = {"num_frames": 9, "height": 64, "width": 64, "fps": 8}
    assert {name: content["settings"][name] for name in size} == size
    (settings.output / "00000-00.mp4").touch()
    with pytest.raises(GenerationError, match="checkpoint_fingerprint"):
        generate(settings)


def test_prompts_can_come_from_shards(base: Path, settings: GenerationSettings, tmp_path: Path) -> None:
    lines = tmp_path / "prompts.jsonl"
    splits = ("train", "heldout", "heldout")
    negatives = ({}, {"negative_prompt": ""}, {"negative_prompt": "dark"})
    objects = [{"prompt": t, "split": s, **n} for t, s, n in zip(TEXTS, splits, negatives, strict=True)]
    lines.write_text("".join(json.dumps(line) + "\n" for line in objects))
    stamp = EncoderStamp("none", "0" * 16, 4)
    build_shards([lines], tmp_path / "shards", lambda texts: {"x": torch.zeros(len(texts), 4, 2)}, stamp)
    from_shards = replace(settings, prompts=tmp_path / "shards", split="heldout")
    found = plan(from_shards, read_records(from_shards))
    assert [(job.prompt.prompt, job.prompt.id) for job in found[::2]] == [(t, prompt_id(t)) for t in TEXTS[1:]]
    from_lines = read_records(replace(settings, prompts=lines))
    assert [record.negative_prompt for record in from_lines] == [None, "", "dark"]
    from_all = read_records(replace(from_shards, split=None))
    assert [record.negative_prompt for record in from_all] == [None, "", "dark"]
    with pytest.raises(GenerationError, match="no folder of prompt shards"):
        read_records(replace(settings, split="heldout"))


def test_another_solver_equals_that_of_diffusers(settings: GenerationSettings, base: Path) -> None:
    found = first_video(replace(settings, scheduler="euler", flow_shift=7.0, num_steps=4))
    pipeline = WanPipeline.from_pretrained(base)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    assert torch.equal(found, videos(replace(settings, num_steps=4), pipeline, jobs_of(settings)[:1]))
    assert (found - first_video(replace(settings, num_steps=4))).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["unipc", "dpm", "euler"])
def test_all_solvers_converge_to_the_same_video(settings: GenerationSettings, name: Any) -> None:
    reference = first_video(replace(settings, scheduler="euler", num_steps=200))
    found = first_video(replace(settings, scheduler=name, num_steps=60))
    assert (found - reference).abs().mean() < 0.01


def test_a_shift_requires_a_solver(settings: GenerationSettings) -> None:
    with pytest.raises(GenerationError, match="flow_shift is 5"):
        first_video(replace(settings, flow_shift=5.0))


def test_a_contact_sheet_shows_every_sample_of_a_prompt(settings: GenerationSettings) -> None:
    generate(settings)
    sheets = sorted(path.name for path in (settings.output / "sheets").iterdir())
    assert sheets == [f"{number:05d}.jpg" for number in range(3)]
    with Image.open(settings.output / "sheets" / "00001.jpg") as sheet:
        assert sheet.size == (5 * (64 + 2) - 2, 2 * (64 + 2) - 2)


def test_a_video_damaged_after_writing_is_detected(
    settings: GenerationSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(path: Path, frames: torch.Tensor, fps: float, **sound: Any) -> None:
        write_video(path, frames[:5] if path.name == "00001-01.mp4" else frames, fps, **sound)

    monkeypatch.setattr(generation, "write_video", cut)
    with pytest.raises(GenerationError, match=r"00001-01\.mp4"):
        generate(settings)
    content = json.loads((settings.output / "generation.json").read_text())
    assert not content["complete"]
    monkeypatch.undo()
    assert len(json.loads(generate(settings).read_text())["videos"]) == 6


def test_the_base_model_is_unchanged(base: Path, settings: GenerationSettings, tmp_path: Path) -> None:
    file = base / "transformer" / "diffusion_pytorch_model.safetensors"
    before = {name: tensor.clone() for name, tensor in load_file(file).items()}
    first_video(replace(settings, policy=str(write_run(base, tmp_path / "run", LoraConfig()))))
    assert all(torch.equal(tensor, before[name]) for name, tensor in load_file(file).items())


def test_image_to_video_starts_from_the_images_of_the_prompts(settings: GenerationSettings, tmp_path: Path) -> None:
    folder = random_wan(tmp_path / "wan", images=True, image_encoder=True)
    own = replace(settings, policy=str(folder), samples_per_prompt=1, num_steps=2)
    with pytest.raises(
        GenerationError, match="needs the image of each prompt, but 'a red circle moving left' has none"
    ):
        generate(own)
    prompts = tmp_path / "prompts.jsonl"
    lines = []
    for number, text in enumerate(TEXTS[:2]):
        Image.new("RGB", (64, 64), (200 * number, 90, 10)).save(tmp_path / f"{number}.png")
        lines.append(json.dumps({"prompt": text, "image": f"{number}.png"}))
    prompts.write_text("\n".join(lines) + "\n")
    manifest = json.loads(generate(replace(own, prompts=prompts)).read_text())
    assert manifest["complete"]
    own = replace(own, prompts=prompts)
    jobs, pipeline = jobs_of(own), pipeline_of(own)
    together = videos(own, pipeline)
    swapped = replace(jobs[0], prompt=replace(jobs[0].prompt, media=jobs[1].prompt.media))
    assert torch.equal(together[:1], videos(own, pipeline, jobs[:1]))
    assert (videos(own, pipeline, [swapped]) - together[:1]).abs().mean() > 1e-3
