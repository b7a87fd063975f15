"""VBench dimensions on real clips and on synthetic videos with known scores, and the labels of networks.

Reference values of VBench's code are in real_suites.py; distributed/test_vbench_package.py runs that code
itself.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import ViTConfig, ViTModel

from bpgo_video.data.media import write_video
from bpgo_video.evaluation import vbench_networks as networks
from bpgo_video.evaluation.vbench_dimensions import DIMENSIONS, DimensionError, find_dimension, is_dotted, motions
from bpgo_video.evaluation.vbench_files import SuitePrompt
from bpgo_video.evaluation.vbench_networks import (
    CLIP,
    MUSIQ,
    VICLIP,
    Footage,
    Preparation,
    Sources,
    middles,
    replicated,
)
from bpgo_video.evaluation.vbench_scoring import Item, Task
from tests.made.random_rewards import random_clip, random_vit, random_xclip
from tests.made.real_clips import real_clip
from tests.made.real_suites import VBENCH, assert_equal, measured, measured_alone, write_clips
from tests.made.tiny_vbench import BACKBONES

CPU = Sources(torch.device("cpu"))
PROMPT = SuitePrompt(
    "a red circle moving left", info={"auxiliary_info": {"appearance_style": {"appearance_style": "red"}}}
)


def footage(frames: Tensor, fps: float = 8.0, prompt: SuitePrompt = PROMPT, image: Path | None = None) -> Footage:
    """A video with these frames in [0, 1]."""
    return Footage(Path("v/x-0.mp4"), prompt, (frames * 255).round().to(torch.uint8), fps, image)


def value(name: str, video: Footage, sources: Sources = CPU, network: str | None = None) -> float | bool:
    dimension = DIMENSIONS[name]
    call = dimension.network(network or BACKBONES.get(name), sources).call
    return dimension.formula(call, video).value


def prepared(frames: Tensor, preparation: Preparation) -> Tensor:
    return preparation.frames((frames * 255).round().to(torch.uint8))


@pytest.fixture(scope="module")
def clip_of_a_man() -> Tensor:
    return real_clip("carphone_pristine", 0, 5)


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    folder = tmp_path_factory.mktemp("clips") / "videos"
    folder.mkdir()
    return write_clips(folder)


@pytest.mark.parametrize("name", list(VBENCH))
def test_scores_equal_those_of_vbenchs_code(name: str, entries: list[dict[str, str]], tmp_path: Path) -> None:
    assert_equal(measured(name, entries, tmp_path), *VBENCH[name])


def test_opposite_features_count_as_unlike() -> None:
    """Features f, -f, f: at t = 1 both cosines are -1, clipped to 0; at t = 2 one is -1 and one is 1."""
    dimension = DIMENSIONS["subject_consistency"]
    signs = dimension.adapt(lambda pixels: pixels.mean(dim=(2, 3)).sign(), CPU)
    levels = torch.tensor([1.0, 0.0, 1.0]).view(3, 1, 1, 1).expand(3, 3, 16, 16)
    assert dimension.formula(signs, footage(levels)).value == pytest.approx(0.25, abs=1e-6)


def test_longer_videos_count_more_where_vbench_averages_over_frames(tmp_path: Path, clip_of_a_man: Tensor) -> None:
    items = []
    for number, count in enumerate((5, 2)):
        write_video(tmp_path / f"x-{number}.mp4", clip_of_a_man[:count] * (1 - number / 2), fps=8)
        items.append(Item(tmp_path / f"x-{number}.mp4", PROMPT, None))
    for name, weights in (
        ("subject_consistency", (4, 1)),
        ("appearance_style", (5, 2)),
        ("temporal_flickering", (1, 1)),
    ):
        dimension = DIMENSIONS[name]
        network = dimension.network(BACKBONES.get(name), CPU)
        result = measured_alone(Task(dimension, network, tuple(items), CPU))
        first, second = (video.video_results for video in result.videos)
        assert first != second
        assert result.score == pytest.approx((weights[0] * first + weights[1] * second) / sum(weights), abs=1e-12)


def test_a_still_video_is_consistent_and_smooth_and_not_dynamic(clip_of_a_man: Tensor) -> None:
    still = footage(clip_of_a_man[:1].repeat(6, 1, 1, 1))
    for name in ("subject_consistency", "background_consistency", "temporal_flickering"):
        assert value(name, still) == pytest.approx(1, abs=1e-6)
    assert value("dynamic_degree", still, network="dis") is False
    assert value("dynamic_degree", still) is False


def test_smoothness_compares_odd_frames_with_interpolated_ones() -> None:
    """Levels 0, 10, 20, 36, 40 of 255: errors of 0 and 6 between 0, 20 and 40; the sides are not multiples of 16."""
    levels = torch.tensor([0, 10, 20, 36, 40, 99]) / 255
    video = footage(levels.view(6, 1, 1, 1).expand(6, 3, 20, 33))
    assert value("motion_smoothness", video) == pytest.approx(1 - 3 / 255, abs=1e-9)


def test_interpolated_frames_are_truncated_to_bytes() -> None:
    """Truncated, not rounded: 10.5 becomes 10."""
    levels = torch.tensor([10, 10, 11]) / 255
    dimension = DIMENSIONS["motion_smoothness"]
    mean = dimension.adapt(lambda before, after: (before + after) / 2, CPU)
    assert dimension.formula(mean, footage(levels.view(3, 1, 1, 1).expand(3, 3, 16, 16))).value == 1.0


def moving(pixels: int, count: int = 16) -> Tensor:
    """A textured square that moves by this number of pixels per frame."""
    scene = real_clip("carphone_pristine", 0, 1)[0, :, :64, :176]
    frames = torch.full((count, 3, 64, 64), 0.5)
    for number in range(count):
        frames[number] = scene[:, :, number * pixels : number * pixels + 64]
    return frames


def test_a_video_is_dynamic_if_enough_pairs_are_fast() -> None:
    """The threshold is 1.5 of 64 pixels, on round(4 T/16) of T - 1 pairs; at 16 fps every other frame is used."""
    assert value("dynamic_degree", footage(moving(1)), network="dis") is False
    assert value("dynamic_degree", footage(moving(3)), network="dis") is True
    assert value("dynamic_degree", footage(moving(1), fps=24.0), network="dis") is True, "3 pixels between used frames"
    rest = moving(3)[:1].repeat(16, 1, 1, 1)
    for fast, expected in ((3, False), (4, True)):
        some = torch.cat((moving(3)[: fast + 1], rest))[:16]
        some[fast + 1 :] = some[fast]
        assert value("dynamic_degree", footage(some), network="dis") is expected, fast


def test_a_users_flow_is_judged_by_its_longest_vectors() -> None:
    """5 % of the padded pixels count, here 3 of 64; of the two pairs of T = 3 frames, round(.75) = 1 must be fast."""
    dimension = DIMENSIONS["dynamic_degree"]
    for length, expected in ((5.9 / 32, False), (6.1 / 32, True)):

        def flow(before: Tensor, after: Tensor, length: float = length) -> Tensor:
            assert before.shape == (1, 3, 8, 8), "8 x 8 needs no padding"
            found = torch.zeros(1, 2, 8, 8)
            found[0, 0, 0, :3] = length
            return found

        pairs = dimension.adapt(flow, CPU)
        assert dimension.formula(pairs, footage(torch.rand(3, 3, 8, 8))).value is expected


def test_frames_of_any_size_are_padded_symmetrically() -> None:
    image = torch.arange(12.0).view(1, 1, 3, 4)
    padded, edges = replicated(image, 8)
    assert (padded.shape, edges) == ((1, 1, 8, 8), (2, 2, 2, 3))
    assert torch.equal(padded[0, 0, 2:5, 2:6], image[0, 0])
    assert padded[0, 0, 0, 0] == 0
    assert padded[0, 0, -1, -1] == 11
    assert replicated(torch.zeros(1, 1, 16, 8), 8)[1] == (0, 0, 0, 0)


def test_large_frames_are_downscaled_for_imaging_quality() -> None:
    frames = torch.zeros(1, 3, 300, 1000, dtype=torch.uint8)
    assert MUSIQ.frames(frames).shape == (1, 3, 153, 512)
    assert MUSIQ.frames(frames[..., :512]).shape == (1, 3, 300, 512)


def test_each_segment_is_represented_by_its_middle_frame() -> None:
    assert middles(8, 81) == [4, 14, 24, 34, 44, 54, 64, 75]
    assert middles(8, 8) == list(range(8))
    assert middles(8, 3) == [0, 1, 2, 2, 2, 2, 2, 2]


@pytest.mark.parametrize(
    ("motion", "shift", "spread"),
    [
        ("static", (0, 0), 0), ("pans left", (9, 0), 0), ("pans right", (-9, 0), 0), ("tilts up", (0, 9), 0),
        ("tilts down", (0, -9), 0), ("zooms in", (0, 0), 3), ("zooms out", (0, 0), -3),
    ],
)  # fmt: skip
def test_the_camera_moves_opposite_to_its_points(motion: str, shift: tuple[int, int], spread: int) -> None:
    """The scene moves right when the camera pans left; points move away from the centre when it zooms in."""
    rows, columns = torch.meshgrid(torch.arange(10), torch.arange(10), indexing="ij")
    outwards = torch.stack((columns - 5, rows - 5), dim=-1)
    assert motions(outwards * spread + torch.tensor(shift), shorter=480) == {f"camera {motion}"}


def test_points_moving_in_different_directions_show_no_motion() -> None:
    moved = torch.zeros(10, 10, 2, dtype=torch.int64)
    moved[0, 5, 0], moved[5, 0, 1] = 9, 9
    assert motions(moved, shorter=480) == set()


@pytest.mark.parametrize(
    ("name", "frames", "words"),
    [
        ("motion_smoothness", 2, "has too few frames, 2; this dimension needs 3"),
        ("subject_consistency", 1, "has too few frames, 1; this dimension needs 2"),
        ("temporal_flickering", 1, "this dimension needs 2"),
        ("i2v_subject", 1, "this dimension needs 2"),
        ("i2v_subject", 3, "continues no image"),
        ("camera_motion", 3, "has no camera motion; VBench knows camera pans left"),
        ("appearance_style", 3, "has no style for 'plain'"),
        ("aesthetic_quality", 3, "needs LAION's head.*--head FILE"),
    ],
)
def test_missing_inputs_of_a_formula_are_named(name: str, frames: int, words: str) -> None:
    with pytest.raises(DimensionError, match=words):
        value(name, footage(torch.zeros(frames, 3, 16, 16), prompt=SuitePrompt("plain")))


def test_frames_are_centre_cropped_and_normalised() -> None:
    plan = Preparation(edge=4, crop=4, mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 0.125))
    frames = torch.zeros(1, 3, 4, 7, dtype=torch.uint8)
    frames[..., 2:6] = 255  # round(1.5) = 2
    assert torch.equal(plan.frames(frames)[0, :, 0, 0], torch.tensor([1.0, 2.0, 4.0]))
    assert torch.equal(plan.frames(frames)[0, :, 3, 3], torch.tensor([1.0, 2.0, 4.0]))
    assert plan.size_of(10, 33) == (4, 13)
    assert plan.size_of(33, 10) == (13, 4)
    assert Preparation(edge=4, square=True).size_of(33, 10) == (4, 4)


def test_only_text_to_video_frames_are_rounded_after_resizing() -> None:
    frames = torch.zeros(1, 3, 300, 300, dtype=torch.uint8)
    frames[..., 100:, :] = 255
    overshoot = CLIP.frames(frames) * torch.tensor(CLIP.std).view(3, 1, 1) + torch.tensor(CLIP.mean).view(3, 1, 1)
    rounded = VICLIP.frames(frames) * torch.tensor(CLIP.std).view(3, 1, 1) + torch.tensor(CLIP.mean).view(3, 1, 1)
    assert overshoot.max() > 1.01
    assert rounded.max() < 1 + 1e-5
    assert (rounded * 255 - (rounded * 255).round()).abs().max() < 1e-3


def test_position_embeddings_of_a_wide_frame_are_sampled_as_dino_does() -> None:
    """Column j of 14 samples the four columns at (j + 1/2)/s - 1/2 with s = (14 + .1)/4, not 14/4; cubic, a = -3/4."""
    config = ViTConfig(image_size=64, patch_size=16, hidden_size=12, num_hidden_layers=1, num_attention_heads=2)
    embeddings = ViTModel(config, add_pooling_layer=False).embeddings
    ramp = torch.arange(4.0).repeat(4)[None, :, None].expand(1, 16, 12)
    embeddings.position_embeddings.data = torch.cat((torch.full((1, 1, 12), 7.0), ramp), dim=1)
    tokens = torch.zeros(1, 1 + 4 * 14, 12)
    found = networks.dino_positions(embeddings, tokens, 64, 16 * 14 + 3)[0, :, 0]
    assert found[0] == 7
    columns = found[1:].view(4, 14)
    places = (np.arange(14) + 0.5) / (14.1 / 4) - 0.5
    inner = (places >= 1) & (places < 2)  # whose four neighbours are the four columns
    assert inner.sum() >= 3
    expected = [sum(column * cubic(place - column) for column in range(4)) for place in places[inner]]
    assert columns[2, inner].tolist() == pytest.approx(expected, abs=1e-5)
    assert torch.equal(
        networks.dino_positions(embeddings, torch.zeros(1, 17, 12), 64, 64), embeddings.position_embeddings
    )


def cubic(x: float, a: float = -0.75) -> float:
    """Keys' kernel."""
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def test_folders_of_transformers_are_networks_and_other_architectures_are_proxies(
    tmp_path: Path, clip_of_a_man: Tensor
) -> None:
    video = footage(clip_of_a_man)
    folders = {
        "subject_consistency": random_vit(tmp_path / "vit"), "background_consistency": random_clip(tmp_path / "clip"),
        "appearance_style": tmp_path / "clip", "overall_consistency": random_xclip(tmp_path / "xclip"),
    }  # fmt: skip
    for name, folder in folders.items():
        network = DIMENSIONS[name].network(str(folder), CPU)
        assert network.label == "proxy", "its architecture differs from VBench's"
        assert str(folder) in network.name
        found = DIMENSIONS[name].formula(network.call, video).value
        assert -1 <= found <= 1
        assert found == DIMENSIONS[name].formula(network.call, video).value
    with (tmp_path / "clip" / "config.json").open() as file:
        config = json.load(file)
    config["vision_config"] |= {"hidden_size": 768, "num_hidden_layers": 12, "patch_size": 32}
    (tmp_path / "clip" / "config.json").write_text(json.dumps(config))
    assert networks.label_of(tmp_path / "clip", networks.CLIP_B32) == "native"
    assert networks.label_of(tmp_path / "clip", networks.CLIP_L14) == "proxy"


@pytest.mark.parametrize(
    ("name", "network", "label"),
    [
        ("temporal_flickering", None, "exact"),
        ("dynamic_degree", None, "proxy"),
        ("subject_consistency", "efficientnet", "proxy"),
        ("motion_smoothness", BACKBONES["motion_smoothness"], "native"),
    ],
)
def test_results_name_the_networks(name: str, network: str | None, label: str) -> None:
    found = DIMENSIONS[name].network(network, CPU)
    assert found.label == label
    assert label != "native" or found.name == network


@pytest.mark.parametrize(
    ("name", "network", "words"),
    [
        ("motion_smoothness", None, r"needs a frame interpolation .*--backbone motion_smoothness=my_pkg\.module:build"),
        ("imaging_quality", None, "needs MUSIQ's weights"),
        ("temporal_flickering", "dis", "needs no network; remove --backbone temporal_flickering=dis"),
        ("overall_consistency", None, "needs ViCLIP"),
        ("dynamic_degree", "raft", r"'raft' is not one of its networks; --backbone dynamic_degree=dis \| my_pkg"),
        ("dynamic_degree", "tests.made.tiny_vbench:broken", "could not be built: ValueError: no weights here"),
        ("dynamic_degree", "tests.made.tiny_vbench:none", "could not be built"),
        ("subject_consistency", "no/such/folder", r"does not exist.*=efficientnet \| FOLDER"),
        ("imaging_quality", "none.pth", "No such file or directory: .none.pth."),
    ],
)
def test_missing_networks_are_named_with_a_remedy(name: str, network: str | None, words: str) -> None:
    with pytest.raises(DimensionError, match=words):
        DIMENSIONS[name].network(network, CPU)


def test_musiq_comes_from_pyiqa_with_the_users_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """VBench calls MUSIQ(pretrained_model_path=...) on frames in [0, 1]."""
    torch.save({"params": {"weight": torch.ones(1)}}, tmp_path / "musiq.pth")
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    with pytest.raises(DimensionError, match="pip install pyiqa, or give a factory"):
        DIMENSIONS["imaging_quality"].network(str(tmp_path / "musiq.pth"), CPU)

    class Musiq(torch.nn.Module):
        def __init__(self, pretrained_model_path: str):
            super().__init__()
            self.scale = torch.load(pretrained_model_path, weights_only=True)["params"]["weight"]

        def forward(self, frame: Tensor) -> Tensor:
            return 60 * self.scale * frame.max()

    modules = {name: ModuleType(name) for name in ("pyiqa", "pyiqa.archs", "pyiqa.archs.musiq_arch")}
    modules["pyiqa.archs.musiq_arch"].MUSIQ = Musiq  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    network = DIMENSIONS["imaging_quality"].network(str(tmp_path / "musiq.pth"), CPU)
    assert (network.label, network.name.split()[0]) == ("native", "musiq.pth")
    white = footage(torch.ones(2, 3, 16, 16))
    assert DIMENSIONS["imaging_quality"].formula(network.call, white).value == pytest.approx(60)


def test_other_dimensions_need_vbenchs_package() -> None:
    with pytest.raises(DimensionError, match="only VBench's own package measures human_action"):
        find_dimension("human_action")
    with pytest.raises(
        DimensionError, match="there is no dimension 'smoothness'; known dimensions are subject_consistency"
    ):
        find_dimension("smoothness")


def test_dotted_paths_differ_from_folders() -> None:
    assert is_dotted("my_pkg.vbench:build")
    assert not any(map(is_dotted, ("facebook/dino-vitb16", "package:module/folder", "C:\\folder", "folder", "a:b:c")))
