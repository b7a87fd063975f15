"""Generation with Wan 2.2: videos equal those of its pipelines, with guidance and adapters for both experts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image

from bpgo_video.config.generation import GenerationError, GenerationSettings
from bpgo_video.config.policy import LoraConfig
from bpgo_video.config.reading import to_yaml
from bpgo_video.data.records import prompt_id
from bpgo_video.inference.conversion import Conversion, convert
from bpgo_video.inference.generate import generate
from bpgo_video.inference.pipeline import resolve
from bpgo_video.inference.run_weights import find_checkpoint, find_model
from bpgo_video.policies.lora import add_lora
from bpgo_video.randomness import keyed_noise
from tests.families import CASES, Case
from tests.inference.videos import pipeline_of, videos
from tests.made.zero_checkpoints import write_checkpoint

TEXT = "a red circle moving left"
LORA = LoraConfig(rank=2, alpha=4)
NAMES = ("transformer", "transformer_2")


def settings_of(case: Case, tmp_path: Path) -> GenerationSettings:
    """Settings for one video of one prompt with an image."""
    Image.new("RGB", (case.video.width, case.video.height), (200, 90, 10)).save(tmp_path / "image.png")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": TEXT, "image": "image.png"}) + "\n")
    case.write(tmp_path / "pipeline")
    return GenerationSettings(
        policy=str(tmp_path / "pipeline"), prompts=prompts, output=tmp_path / "videos", seed=5, num_steps=3,
        guidance_scale=3.0, guidance_scale_2=case.guidance_scale_2, num_frames=9, height=case.video.height,
        width=case.video.width, family=case.family,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["wan22", "wan22_image", "wan22_ti2v", "wan22_ti2v_image"])
def test_videos_of_both_experts_equal_those_of_diffusers(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    settings = settings_of(case, tmp_path)
    found, policy = videos(settings), find_model(settings).policy
    noise = keyed_noise(policy.latent_shape(case.video), [(5, "generation", prompt_id(TEXT), 0)], "cpu")
    if policy.given_frames:
        noise = torch.cat([torch.randn(1, 4, 1, 6, 6), noise], dim=2)  # the pipeline does not use it
    own: dict[str, Any] = {"image": Image.open(tmp_path / "image.png")} if policy.takes_images else {}
    own |= {"guidance_scale_2": 2.0} if case.guidance_scale_2 else {}
    expected = getattr(diffusers, policy.pipeline_name).from_pretrained(settings.policy)(
        prompt=TEXT, negative_prompt="", height=case.video.height, width=case.video.width, num_frames=9,
        num_inference_steps=3, guidance_scale=3.0, max_sequence_length=16, latents=noise, output_type="pt", **own,
    ).frames  # fmt: skip
    assert torch.equal(found, expected)


def test_an_image_to_video_policy_writes_files_and_manifest(tmp_path: Path) -> None:
    settings = replace(settings_of(CASES["wan22_ti2v_image"], tmp_path), num_steps=1)
    content = json.loads(generate(settings).read_text())
    assert content["complete"]
    assert content["settings"]["guidance_scale_2"] is None


@pytest.mark.parametrize(
    ("case", "change", "words"),
    [
        ("wan22_ti2v", {"guidance_scale_2": 2.0}, r"guidance_scale_2 is 2\.0, but the policy has one transformer"),
        ("wan22", {"guidance_scale": 1.0}, r"guidance_scale_2 is 2\.0 with guidance_scale = 1"),
        ("wan22_ti2v", {"lora_2": Path("a.safetensors")}, "lora_2 is 'a.safetensors', but .* has no transformer_2"),
        ("wan22", {"lora_2": Path("a.safetensors")}, "'a.safetensors' is not a .safetensors file that exists"),
    ],
)
def test_unsupported_settings_are_named(case: str, change: dict[str, Any], words: str, tmp_path: Path) -> None:
    settings = replace(settings_of(CASES[case], tmp_path), **change)
    with pytest.raises(GenerationError, match=words):
        resolve(settings, find_model(settings).policy)


def adapted_run(settings: GenerationSettings, run_dir: Path, trained: tuple[str, ...]) -> tuple[Path, Any]:
    """A run that trained adapters of these transformers, and the pipeline with the same adapters added directly."""
    pipeline = pipeline_of(settings)
    generator, adapters = torch.Generator().manual_seed(7), {}
    for name in trained:
        module = getattr(pipeline, name)
        add_lora(module, LORA, seed=0)
        for key, parameter in module.named_parameters():
            if ".lora_" in key:
                torch.nn.init.normal_(parameter, std=0.3, generator=generator)
                adapters[f"{name}.{key}"] = parameter.detach()
    config = CASES["wan22"].recipe(Path(settings.policy))
    policy = replace(config.policy, lora=LORA, trained=trained, family=settings.family)
    checkpoint = write_checkpoint(run_dir / "checkpoints" / "step-000002", [adapters])
    (run_dir / "config.yaml").write_text(to_yaml(replace(config, policy=policy)))
    return checkpoint, pipeline


@pytest.mark.parametrize("form", ["lora", "comfyui"])
@pytest.mark.parametrize(("case", "trained"), [("wan22", NAMES), ("wan22_image", NAMES), ("wan22", NAMES[1:])])
def test_each_trained_expert_gets_an_adapter_file(
    case: str, trained: tuple[str, ...], form: str, tmp_path: Path
) -> None:
    settings = settings_of(CASES[case], tmp_path)
    checkpoint, by_hand = adapted_run(settings, tmp_path / "run", trained)
    output = tmp_path / form
    convert(Conversion(find_checkpoint(checkpoint), "raw", output), form, verify=True)
    files = {"transformer": "pytorch_lora_weights.safetensors", "transformer_2": "pytorch_lora_weights_2.safetensors"}
    assert {path.name for path in output.glob("*.safetensors")} == {files[name] for name in trained}
    flags = {"lora" if name == "transformer" else "lora_2": output / files[name] for name in trained}
    found, expected = videos(replace(settings, **flags)), videos(settings, by_hand)
    assert (found - expected).abs().max() < 1e-5
    assert (found - videos(settings)).abs().max() > 0.01
    if len(trained) == 2:
        swapped = replace(settings, lora=flags["lora_2"], lora_2=flags["lora"])
        assert (videos(swapped) - expected).abs().max() > 0.01
