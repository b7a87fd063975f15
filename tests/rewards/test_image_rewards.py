"""Rewards on image encoders: published formulas, recomputed with PIL, numpy and plain torch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPModel, SiglipModel

from bpgo_video.config.bpgo import ConfigError, RewardConfig
from bpgo_video.files import resolve_folder
from bpgo_video.rewards import networks
from bpgo_video.rewards.networks import WITHOUT_WEIGHTS, Backbones, Preprocessing
from bpgo_video.rewards.suite import RewardSuite
from bpgo_video.rewards.text import Aesthetic, ClipImageScore, ClipScore, HPSv2, PickScore, SiglipScore, from_open_clip
from bpgo_video.types import PromptBatch, RolloutChunk
from tests.made import random_rewards as folders
from tests.made.pil_reference import TEXTS, cut, normalised, resized, some_clips, unit
from tests.made.random_open_clip import random_hps

CPU = torch.device("cpu")


def text_vector(folder: Path, model: CLIPModel, text: str) -> np.ndarray:
    return unit(model.get_text_features(**folders.tokenizer()([text], return_tensors="pt")).pooler_output)


def image_vector(model: CLIPModel, frame: torch.Tensor) -> np.ndarray:
    return unit(model.get_image_features(pixel_values=cut(frame, 28, 28)).pooler_output)


def test_clip_score_is_the_cosine_of_cropped_frames_and_pickscore_scales_it(tmp_path: Path) -> None:
    folder, clips = folders.random_clip(tmp_path), some_clips()
    model = CLIPModel.from_pretrained(folder).eval()
    scale = float(np.exp(model.logit_scale.item()))
    expected = np.array([
        [image_vector(model, frame) @ text_vector(folder, model, text) for frame in video]
        for video, text in zip(clips.videos, TEXTS, strict=True)
    ])  # fmt: skip
    reward = PickScore(str(folder))
    np.testing.assert_allclose(ClipScore(str(folder))(clips).values.numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(reward(clips).values.numpy(), scale * expected, atol=scale * 1e-5)
    assert reward.range == (pytest.approx(-scale), pytest.approx(scale))


def letterboxed(frame: torch.Tensor, size: int) -> torch.Tensor:
    height, width = frame.shape[-2:]
    scale = size / max(height, width)
    pixels = resized(frame, round(height * scale), round(width * scale), Image.Resampling.BICUBIC)
    canvas = np.zeros((3, size, size))
    top, left = (size - pixels.shape[1]) // 2, (size - pixels.shape[2]) // 2
    canvas[:, top : top + pixels.shape[1], left : left + pixels.shape[2]] = pixels
    return normalised(canvas)


@pytest.mark.parametrize("size", [(45, 64), (64, 30)])
def test_hpsv2_is_the_cosine_of_whole_frames_in_open_clip(tmp_path: Path, size: tuple[int, int]) -> None:
    base, clips = folders.random_clip(tmp_path / "base", act="gelu"), some_clips(3, *size)
    model = random_hps(tmp_path / "hps")
    expected = np.zeros((2, 3))
    for sample, text in enumerate(TEXTS):
        text_embedding = unit(model.encode_text(folders.tokenizer()([text], return_tensors="pt").input_ids))
        for frame, picture in enumerate(clips.videos[sample]):
            expected[sample, frame] = unit(model.visual(letterboxed(picture, 28))) @ text_embedding
    np.testing.assert_allclose(HPSv2(str(tmp_path / "hps"), str(base))(clips).values.numpy(), expected, atol=1e-5)


def test_open_clip_names_convert_to_clip_model_names_and_others_are_refused(tmp_path: Path) -> None:
    weights = random_hps(tmp_path / "hps").state_dict()
    converted, reference = from_open_clip(weights), CLIPModel(folders.clip_config()).state_dict()
    assert {name: w.shape for name, w in converted.items()} == {name: w.shape for name, w in reference.items()}
    assert sum(w.double().sum() for w in converted.values()) == pytest.approx(
        float(sum(w.double().sum() for w in weights.values()))
    )
    for name in ("visual.attnpool.weight", "transformer.resblocks.0.ln_3.weight"):
        with pytest.raises(ValueError, match="is no weight of open_clip's CLIP"):
            from_open_clip({name: torch.zeros(1)})


def heads(widths: list[int], names: list[str]) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(2)
    actual = {}
    for name, before, after in zip(names, widths[:-1], widths[1:], strict=True):
        actual[f"{name}weight"] = torch.randn(after, before, generator=draw)
        actual[f"{name}bias"] = torch.randn(after, generator=draw)
    return actual


HEADS = {
    "linear.pth": heads([16, 1], [""]),
    "mlp.pth": heads([16, 12, 8, 6, 4, 1], [f"layers.{i}." for i in (0, 2, 4, 6, 7)]),
}


@pytest.mark.parametrize("name", [*HEADS, "mlp.safetensors"])
def test_aesthetic_score_is_the_head_of_the_unit_embedding(tmp_path: Path, name: str) -> None:
    folder, clips = folders.random_clip(tmp_path / "clip"), some_clips(3)
    weights = HEADS[name.replace("safetensors", "pth")]
    save_file(weights, tmp_path / name) if name.endswith("safetensors") else torch.save(weights, tmp_path / name)
    model = CLIPModel.from_pretrained(folder).eval()
    expected = np.zeros((2, 3))
    for sample, frame in np.ndindex(2, 3):
        points = image_vector(model, clips.videos[sample, frame])
        for layer in (key.removesuffix("weight") for key in weights if key.endswith("weight")):
            points = weights[f"{layer}weight"].double().numpy() @ points + weights[f"{layer}bias"].double().numpy()
        expected[sample, frame] = points.item()
    np.testing.assert_allclose(Aesthetic(str(tmp_path / name), str(folder))(clips).values.numpy(), expected, rtol=1e-3)


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return print, ("run",)


def test_a_malformed_head_or_one_that_runs_code_is_refused(tmp_path: Path) -> None:
    folder = str(folders.random_clip(tmp_path / "clip"))
    for weights in ({"weight": torch.zeros(1, 16)}, heads([16, 5], [""]), HEADS["linear.pth"] | {"x": torch.zeros(1)}):
        torch.save(weights, tmp_path / "head.pth")
        with pytest.raises(ValueError, match="an aesthetic head is a chain"):
            Aesthetic(str(tmp_path / "head.pth"), folder)
    torch.save({"weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="holds more than tensors"):
        Aesthetic(str(tmp_path / "evil.pth"), folder)


def chunk() -> tuple[RolloutChunk, PromptBatch]:
    rows = torch.tensor([0, 1])
    return RolloutChunk((), some_clips().videos, rows, torch.zeros_like(rows)), PromptBatch(rows, TEXTS, {})


def test_rewards_that_share_a_network_load_it_once_and_encode_each_frame_once(tmp_path: Path, monkeypatch) -> None:
    folder = str(folders.random_clip(tmp_path / "clip"))
    torch.save(HEADS["linear.pth"], tmp_path / "head.pth")
    shown: list[int] = []
    encode = CLIPModel.get_image_features

    def counted(self: CLIPModel, pixel_values: torch.Tensor) -> object:
        shown.append(len(pixel_values))
        return encode(self, pixel_values)

    monkeypatch.setattr(CLIPModel, "get_image_features", counted)
    backbones = Backbones()
    options = {"model": folder, "frames": 3}
    trained = {
        "text": RewardConfig(model="clip_score", options=options),
        "beauty": RewardConfig(model="aesthetic", options={**options, "head": str(tmp_path / "head.pth")}),
    }
    heldout = {"held": RewardConfig(model="pickscore", options=options)}
    suite = RewardSuite(trained, CPU, 8.0, backbones=backbones)
    other = RewardSuite(heldout, CPU, 8.0, backbones=backbones)
    networks = [r.model.backbone.network for s in (suite, other) for r in s.rewards.values()]
    assert all(network is networks[0] for network in networks)
    suite.score(*chunk())
    assert sum(shown) == 2 * 3
    other.score(*chunk())
    assert sum(shown) == 2 * 2 * 3, "other clips are encoded again"


def test_networks_with_other_weights_dtype_or_preprocessing_are_not_shared(tmp_path: Path) -> None:
    base = folders.random_clip(tmp_path / "base", act="gelu")
    pick = folders.random_clip(tmp_path / "pick", seed=1, act="gelu")
    random_hps(tmp_path / "hps")
    backbones, clips = Backbones(), some_clips(2)
    both = PickScore(str(pick), backbones=backbones), HPSv2(str(tmp_path / "hps"), str(base), backbones=backbones)
    alone = PickScore(str(pick)), HPSv2(str(tmp_path / "hps"), str(base))
    for shared, own in zip(both, alone, strict=True):
        torch.testing.assert_close(shared(clips).values, own(replace(clips, _cache={})).values)
    half = ClipScore(str(pick), dtype="bfloat16", backbones=backbones)
    assert half.backbone.network is not both[0].backbone.network
    assert half.version != ClipScore(str(pick)).version
    torch.testing.assert_close(half(clips).values, both[0](clips).values / both[0].scale, atol=0.03, rtol=0)


def test_features_with_other_preprocessing_are_not_shared(tmp_path: Path) -> None:
    folder, other, backbones = folders.random_clip(tmp_path / "clip"), tmp_path / "other", Backbones()
    folders.tokenizer(ends=False).save_pretrained(other)
    (other / "preprocessor_config.json").write_text(json.dumps(folders.crops(28, 28) | {"image_mean": [0.1] * 3}))
    clips, seen = some_clips(), []
    for reward, options in (
        (ClipScore, {}), (ClipScore, {"frames": 3}), (PickScore, {}), (PickScore, {"processor": str(other)})
    ):  # fmt: skip
        shared, own = (reward(str(folder), backbones=b, **options) for b in (backbones, None))
        seen.append(shared(clips).values)
        assert torch.equal(seen[-1], own(replace(clips, _cache={})).values)
    assert not torch.allclose(seen[2], seen[3])


def test_frames_are_scored_in_small_batches(tmp_path: Path, monkeypatch) -> None:
    reward, clips = ClipScore(str(folders.random_clip(tmp_path))), some_clips()
    whole, seen = reward(clips).values, []
    encode = reward.encode
    monkeypatch.setattr(networks, "FRAMES_AT_ONCE", 3)
    monkeypatch.setattr(reward, "encode", lambda pixels: seen.append(len(pixels)) or encode(pixels))
    torch.testing.assert_close(reward(replace(clips, _cache={})).values, whole)
    assert seen == [3, 3, 3, 1]


def test_clip_image_score_is_the_cosine_to_the_image_or_to_frame_0(tmp_path: Path) -> None:
    folder, clips = folders.random_clip(tmp_path), some_clips(3)
    reward = ClipImageScore(str(folder))
    frames = ClipScore(str(folder)).embed_frames(clips, [0, 1, 2])
    torch.testing.assert_close(reward(clips).values, torch.einsum("sfd,sd->sf", frames, frames[:, 0]))
    pictures = replace(clips, images=clips.videos[:, 2], _cache={})
    torch.testing.assert_close(reward(pictures).values, torch.einsum("sfd,sd->sf", frames, frames[:, 2]))
    assert reward(pictures).values[:, 2].tolist() == pytest.approx([1.0, 1.0], abs=1e-5)


def test_siglip_score_is_the_cosine_in_the_logit_of_the_model(tmp_path: Path) -> None:
    folder, clips = (
        folders.random_siglip(tmp_path),
        replace(some_clips(3), texts=("A Red circle MOVING left", TEXTS[1])),
    )
    model = SiglipModel.from_pretrained(folder).eval()
    tokens = folders.tokenizer()(list(TEXTS), padding="max_length", max_length=folders.LENGTH, return_tensors="pt")
    expected = torch.zeros(2, 3)
    for sample, frame in np.ndindex(2, 3):
        pixels = resized(clips.videos[sample, frame], 28, 28, Image.Resampling.BILINEAR)
        pixels = torch.tensor((pixels - 0.5) / 0.5, dtype=torch.float32)[None]
        logits = model(input_ids=tokens.input_ids, pixel_values=pixels).logits_per_image[0, sample]
        expected[sample, frame] = (logits - model.logit_bias) / model.logit_scale.exp()
    torch.testing.assert_close(SiglipScore(str(folder))(clips).values, expected, atol=1e-5, rtol=0)


def test_a_folder_without_all_weights_is_refused(tmp_path: Path) -> None:
    folder = folders.random_dino(tmp_path / "dino")
    (folders.random_clip(tmp_path / "clip") / "model.safetensors").replace(folder / "model.safetensors")
    with pytest.raises(ConfigError, match="does not hold a whole Dinov2Model"):
        RewardSuite({"r": RewardConfig(model="subject_consistency", options={"model": str(folder)})}, CPU, 8.0)
    with pytest.raises(ValueError, match="must be 'siglip'"):
        SiglipScore(str(tmp_path / "clip"))
    with pytest.raises(ValueError, match="dtype is 'half'; known are"):
        Backbones().load(CLIPModel, tmp_path / "clip", "cpu", "half")


CONFIGS: dict[str, tuple[dict[str, Any], tuple[str, tuple[int, int], int, str]]] = {
    "CLIP": (
        {
            "size": {"shortest_edge": 224},
            "crop_size": {"height": 224, "width": 224},
            "do_center_crop": True,
            "resample": 3,
        },
        ("crop", (224, 224), 224, "bicubic"),
    ),
    "old CLIP": ({"size": 224, "crop_size": 224, "resample": 3}, ("crop", (224, 224), 224, "bicubic")),
    "X-CLIP": ({"size": 224, "do_center_crop": True, "resample": 2}, ("crop", (224, 224), 224, "bilinear")),
    "DINO": ({"size": 224, "resample": 2}, ("stretch", (224, 224), 0, "bilinear")),
    "SigLIP": (
        {"size": {"height": 384, "width": 384}, "do_center_crop": None, "resample": 2},
        ("stretch", (384, 384), 0, "bilinear"),
    ),
    "V-JEPA 2": (
        {"size": {"shortest_edge": 292}, "crop_size": {"height": 256, "width": 256}, "resample": 2},
        ("crop", (256, 256), 292, "bilinear"),
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_preprocessor_configs_of_all_families_are_read(tmp_path: Path, name: str) -> None:
    config, expected = CONFIGS[name]
    statistics = {"image_mean": folders.MEAN, "image_std": folders.STD}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config | statistics))
    actual = Preprocessing.of_folder(tmp_path)
    assert (actual.fit, actual.size, actual.edge, actual.mode) == expected
    assert (actual.mean, actual.std) == (tuple(folders.MEAN), tuple(folders.STD))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config | statistics | {"resample": 1}))
    with pytest.raises(ValueError, match="resample = 1"):
        Preprocessing.of_folder(tmp_path)


def test_only_the_needed_files_of_a_hub_folder_are_requested(tmp_path: Path, monkeypatch) -> None:
    requested: list[tuple[str, list[str] | None]] = []

    def download(name: str, allow_patterns: list[str] | None) -> str:
        requested.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve_folder("owner/name", only=WITHOUT_WEIGHTS) == resolve_folder("owner/name") == tmp_path
    assert requested == [("owner/name", ["*.json", "*.txt", "*.jinja"]), ("owner/name", None)]


def test_a_version_follows_the_files_that_are_read_and_no_others(tmp_path: Path) -> None:
    base, hps = folders.random_clip(tmp_path / "base", act="gelu"), tmp_path / "hps"
    random_hps(hps)
    before = HPSv2(str(hps), str(base)).version
    (hps / "HPS_v2_compressed.pt").write_bytes(b"another")
    (base / "open_clip_pytorch_model.bin").write_bytes(b"unread")
    assert HPSv2(str(hps), str(base)).version == before
    config = base / "preprocessor_config.json"
    config.write_text(config.read_text().replace("0.48", "0.5"))
    assert HPSv2(str(hps), str(base)).version != before
