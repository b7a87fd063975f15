"""Rewards on image and video encoders: their published arithmetic, recomputed with PIL, numpy and plain torch."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModel, CLIPModel, SiglipModel, VideoPrismClipModel, VJEPA2Model, XCLIPModel

from bpgo_video.config import ConfigError, RewardConfig
from bpgo_video.rewards import Clips, preprocessing
from bpgo_video.rewards.aesthetic import Aesthetic
from bpgo_video.rewards.backbones import Backbones
from bpgo_video.rewards.base import RewardError
from bpgo_video.rewards.clip import ClipScore
from bpgo_video.rewards.dino import FirstFrameConsistency, SubjectConsistency
from bpgo_video.rewards.hpsv2 import HPSv2
from bpgo_video.rewards.open_clip import from_open_clip
from bpgo_video.rewards.pickscore import PickScore
from bpgo_video.rewards.siglip import SiglipScore
from bpgo_video.rewards.suite import RewardSuite
from bpgo_video.rewards.videoprism import VideoPrismScore
from bpgo_video.rewards.vjepa import VJepaPrediction
from bpgo_video.rewards.xclip import XClipScore
from bpgo_video.types import PromptBatch, RolloutChunk
from tests import random_rewards as folders

TEXTS = ("a red circle moving left", "a green square")
CPU = torch.device("cpu")


def some_clips(frames: int = 5, height: int = 45, width: int = 64) -> Clips:
    """Smooth videos: noise of few pixels, enlarged."""
    noise = torch.rand(2 * frames, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    videos = nn.functional.interpolate(noise, (height, width), mode="bilinear").unflatten(0, (2, frames))
    return Clips(videos, 8.0, TEXTS)


def resized(frame: torch.Tensor, height: int, width: int, kernel: Image.Resampling) -> np.ndarray:
    """By PIL, each channel as floats."""
    channels = [np.asarray(Image.fromarray(channel.numpy()).resize((width, height), kernel)) for channel in frame]
    return np.clip(np.stack(channels), 0, 1)


def normalised(pixels: np.ndarray) -> torch.Tensor:
    mean, std = (np.array(v)[:, None, None] for v in (folders.MEAN, folders.STD))
    return torch.tensor((pixels - mean) / std, dtype=torch.float32)[None]


def cut(frame: torch.Tensor, edge: int, size: int, kernel: Image.Resampling = Image.Resampling.BICUBIC) -> torch.Tensor:
    """Shorter side to `edge`, the middle of `size`."""
    height, width = frame.shape[-2:]
    scale = edge / min(height, width)
    pixels = resized(frame, int(height * scale), int(width * scale), kernel)
    top, left = (pixels.shape[1] - size) // 2, (pixels.shape[2] - size) // 2
    return normalised(pixels[:, top : top + size, left : left + size])


def unit(vector: torch.Tensor) -> np.ndarray:
    found = vector.detach().double().numpy().reshape(-1)
    return found / np.linalg.norm(found)


def text_vector(folder: Path, model: CLIPModel, text: str) -> np.ndarray:
    return unit(model.get_text_features(**folders.tokenizer()([text], return_tensors="pt")).pooler_output)


def image_vector(model: CLIPModel, frame: torch.Tensor) -> np.ndarray:
    return unit(model.get_image_features(pixel_values=cut(frame, 28, 28)).pooler_output)


def test_pickscore_is_the_scaled_cosine_of_cut_frames(tmp_path: Path) -> None:
    folder, clips = folders.random_clip(tmp_path), some_clips()
    model = CLIPModel.from_pretrained(folder).eval()
    scale = float(np.exp(model.logit_scale.item()))
    expected = [
        [scale * image_vector(model, frame) @ text_vector(folder, model, text) for frame in video]
        for video, text in zip(clips.videos, TEXTS, strict=True)
    ]
    reward = PickScore(str(folder))
    np.testing.assert_allclose(reward(clips).values.numpy(), expected, atol=scale * 1e-5)
    assert reward.range == (pytest.approx(-scale), pytest.approx(scale))


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
    """The layout of open_clip's CLIP, written for this test."""

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


def letterboxed(frame: torch.Tensor, size: int) -> torch.Tensor:
    height, width = frame.shape[-2:]
    scale = size / max(height, width)
    pixels = resized(frame, round(height * scale), round(width * scale), Image.Resampling.BICUBIC)
    canvas = np.zeros((3, size, size))
    top, left = (size - pixels.shape[1]) // 2, (size - pixels.shape[2]) // 2
    canvas[:, top : top + pixels.shape[1], left : left + pixels.shape[2]] = pixels
    return normalised(canvas)


@pytest.mark.parametrize("size", [(45, 64), (64, 30)])
def test_hpsv2_is_open_clip_s_cosine_of_whole_frames(tmp_path: Path, size: tuple[int, int]) -> None:
    base, clips = folders.random_clip(tmp_path / "base", act="gelu"), some_clips(3, *size)
    model = random_hps(tmp_path / "hps")
    expected = np.zeros((2, 3))
    for sample, text in enumerate(TEXTS):
        wanted = unit(model.encode_text(folders.tokenizer()([text], return_tensors="pt").input_ids))
        for frame, picture in enumerate(clips.videos[sample]):
            expected[sample, frame] = unit(model.visual(letterboxed(picture, 28))) @ wanted
    np.testing.assert_allclose(HPSv2(str(tmp_path / "hps"), str(base))(clips).values.numpy(), expected, atol=1e-5)


def test_open_clip_s_names_are_those_of_clip_model_and_nothing_else(tmp_path: Path) -> None:
    weights = random_hps(tmp_path / "hps").state_dict()
    converted, wanted = from_open_clip(weights), CLIPModel(folders.clip_config()).state_dict()
    assert {name: w.shape for name, w in converted.items()} == {name: w.shape for name, w in wanted.items()}
    assert sum(w.double().sum() for w in converted.values()) == pytest.approx(
        float(sum(w.double().sum() for w in weights.values()))
    )
    for name in ("visual.attnpool.weight", "transformer.resblocks.0.ln_3.weight"):
        with pytest.raises(ValueError, match="is no weight of open_clip's CLIP"):
            from_open_clip({name: torch.zeros(1)})


def heads(widths: list[int], names: list[str]) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(2)
    found = {}
    for name, before, after in zip(names, widths[:-1], widths[1:], strict=True):
        found[f"{name}weight"] = torch.randn(after, before, generator=draw)
        found[f"{name}bias"] = torch.randn(after, generator=draw)
    return found


HEADS = {
    "linear.pth": heads([16, 1], [""]),
    "mlp.pth": heads([16, 12, 8, 6, 4, 1], [f"layers.{i}." for i in (0, 2, 4, 6, 7)]),
}


@pytest.mark.parametrize("name", [*HEADS, "mlp.safetensors"])
def test_aesthetic_points_are_the_head_of_clip_s_unit_vector(tmp_path: Path, name: str) -> None:
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


def test_a_head_that_is_no_chain_or_runs_code_is_refused(tmp_path: Path) -> None:
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


def test_rewards_on_one_network_load_it_once_and_encode_a_frame_once(tmp_path: Path, monkeypatch) -> None:
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
    networks = [r.model.encoder.backbone.network for s in (suite, other) for r in s.rewards.values()]
    assert all(network is networks[0] for network in networks)
    suite.score(*chunk())
    assert sum(shown) == 2 * 3
    other.score(*chunk())
    assert sum(shown) == 2 * 2 * 3, "other clips are looked at anew"


def test_equal_classes_with_other_weights_dtype_or_preprocessing_share_nothing(tmp_path: Path) -> None:
    base = folders.random_clip(tmp_path / "base", act="gelu")
    pick = folders.random_clip(tmp_path / "pick", seed=1, act="gelu")
    random_hps(tmp_path / "hps")
    backbones, clips = Backbones(), some_clips(2)
    both = PickScore(str(pick), backbones=backbones), HPSv2(str(tmp_path / "hps"), str(base), backbones=backbones)
    alone = PickScore(str(pick)), HPSv2(str(tmp_path / "hps"), str(base))
    for shared, own in zip(both, alone, strict=True):
        torch.testing.assert_close(shared(clips).values, own(replace(clips, _found={})).values)
    half = ClipScore(str(pick), dtype="bfloat16", backbones=backbones)
    assert half.encoder.backbone.network is not both[0].encoder.backbone.network
    assert half.version != ClipScore(str(pick)).version
    torch.testing.assert_close(half(clips).values, both[0](clips).values / both[0].scale, atol=0.03, rtol=0)


def test_frames_are_scored_a_few_at_a_time(tmp_path: Path, monkeypatch) -> None:
    reward, clips = ClipScore(str(folders.random_clip(tmp_path))), some_clips()
    whole, seen = reward(clips).values, []
    encode = reward.encoder._encode
    monkeypatch.setattr(preprocessing, "FRAMES_AT_ONCE", 3)
    monkeypatch.setattr(reward.encoder, "_encode", lambda pixels: seen.append(len(pixels)) or encode(pixels))
    torch.testing.assert_close(reward(replace(clips, _found={})).values, whole)
    assert seen == [3, 3, 3, 1]


def test_siglip_score_is_the_cosine_behind_the_model_s_own_logit(tmp_path: Path) -> None:
    folder, clips = folders.random_siglip(tmp_path), some_clips(3)
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
    with pytest.raises(ValueError, match="dtype = 'half'"):
        Backbones().load(CLIPModel, tmp_path / "clip", "cpu", "half")


@pytest.mark.parametrize("make", [folders.random_dino, folders.random_vit])
def test_subject_consistency_is_vbench_s_formula(tmp_path: Path, make) -> None:
    folder, clips = make(tmp_path), some_clips(4)
    model = AutoModel.from_pretrained(folder).eval()
    found = SubjectConsistency(str(folder))(clips)
    for sample, video in enumerate(clips.videos):
        f = [unit(model(pixel_values=cut(frame, 32, 28)).last_hidden_state[:, 0]) for frame in video]
        expected = [(max(0.0, f[t] @ f[t - 1]) + max(0.0, f[t] @ f[0])) / 2 for t in range(1, 4)]
        np.testing.assert_allclose(found.values[sample].numpy(), expected, atol=1e-4)
    assert found.times.tolist() == [0.125, 0.25, 0.375]


def test_consistency_of_a_still_and_of_a_single_frame_is_one(tmp_path: Path) -> None:
    reward, clips = SubjectConsistency(str(folders.random_dino(tmp_path))), some_clips()
    still = replace(clips, videos=clips.videos[:, :1].expand(-1, 4, -1, -1, -1), _found={})
    torch.testing.assert_close(reward(still).values, torch.ones(2, 3))
    torch.testing.assert_close(reward(replace(clips, videos=clips.videos[:, :1], _found={})).values, torch.ones(2, 1))


def test_the_first_frame_is_the_picture_to_continue_where_there_is_one(tmp_path: Path) -> None:
    reward, clips = FirstFrameConsistency(str(folders.random_dino(tmp_path)), frames=3), some_clips()
    own = reward(clips).values
    torch.testing.assert_close(own[:, 0], torch.ones(2))
    pictured = replace(clips, images=clips.videos[:, 4], _found={})
    features = reward.features(clips, [0, 2, 4])
    expected = torch.cosine_similarity(features, features[:, 2:], dim=-1)
    torch.testing.assert_close(reward(pictured).values, expected)
    assert not torch.allclose(own, expected, atol=1e-3)


def test_xclip_score_is_the_model_s_own_logit_of_each_video_alone(tmp_path: Path) -> None:
    folder, clips = folders.random_xclip(tmp_path), some_clips(7)
    model = XCLIPModel.from_pretrained(folder).eval()
    expected = []
    for video, text in zip(clips.videos, TEXTS, strict=True):
        frames = [cut(video[i], 28, 28, Image.Resampling.BILINEAR)[0] for i in (0, 2, 4, 6)]
        tokens = folders.tokenizer()([text], return_tensors="pt")
        logits = model(input_ids=tokens.input_ids, pixel_values=torch.stack(frames)[None]).logits_per_video
        expected.append(logits[0] / model.logit_scale.exp())
    torch.testing.assert_close(XClipScore(str(folder))(clips).values, torch.stack(expected), atol=1e-5, rtol=0)


def test_videoprism_score_is_the_cosine_of_the_model_s_own_embeddings(tmp_path: Path) -> None:
    folder, clips = folders.random_videoprism(tmp_path), some_clips(7)
    model = VideoPrismClipModel.from_pretrained(folder).eval()
    tokens = folders.tokenizer(ends=False)(
        list(TEXTS), padding="max_length", max_length=folders.LENGTH, return_tensors="pt"
    )
    frames = [[resized(video[i], 12, 12, Image.Resampling.BICUBIC) for i in (0, 2, 4, 6)] for video in clips.videos]
    found = model(torch.tensor(np.array(frames), dtype=torch.float32), tokens.input_ids, tokens.attention_mask)
    expected = [[unit(v) @ unit(t)] for v, t in zip(found.video_embeds, found.text_embeds, strict=True)]
    np.testing.assert_allclose(VideoPrismScore(str(folder))(clips).values.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("frames", [1, 3])
def test_a_video_shorter_than_a_network_wants_is_repeated(tmp_path: Path, frames: int) -> None:
    reward, clips = XClipScore(str(folders.random_xclip(tmp_path))), some_clips(frames)
    repeated = clips.videos[:, {1: [0, 0, 0, 0], 3: [0, 1, 1, 2]}[frames]]
    torch.testing.assert_close(reward(clips).values, reward(replace(clips, videos=repeated, _found={})).values)


def test_vjepa_compares_what_it_foresaw_of_the_second_half_with_what_it_saw(tmp_path: Path) -> None:
    """Seven frames are three steps of two: the first foretells two."""
    folder, clips = folders.random_vjepa(tmp_path), some_clips(7)
    model = VJEPA2Model.from_pretrained(folder).eval()
    found = VJepaPrediction(str(folder))(clips)
    assert found.times.tolist() == [0.25, 0.5]
    for sample, video in enumerate(clips.videos):
        pixels = torch.cat([cut(frame, 32, 28, Image.Resampling.BILINEAR) for frame in video[:6]])[None]
        saw = model(pixels, skip_predictor=True).last_hidden_state[0].detach().double().numpy()
        begun = model(pixels[:, :2], skip_predictor=True).last_hidden_state
        tokens = torch.arange(12)[None]
        foresaw = model.predictor(begun, [tokens[:, :4]], [tokens[:, 4:]]).last_hidden_state[0]
        for step in (0, 1):
            expected = []
            for token in range(4 * step, 4 * step + 4):
                seen = saw[4 + token]
                seen = (seen - seen.mean()) / np.sqrt(seen.var() + 1e-5)
                expected.append(unit(foresaw[token]) @ seen / np.linalg.norm(seen))
            assert found.values[sample, step].item() == pytest.approx(np.mean(expected), abs=1e-4)


def test_vjepa_foresees_from_the_first_half_alone_and_needs_two_steps(tmp_path: Path, monkeypatch) -> None:
    reward, clips, foreseen = VJepaPrediction(str(folders.random_vjepa(tmp_path))), some_clips(8), []
    predict = reward.backbone.network.predictor.forward
    monkeypatch.setattr(
        reward.backbone.network.predictor,
        "forward",
        lambda *a: foreseen.append(predict(*a).last_hidden_state) or predict(*a),
    )
    other = clips.videos.clone()
    other[:, 4:] = other[:, 4:].flip(-1)
    first, second = reward(clips).values, reward(replace(clips, videos=other)).values
    torch.testing.assert_close(foreseen[0], foreseen[1])
    assert not torch.allclose(first, second, atol=1e-3)
    with pytest.raises(RewardError, match="it needs at least 4"):
        reward(replace(clips, videos=clips.videos[:, :3]))


MAKERS = {
    ClipScore: folders.random_clip,
    SiglipScore: folders.random_siglip,
    SubjectConsistency: folders.random_dino,
    XClipScore: folders.random_xclip,
    VideoPrismScore: folders.random_videoprism,
    VJepaPrediction: folders.random_vjepa,
}


@pytest.mark.parametrize("reward", MAKERS)
def test_scores_carry_a_gradient_that_raises_them(tmp_path: Path, reward) -> None:
    model, clips = reward(str(MAKERS[reward](tmp_path))), some_clips()
    pixels = clips.videos.clone().requires_grad_()
    before = model(replace(clips, videos=pixels, _found={})).values.mean()
    (gradient,) = torch.autograd.grad(before, pixels)
    better = (clips.videos + 0.02 * gradient / gradient.abs().max()).clamp(0, 1)
    assert model.differentiable
    assert model(replace(clips, videos=better, _found={})).values.mean() > before
