"""Generation: diffusers' pipeline on keyed noise; videos do not depend on the batch, and finished ones are kept."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from peft import get_peft_model_state_dict
from safetensors.torch import save_file

from bpgo_video.commands.generate import main
from bpgo_video.config.generation import GenerationSettings
from bpgo_video.config.policy import LoraConfig
from bpgo_video.data.media import read_video
from bpgo_video.data.records import prompt_id
from bpgo_video.inference import generate as generation
from bpgo_video.inference.generate import Job, generate, initial_latents
from bpgo_video.inference.pipeline import CallSettings, resolve
from bpgo_video.inference.run_weights import find_model
from bpgo_video.policies.lora import add_lora
from bpgo_video.randomness import keyed_noise
from bpgo_video.weights import WeightsError
from tests.inference.videos import jobs_of, pipeline_of, videos
from tests.made.random_wan import LATENTS, TEXT_TOKENS, random_wan

TEXTS = ["a red circle moving left", "a blue square moving up", "a shape moving right"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_wan(tmp_path_factory.mktemp("policy") / "wan")


@pytest.fixture
def settings(folder: Path, tmp_path: Path) -> GenerationSettings:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(TEXTS) + "\n")
    return GenerationSettings(
        policy=str(folder), prompts=prompts, output=tmp_path / "videos", seed=5, num_steps=3, guidance_scale=2.0,
        num_frames=9, height=64, width=64, fps=8, samples_per_prompt=2, batch_size=6,
    )  # fmt: skip


def call_of(settings: GenerationSettings) -> CallSettings:
    return resolve(settings, find_model(settings).policy)


def flags(settings: GenerationSettings, **changes: object) -> list[str]:
    values = {**vars(settings), **changes}
    pairs = [
        (f"--{name.replace('_', '-')}", str(value)) for name, value in values.items() if value not in (None, "", ())
    ]
    return [text for pair in pairs for text in pair]


def test_a_video_is_the_same_alone_and_in_a_batch(settings: GenerationSettings) -> None:
    pipeline, jobs = pipeline_of(settings), jobs_of(settings)
    together = videos(settings, pipeline)
    for number in (0, 3):
        alone = videos(settings, pipeline, [jobs[number]])
        assert (alone[0] - together[number]).abs().max() < 1e-5
    assert (together[0] - together[1]).abs().max() > 0.01, "two samples of a prompt must differ"
    assert (together[0] - together[2]).abs().max() > 0.01, "two prompts must differ"


def test_a_video_equals_that_of_diffusers(settings: GenerationSettings) -> None:
    found = videos(settings, jobs=jobs_of(settings)[3:4])
    pipeline = WanPipeline.from_pretrained(settings.policy)
    noise = keyed_noise(LATENTS, [(5, "generation", prompt_id(TEXTS[1]), 1)], "cpu")
    expected = pipeline(
        TEXTS[1], negative_prompt="", height=64, width=64, num_frames=9, num_inference_steps=3, guidance_scale=2.0,
        max_sequence_length=TEXT_TOKENS, latents=noise, output_type="pt",
    ).frames  # fmt: skip
    assert torch.equal(found, expected)


def test_the_negative_prompt_of_a_prompt_takes_precedence(settings: GenerationSettings) -> None:
    (first, second, *_), pipeline = jobs_of(settings), pipeline_of(settings)

    def made(jobs: list[Job], negative: str) -> torch.Tensor:
        return videos(replace(settings, negative_prompt=negative), pipeline, jobs)

    own = replace(first, prompt=replace(first.prompt, negative_prompt="a blue object"))
    found = made([own, second], "dark")
    for job, video, negative in ((first, found[0], "a blue object"), (second, found[1], "dark")):
        assert (made([job], negative)[0] - video).abs().max() < 1e-5
        assert (made([job], "")[0] - video).abs().max() > 1e-4


def test_noise_depends_only_on_seed_prompt_and_sample(settings: GenerationSettings) -> None:
    noise = initial_latents(jobs_of(settings), LATENTS)
    assert len({tuple(row.flatten()[:4].tolist()) for row in noise}) == 6
    other_seed = initial_latents(jobs_of(replace(settings, seed=6)), LATENTS)
    assert not torch.isclose(noise, other_seed).all(dim=(1, 2, 3, 4)).any()
    settings.prompts.write_text("\n".join(reversed(TEXTS)))
    reordered = initial_latents(jobs_of(replace(settings, samples_per_prompt=1, batch_size=1)), LATENTS)
    assert torch.equal(reordered.flip(0), noise[::2])


def test_the_manifest_describes_each_file_and_finished_videos_are_kept(
    settings: GenerationSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = json.loads(generate(settings).read_text())
    assert content["complete"]
    assert content["settings"]["max_sequence_length"] == TEXT_TOKENS
    assert content["videos"][3] == {
        "prompt": TEXTS[1], "id": prompt_id(TEXTS[1]), "seed": 5, "sample": 1, "file": "00001-01.mp4"
    }  # fmt: skip
    files = {video["file"]: settings.output / video["file"] for video in content["videos"]}
    assert {path.name for path in settings.output.iterdir()} == {*files, "generation.json", "sheets"}
    frames, fps = read_video(files["00001-01.mp4"])
    assert (tuple(frames.shape), fps) == ((9, 3, 64, 64), 8)
    before = {name: path.read_bytes() for name, path in files.items()}
    times = {name: path.stat().st_mtime_ns for name, path in files.items()}
    files["00000-01.mp4"].unlink()
    files["00002-00.mp4"].write_bytes(before["00002-00.mp4"][:900])
    generate(replace(settings, batch_size=2))
    again = {name: path.stat().st_mtime_ns for name, path in files.items()}
    assert {name for name in files if again[name] != times[name]} == {"00000-01.mp4", "00002-00.mp4"}
    for name in ("00000-01.mp4", "00002-00.mp4"):
        expected, _ = read_video(settings.output / name)
        (settings.output / "old.mp4").write_bytes(before[name])
        assert (read_video(settings.output / "old.mp4")[0] - expected).abs().mean() < 1e-3
    monkeypatch.setattr(generation, "load_pipeline", lambda *_: pytest.fail("all videos exist"))
    generate(settings)


def test_the_manifest_of_an_interrupted_generation_lists_only_existing_files(
    settings: GenerationSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(generation, "load_pipeline", stop)
    with pytest.raises(KeyboardInterrupt):
        generate(settings)
    content = json.loads((settings.output / "generation.json").read_text())
    assert (content["complete"], content["videos"]) == (False, [])


def test_other_settings_in_the_same_folder_are_an_error(
    settings: GenerationSettings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(generation, "load_pipeline", lambda *_: pytest.fail("no model may be loaded"))
    monkeypatch.setattr(generation, "whole_video", lambda *_: torch.zeros(9, 3, 64, 64))
    monkeypatch.setattr(generation, "check_and_show", lambda *_: [])
    generate(settings)
    (settings.output / "00000-00.mp4").touch()
    for name, value, words in (
        ("seed", 6, "seed 5 (now 6)"),
        ("num_steps", 4, "num_inference_steps 3 (now 4)"),
        ("policy", random_wan(tmp_path / "other", seed=1), "policy_fingerprint"),
    ):
        assert main(flags(settings, **{name: value})) == 2
        assert words in capsys.readouterr().err
    (settings.output / "generation.json").unlink()
    (settings.output / "mine.mp4").write_text("kept")
    assert main(flags(settings)) == 2
    assert "no generation.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("policy", "no/such/folder", "model folder 'no/such/folder' does not exist"),
        ("policy", "package:no_such_package/folder", "model folder 'package:no_such_package/folder' does not exist"),
        ("num_frames", 8, "num_frames is 8; this policy makes 4 n + 1 frames, for example 9"),
        ("height", 50, "height is 50; this policy needs a multiple of 16"),
        ("guidance_scale", 0.5, "guidance_scale is 0.5"),
        ("lora", "adapters.bin", "'adapters.bin' is not a .safetensors file"),
        ("prompts", "none.txt", "none.txt does not exist"),
    ],
)
def test_invalid_settings_are_named_before_any_weights_are_loaded(
    settings: GenerationSettings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    name: str, value: object, words: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(generation, "load_pipeline", lambda *_: pytest.fail("no model may be loaded"))
    assert main(flags(settings, **{name: value})) == 2
    assert words in capsys.readouterr().err
    assert not settings.output.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--num-frames -1", "num_frames: Input should be greater than or equal to 1 (given: -1)"),
        ("--flow-shift 0", "flow_shift: Input should be greater than 0 (given: 0.0)"),
        ("--num-frame 9", "--num-frame: unknown flag; perhaps you meant --num-frames"),
        ("--family LTXPipeline", "policy.family is 'LTXPipeline', but"),
    ],
)
def test_an_invalid_flag_gives_the_message_of_recipes(
    settings: GenerationSettings, capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        sys.exit(main([*flags(settings, num_frames=None), *words.split()]))
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert "pydantic" not in error


def test_an_empty_prompt_file_is_named(settings: GenerationSettings, capsys: pytest.CaptureFixture[str]) -> None:
    settings.prompts.write_text("")
    assert main(flags(settings)) == 2
    assert f"there are no prompts in {settings.prompts}" in capsys.readouterr().err


def test_omitted_settings_are_diffusers_defaults(settings: GenerationSettings) -> None:
    unsaid = dict.fromkeys(("num_steps", "guidance_scale", "num_frames", "height", "width"))
    call = call_of(replace(settings, **unsaid))
    assert call.given() == {
        "num_inference_steps": 50, "guidance_scale": 5.0, "num_frames": 81, "height": 480, "width": 832,
        "max_sequence_length": TEXT_TOKENS,
    }  # fmt: skip
    assert call_of(replace(settings, max_sequence_length=8)).max_sequence_length == 8


def test_adapters_are_loaded_onto_the_base_model(settings: GenerationSettings, tmp_path: Path) -> None:
    """A LoRA file generates the same videos as the same adapters added to the transformer directly."""
    base = WanPipeline.from_pretrained(settings.policy)
    add_lora(base.transformer, LoraConfig(rank=2, alpha=2), seed=0)
    for name, parameter in base.transformer.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(3))
    adapters = get_peft_model_state_dict(base.transformer, adapter_name="default")
    WanPipeline.save_lora_weights(tmp_path, adapters, weight_name="adapters.safetensors")
    jobs = jobs_of(settings)[:1]
    found = videos(replace(settings, lora=tmp_path / "adapters.safetensors"), jobs=jobs)
    plain = videos(settings, jobs=jobs)
    assert (found - videos(settings, base, jobs)).abs().max() < 1e-5
    assert (found - plain).abs().max() > 1e-2


def test_adapters_of_another_model_are_an_error(settings: GenerationSettings, tmp_path: Path) -> None:
    foreign = {f"unet.down.lora_{half}.weight": torch.zeros(2, 2) for half in "AB"}
    save_file(foreign, tmp_path / "foreign.safetensors")
    with pytest.raises(WeightsError, match=r"foreign\.safetensors has an adapter of unet\.down, but the model has no"):
        pipeline_of(replace(settings, lora=tmp_path / "foreign.safetensors"))
