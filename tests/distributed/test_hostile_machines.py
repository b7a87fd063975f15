"""Training on machines with missing resources; each test combines all restrictions that can be applied at once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from bpgo_video.config.bpgo import RewardConfig
from tests.distributed.conftest import free_port
from tests.made import recipes
from tests.made.recipes import ROOT, make_shards, small_recipe, to_yaml

PROMPT = "a red circle moving down — вниз ✓"
HOOK = '''
import os, socket, sys

def refuse(event, arguments):
    """Ends the process at the first look beyond this machine, which a library might else swallow."""
    address = {"socket.connect": lambda: arguments[1], "socket.getaddrinfo": lambda: arguments}.get(event, lambda: "")()
    if isinstance(address, tuple) and address[0] not in (None, "127.0.0.1", "::1", "localhost", socket.gethostname()):
        print("reached for the network:", address, file=sys.stderr, flush=True)
        os._exit(97)

sys.addaudithook(refuse)
'''
BARE = {  # no home, no git, no compiler, no folder for temporary files, another locale, terminal and time zone
    "PATH": "/nonexistent", "TMPDIR": "/nonexistent", "CC": "/bin/false", "CXX": "/bin/false", "LC_ALL": "C",
    "PYTHONIOENCODING": "ascii", "TZ": "Pacific/Chatham", "ATEN_CPU_CAPABILITY": "default",
}  # fmt: skip
# A user without a name, who may read everything (the interpreter may be in root's home) and write only public folders.
STRANGER = [*["setpriv", "--reuid", "54321", "--regid", "54321", "--clear-groups"],
            *["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]]  # fmt: skip
MOUNT = f'{shutil.which("mount")} -t tmpfs -o size=4k,ro none /dev/shm && exec "$@"'
SMALL_SHM = ["unshare", "-m", "/bin/sh", "-c", MOUNT, "sh"]


def possible(*wrappers: Sequence[str]) -> list[str]:
    """The sandboxing commands that this machine permits, with absolute paths."""
    found: list[str] = []
    for wrapper in wrappers:
        words = [shutil.which(wrapper[0]) or "", *wrapper[1:]]
        if words[0] and not subprocess.run([*words, shutil.which("true")], capture_output=True, check=False).returncode:
            found += words
    return found


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A read-only copy of the program without .git, in a folder with a space in its name."""
    folder = tmp_path / "a clone"
    for name in ("bpgo_video", "pipelines", "ds_configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (folder, *folder.rglob("*")):
        path.chmod(path.stat().st_mode & ~0o222)
    return folder


@pytest.fixture
def offline(tmp_path: Path) -> Path:
    """A folder for PYTHONPATH that ends any process that opens a connection beyond this machine."""
    (tmp_path / "offline").mkdir()
    (tmp_path / "offline" / "sitecustomize.py").write_text(HOOK, "utf-8")
    return tmp_path / "offline"


@pytest.fixture
def open_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A world-writable folder with a recipe and shards whose held-out prompt is not ASCII."""
    monkeypatch.setattr(recipes, "PROMPTS", {**recipes.PROMPTS, "heldout": [PROMPT]})
    folder = Path(tempfile.mkdtemp(prefix="é folder "))
    folder.chmod(0o777)
    evaluation = {"samples_per_prompt": 1, "num_steps": 2}
    config = small_recipe(folder / "run", make_shards(tmp_path / "p r o m p t s"), evaluation=evaluation)
    heldout = {"still": RewardConfig(model="temporal_flickering")}  # the oracle parses only captions of its world
    config = replace(config, evaluation=replace(config.evaluation, rewards=heldout))
    (folder / "recipe.yaml").write_text(to_yaml(config), "utf-8")
    yield folder
    shutil.rmtree(folder)


def check(result: subprocess.CompletedProcess[bytes], run: Path, mode: int) -> None:
    output = result.stdout.decode("utf-8", "replace") + result.stderr.decode("utf-8", "replace")
    assert result.returncode == 0, output[-5000:]
    summary = json.loads((run / "summary.json").read_text("utf-8"))
    assert summary["max_ratio_error_first_update"] == 0
    assert PROMPT in json.dumps(json.loads((run / "samples" / "samples.json").read_text("utf-8")), ensure_ascii=False)
    written = [path for path in run.rglob("*") if path.is_file() and "wandb" not in path.parts]
    assert {path.stat().st_mode & 0o666 for path in written} == {mode}, "the umask decides"


def test_training_runs_on_one_core_for_a_user_without_name_home_or_tools(
    clone: Path, offline: Path, open_folder: Path
) -> None:
    result = subprocess.run(
        [*possible(SMALL_SHM, STRANGER), sys.executable, clone / "pipelines" / "train_video.py",
         "--config", open_folder / "recipe.yaml"],
        cwd=clone, env={**BARE, "PYTHONPATH": f"{offline}:{clone}"}, umask=0o077, capture_output=True, timeout=300,
        check=False, preexec_fn=lambda: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}),
    )  # fmt: skip
    check(result, open_folder / "run", mode=0o600)


@pytest.mark.slow
def test_launcher_offload_and_wandb_work_without_a_writable_home(clone: Path, open_folder: Path) -> None:
    launcher = str(Path(sys.executable).parent / "deepspeed")
    environment = {"HOME": "/nonexistent", "PATH": os.environ["PATH"], "CC": "/bin/false", "CXX": "/bin/false",
                   "PYTHONPATH": str(clone), "ONEDNN_MAX_CPU_ISA": "SSE41", "OMP_NUM_THREADS": "1"}  # fmt: skip
    result = subprocess.run(
        [*possible(STRANGER), sys.executable, launcher, "--num_accelerators", "2", "--master_port", str(free_port()),
         clone / "pipelines" / "train_video.py", "--config", open_folder / "recipe.yaml",
         "--deepspeed", "ds_configs/zero3_offload.json", "--wandb.project", "x"],
        cwd=clone, env=environment, umask=0o002, capture_output=True, timeout=300, check=False,
    )  # fmt: skip
    check(result, open_folder / "run", mode=0o664)
    assert list((open_folder / "run" / "wandb").glob("offline-run-*"))
