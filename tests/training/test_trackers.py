"""Trackers with their real packages, offline: what they hold after a run and after a resume, and how they may fail."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from bpgo_video.config.bpgo import Config, ConfigError
from bpgo_video.config.reading import config_from_dict, read_yaml, to_yaml
from bpgo_video.config.run import TrackioConfig, WandbConfig
from bpgo_video.data.media import write_video
from bpgo_video.training import trackers
from bpgo_video.training.metrics import RunLog, read_metrics
from bpgo_video.training.trackers import Trackers, check_trackers, named_trackers, replace_unwritable_home
from tests.made.real_clips import real_clip
from tests.made.recipes import RECIPE, python_path
from tests.made.wandb_files import history, offline_runs, table

VALUES = {"reward": 0.5, "trust_mean": 0.9, "grad_norm": 1.0, "ratio_mean": 1.0, "seconds": 0.25}


@pytest.fixture
def config(tmp_path: Path, recipe: Config, monkeypatch: pytest.MonkeyPatch) -> Config:
    """The shipped recipe, with two videos in RUN/samples, isolated from this machine's settings of trackers."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "of_wandb"))
    run_dir = tmp_path / "run"
    for number in range(2):
        write_video(run_dir / "samples" / f"{number}.mp4", real_clip("carphone_pristine", number, number + 4), 8)
    return replace(
        recipe,
        run=replace(recipe.run, dir=str(run_dir)),
        wandb=WandbConfig(name="mine", mode="offline"),
        trackio=TrackioConfig(project="test"),
    )


def videos_of(config: Config) -> list[tuple[Path, str]]:
    samples = Path(config.run.dir) / "samples"
    return [(samples / f"{number}.mp4", f"ein Würfel, {number} | oracle: 0.5") for number in range(2)]


def log_steps(config: Config, steps: range, name: str) -> None:
    """Records, and in step 5 two videos and otherwise one; the last step has a table."""
    videos = videos_of(config)
    rows = [{"prompt": "a cat", "before": videos[0][0].with_name("2.mp4"), "after": videos[1][0], "oracle": 0.25}]
    with RunLog(Path(config.run.dir), Trackers([name], config, steps[0]), steps[-1] + 1, steps[0]) as log:
        for step in steps:
            log.media(step, "heldout", videos if step == 5 else videos[:1])
            if step == 6:
                log.table(step, "heldout_before_after", rows)
                log.table(step, "nothing", [])
            log.log(step, {**VALUES, "heldout/oracle": step / 10})


def log_and_resume(config: Config, name: str) -> None:
    """Steps 3 to 5, then a resume from a checkpoint before step 5: that step is repeated."""
    log_steps(config, range(3, 6), name)
    time.sleep(1)  # names of wandb's folders and of TensorBoard's files have a resolution of one second
    log_steps(config, range(5, 7), name)


def test_wandb_has_each_steps_record_with_its_videos_under_one_id(config: Config) -> None:
    log_and_resume(config, "wandb")
    run_dir, videos = Path(config.run.dir), videos_of(config)
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
            assert not any(key.startswith("nothing") for key in row)
    there = videos[1][0].read_bytes()
    expected_row = {"prompt": "a cat", "before": None, "after": there, "oracle": 0.25}
    assert table(second, "heldout_before_after") == [expected_row], "the cell of a missing video is empty"


def test_wandb_without_a_key_is_offline(config: Config) -> None:
    log_steps(replace(config, wandb=WandbConfig(project="test", mode="online")), range(1), "wandb")
    assert [row["_step"] for row in history(offline_runs(Path(config.run.dir))[0])] == [0]


def test_tensorboard_shows_each_step_once_with_videos_and_table(config: Config) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_and_resume(config, "tensorboard")
    events = EventAccumulator(str(Path(config.run.dir) / "tensorboard"), size_guidance={"images": 0, "tensors": 0})
    events.Reload()
    assert [(one.step, one.value) for one in events.Scalars("heldout/oracle")] == [
        (step, pytest.approx(step / 10)) for step in (3, 4, 5, 6)
    ]
    assert set(events.Tags()["scalars"]) == {*VALUES, "heldout/oracle"}
    assert [one.step for one in events.Images("heldout/0")] == [3, 4, 5, 6]
    (second,) = events.Images("heldout/1")
    with Image.open(io.BytesIO(second.encoded_image_string)) as image:
        assert (image.format, image.n_frames, image.size) == ("GIF", 4, (second.width, second.height))
        assert image.info["duration"] == 120, "a GIF counts hundredths of a second"
    texts = {tag: events.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    assert texts["heldout/1/text_summary"] == "ein Würfel, 1 | oracle: 0.5"
    assert texts["heldout_before_after/text_summary"].splitlines()[0] == "| prompt | before | after | oracle |"
    assert f"dir: {config.run.dir}" in texts["recipe/text_summary"]


def test_trackio_shows_each_step_once_with_videos_and_table(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(Path(config.run.dir).parent / "of_trackio"))  # read by its first import
    pytest.importorskip("trackio")
    log_and_resume(config, "trackio")
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = SQLiteStorage.get_runs("test")
    rows = SQLiteStorage.get_logs("test", run)
    assert [(row["step"], row["heldout/oracle"]) for row in rows] == [(step, step / 10) for step in (3, 4, 5, 6)]
    assert [row.get("heldout/1", {}).get("caption") for row in rows] == [
        None,
        None,
        "ein Würfel, 1 | oracle: 0.5",
        None,
    ]
    assert rows[3]["heldout_before_after"]["_value"][0]["prompt"] == "a cat"


class Broken:
    """A user's tracker that works for one step, then fails as a network does."""

    calls: list[str] = []

    def __init__(self, config: Config, start_step: int) -> None:
        self.calls[:] = [f"open {config.run.dir} {start_step}"]

    def log(self, step: int, record: dict[str, float]) -> None:
        self.calls.append(f"log {step}")
        if step == 1:
            raise ConnectionError("no route to host")

    def media(self, step: int, name: str, videos: Any) -> None:
        self.calls.append(f"media {step}")

    def finish(self, failed: bool) -> None:
        self.calls.append("finish")


class NeverOpens(Broken):
    def __init__(self, config: Config, start_step: int) -> None:
        raise TimeoutError("no answer in 90 s")


def test_a_tracker_that_fails_is_reported_once_and_the_run_goes_on(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"{__name__}:Broken"
    open_trackers = Trackers([name, f"{__name__}:NeverOpens", "tensorboard"], config, 0)
    with RunLog(Path(config.run.dir), open_trackers, 4) as log:
        for step in range(4):
            log.media(step, "heldout", videos_of(config))
            log.log(step, VALUES)
    assert Broken.calls == [f"open {config.run.dir} 0", "media 0", "log 0", "media 1", "log 1"]
    assert len(read_metrics(Path(config.run.dir) / "metrics.jsonl")) == 4
    shown = capsys.readouterr().err
    assert shown.count("warning: tracker") == 2
    assert f"ConnectionError: no route to host\nwarning: tracker {name} failed in log(1,). The run goes on" in shown
    assert f"TimeoutError: no answer in 90 s\nwarning: tracker {__name__}:NeverOpens failed in opening" in shown


@pytest.mark.parametrize(
    ("tree", "names"),
    [
        ({}, []),
        ({"wandb": {"project": "mine", "name": None, "mode": "offline"}}, ["wandb"]),  # recipes of earlier releases
        ({"trackers": ["tensorboard", "wandb"], "wandb": {"project": "mine"}}, ["tensorboard", "wandb"]),
        ({"trackers": [f"{__name__}:Broken", "trackio"]}, [f"{__name__}:Broken", "trackio"]),
    ],
)
def test_a_recipe_names_its_trackers(tree: dict[str, Any], names: list[str]) -> None:
    assert named_trackers(config_from_dict({**yaml.safe_load(to_yaml(read_yaml(RECIPE))), **tree})) == names


@pytest.mark.parametrize("name", ["mlflow", "nowhere.to_be_found:It"])
def test_an_unknown_tracker_is_an_error_of_the_recipe(name: str) -> None:
    with pytest.raises(ConfigError, match=r"trackers.*(mlflow|nowhere.to_be_found:It)"):
        config_from_dict({**yaml.safe_load(to_yaml(read_yaml(RECIPE))), "trackers": [name]})


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(trackers, "version", version)
    check_trackers(replace(config, trackers=(f"{__name__}:Broken",)))
    with pytest.raises(ConfigError, match=r"pip install 'bpgo-video\[tensorboard\]'"):
        check_trackers(replace(config, trackers=("tensorboard",)))


def test_without_trackers_their_packages_are_not_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from bpgo_video.training import loop, rl, sft\n"
        "from bpgo_video.training.metrics import RunLog; from bpgo_video.training.trackers import Trackers\n"
        f"with RunLog(Path({str(tmp_path)!r}), Trackers(), 1) as log:\n"
        f"    log.log(0, {VALUES!r}); log.media(0, 'samples', [])\n"
        "print(*{'wandb', 'tensorboard', 'trackio'} & set(sys.modules))"
    )
    environment = {**os.environ, "PYTHONPATH": python_path()}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, ""), done.stdout + done.stderr


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


def test_secrets_of_the_environment_are_in_no_file_of_a_tracker(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "s3cr3tValue0123456789abcdef0123456789abcd"  # 40 characters, as a key of wandb
    for name in ("WANDB_API_KEY", "HF_TOKEN", "REWARD_TOKEN"):
        monkeypatch.setenv(name, secret)
    log_steps(config, range(7), "tensorboard")
    log_steps(config, range(7), "wandb")
    written = [path for path in Path(config.run.dir).rglob("*") if path.is_file()]
    assert len(written) > 5
    assert not [path for path in written if secret.encode() in path.read_bytes()]
