"""The wandb copy of a run, read from wandb's files: records, videos with captions, and the table."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from bpgo_video.config.run import WandbConfig
from bpgo_video.data.media import write_video
from bpgo_video.training.metrics import RunLog, replace_unwritable_home
from tests.made.real_clips import real_clip
from tests.made.wandb_files import history, offline_runs, table

VALUES = {"reward": 0.5, "trust_mean": 0.9, "grad_norm": 1.0, "ratio_mean": 1.0, "seconds": 0.25}
OFFLINE = WandbConfig(project="test", mode="offline")


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run directory with two videos in samples/, isolated from this machine's wandb settings."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "of_wandb"))
    for number in range(2):
        write_video(
            tmp_path / "run" / "samples" / f"{number}.mp4", real_clip("carphone_pristine", number, number + 4), 8
        )
    return tmp_path / "run"


def test_videos_are_copied_with_their_captions_into_the_record_of_their_step(run_dir: Path) -> None:
    """This holds after a resume too: truncated records are repeated in a new file under the same id."""
    videos = [(run_dir / "samples" / f"{number}.mp4", f"ein Würfel, {number} | oracle: 0.5") for number in range(2)]
    for steps in (range(3, 6), range(5, 7)):
        with RunLog(run_dir, OFFLINE, 7, steps[0], {"seed": 1}) as log:
            for step in steps:
                log.media(step, "heldout", videos if step == 5 else videos[:1])
                log.log(step, {**VALUES, "heldout/oracle": step / 10})
        time.sleep(1)  # wandb's folder names have a resolution of one second
    first, second = offline_runs(run_dir)
    assert first.name.rpartition("-")[2] == second.name.rpartition("-")[2] == (run_dir / "wandb_run_id.txt").read_text()
    for folder, steps in ((first, (3, 4, 5)), (second, (5, 6))):
        rows = history(folder)
        assert [row["_step"] for row in rows] == list(steps)
        for row in rows:
            assert row["heldout/oracle"] == row["_step"] / 10
            expected = videos if row["_step"] == 5 else videos[:1]
            assert row["heldout.captions"] == [caption for _, caption in expected]
            copies = [(folder / "files" / video["path"]).read_bytes() for video in row["heldout.videos"]]
            assert copies == [path.read_bytes() for path, _ in expected]


def test_a_table_has_its_columns_and_an_empty_cell_for_a_missing_video(run_dir: Path) -> None:
    there, gone = run_dir / "samples" / "1.mp4", run_dir / "samples" / "2.mp4"
    rows = [
        {"prompt": "a cat", "before": gone, "after": there, "oracle before": 0.25, "oracle after": 0.5},
        {"prompt": "a dog", "before": there, "after": there, "oracle before": 0.5, "oracle after": 1 / 3},
    ]
    with RunLog(run_dir, OFFLINE, 2, 1) as log:
        log.table(1, "heldout_before_after", rows)
        log.table(1, "nothing", [])
        log.log(1, VALUES)
    (folder,) = offline_runs(run_dir)
    (record,) = history(folder)
    assert (record["_step"], record["reward"]) == (1, 0.5)
    assert not any(key.startswith("nothing") for key in record)
    found = table(folder, "heldout_before_after")
    assert found == [
        {column: cell.read_bytes() if cell == there else None if cell == gone else cell for column, cell in row.items()}
        for row in rows
    ]
    assert list(found[0]) == list(rows[0])


@pytest.mark.parametrize("home", ["missing", "unset", "writable"])
def test_with_an_unwritable_home_wandbs_files_are_in_the_run_directory(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR")
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    places = {"missing": tmp_path / "nowhere", "unset": tmp_path / "unused", "writable": tmp_path}
    monkeypatch.setenv("HOME", str(places[home]))
    if home == "unset":
        monkeypatch.delenv("HOME")
        monkeypatch.setattr(Path, "home", no_home)
    replace_unwritable_home(tmp_path / "run")
    expected = None if home == "writable" else str(tmp_path / "run" / "wandb")
    assert {os.environ.get(name) for name in names} == {expected}
    assert os.environ["HOME"] == str(tmp_path / "run" if home == "unset" else places[home])


def no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")  # as pathlib raises for a user without a name
