"""The wheel carries everything that a user needs: installed alone, it loads the embedded policy and rewards."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.made.recipes import ROOT

PROGRAM = """
import sys
from pathlib import Path
import bpgo_video
assert Path(bpgo_video.__file__).is_relative_to(Path(sys.prefix)), bpgo_video.__file__
from bpgo_video.policies import load_policy
from bpgo_video.rewards.motion import LearnedMotion
from bpgo_video.rewards.image_text import ClipScore
policy = load_policy("package:bpgo_video.tiny/weights/wan", max_sequence_length=16)
embeddings = policy.encode(["a red circle moving left"])["prompt_embeds"]
assert embeddings.abs().sum() > 0
ClipScore("package:bpgo_video.tiny/weights/clip")
LearnedMotion("package:bpgo_video.tiny/weights/motion")
prompts = Path(bpgo_video.__file__).parent / "tiny" / "prompts.jsonl"
print(len(prompts.read_text().splitlines()), sum(p.numel() for p in policy.transformers["transformer"].parameters()))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, cwd=folder)
    return next(folder.glob("*.whl"))


def test_the_wheel_works_in_an_empty_environment_outside_the_clone(wheel: Path, tmp_path: Path) -> None:
    """The dependencies come from this environment's folder; the package itself only from the wheel."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    site = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", str(wheel)]
    subprocess.run(install, check=True, cwd=tmp_path)
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    result = subprocess.run(
        [str(python), "-c", PROGRAM], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    prompts, parameters = map(int, result.stdout.split()[-2:])
    assert prompts == 96
    assert parameters > 500_000


def test_embedded_weights_stay_small() -> None:
    weights = ROOT / "bpgo_video" / "tiny" / "weights"
    names = ("wan", "clip")
    sizes = {name: sum(p.stat().st_size for p in (weights / name).rglob("*") if p.is_file()) for name in names}
    assert sizes["wan"] <= 8 * 2**20
    assert sizes["clip"] <= 4 * 2**20
