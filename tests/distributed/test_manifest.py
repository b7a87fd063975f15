"""Every change to a checkpoint's files is found and named; a run falls back to the newest intact checkpoint, loudly."""

from __future__ import annotations

import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bpgo_video.config.bpgo import RunConfig
from bpgo_video.distributed import checkpoint, resume, snapshot
from bpgo_video.distributed.manifest import (
    MANIFEST,
    CheckpointError,
    File,
    Layout,
    Manifest,
    file_of,
    read_manifest,
    write_file,
)
from bpgo_video.distributed.snapshot import Content, HostCopies, SaveFiles, Sink
from tests.distributed.test_checkpoint import ALONE, SmallEngine, save, save_one

OPTIMIZER = "zero_pp_rank_0_mp_rank_00_optim_states.pt"
MODEL = "mp_rank_00_model_states.pt"
AVERAGE = "ema-rank-00000.safetensors"


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    """A run with checkpoints of steps 6, 7 and 9."""
    run, engine = RunConfig(dir=str(tmp_path), keep_checkpoints=9), SmallEngine()
    for step in (6, 7, 9):
        save(engine, run, step)
    return run


def step(run: RunConfig, number: int) -> Path:
    return checkpoint.folder_of(Path(run.dir), number)


def flip(path: Path, position: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("name", [OPTIMIZER, MODEL, AVERAGE, MANIFEST])
def test_every_flipped_bit_is_found_and_its_file_named(run: RunConfig, name: str) -> None:
    folder, draws = step(run, 9), random.Random(name)
    path = folder / name
    whole = path.read_bytes()
    for _ in range(50):
        flip(path, draws.randrange(len(whole)), draws.randrange(8))
        assert str(path) in (resume.damage(folder) or "")
        path.write_bytes(whole)
    assert resume.damage(folder) is None


def swapped(folder: Path) -> None:
    for one, other in ((AVERAGE, "aside"), (OPTIMIZER, AVERAGE), ("aside", OPTIMIZER)):
        (folder / one).rename(folder / other)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another step's": (
        lambda folder: shutil.copy(folder.with_name("step-000006") / OPTIMIZER, folder),
        f"step-000009/{OPTIMIZER} is the file step-000006/",
    ),
    "missing": (lambda folder: (folder / AVERAGE).unlink(), f"{AVERAGE} is missing"),
    "cut": (lambda folder: (folder / MODEL).write_bytes(b"x"), f"{MODEL} has 1 bytes instead of the"),
    "swapped": (swapped, "has .* bytes instead of the"),
    "foreign": (
        lambda folder: shutil.copy(folder / OPTIMIZER, folder / OPTIMIZER.replace("rank_0_", "rank_1_")),
        "zero_pp_rank_1_.* is not among the files",
    ),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), f"has no {MANIFEST}"),
    "no JSON": (lambda folder: (folder / MANIFEST).write_text("[" * 10**5), f"{MANIFEST} is damaged"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_refused_with_the_newest_intact_one(run: RunConfig, kind: str) -> None:
    damage, message = DAMAGES[kind]
    damage(step(run, 9))
    with pytest.raises(CheckpointError, match=rf"{message}.*step-000007 is intact"):
        resume.check(step(run, 9))


def test_a_run_falls_back_to_the_newest_intact_checkpoint(run: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (9, 7):
        flip(step(run, number) / OPTIMIZER, 1000)
    assert resume.newest_intact(Path(run.dir), ALONE) == step(run, 6)
    told = capsys.readouterr().err
    assert f"warning: {step(run, 9) / OPTIMIZER} is damaged: its content is not what was saved" in told
    assert "the run continues from the newest intact one, step-000006" in told
    names = {path.name for path in step(run, 6).parent.iterdir()}
    assert names == {"latest", "step-000006", "damaged-step-000007", "damaged-step-000009"}
    save(SmallEngine(), run, 7)
    assert resume.newest_intact(Path(run.dir), ALONE) == step(run, 7)


def test_a_run_without_an_intact_checkpoint_is_refused_and_nothing_is_renamed(run: RunConfig) -> None:
    for number in (6, 7, 9):
        (step(run, number) / MODEL).unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint of .* is intact: .*step-000009.*--run.dir"):
        resume.newest_intact(Path(run.dir), ALONE)
    assert step(run, 9).is_dir()


def test_a_run_without_checkpoints_starts(tmp_path: Path) -> None:
    assert resume.newest_intact(tmp_path, ALONE) is None


def test_checkpoints_of_an_abandoned_future_are_not_counted_when_old_ones_are_pruned(run: RunConfig) -> None:
    """A user went back to step 6 by editing `latest`."""
    (step(run, 6).parent / "latest").write_text("step-000006")
    assert resume.newest_intact(Path(run.dir), ALONE) == step(run, 6)
    save(SmallEngine(), RunConfig(dir=run.dir, keep_checkpoints=2), 7)
    assert step(run, 6).is_dir()
    assert checkpoint.newest(Path(run.dir)) == "step-000007"


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_a_file_is_hashed_as_it_is_on_disk(tmp_path: Path, name: str) -> None:
    tensors = {"a": torch.randn(1_000_000), "b": torch.arange(3)}
    content = tensors if name == "x.pt" else (tensors, {"key": "value"})
    assert write_file(content, tmp_path / name) == file_of(tmp_path / name)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_saved_checkpoint_holds_what_the_policy_was_when_the_save_began(tmp_path: Path, asynchronous: bool) -> None:
    run, engine = RunConfig(dir=str(tmp_path), save_async=asynchronous), SmallEngine()
    saver = checkpoint.Saver(engine, run, ALONE, lambda saved: None)
    for number in (1, 2, 3):
        engine.train_to(number)
        progress = {"step": number, "lists": [[float(number)]]}
        saver.save(number, progress)
        engine.train_to(-1)
        progress["lists"][0][0] = -1.0
    saver.finish()
    for number in (2, 3):
        found = torch.load(step(run, number) / MODEL)
        assert found["weights"].unique().tolist() == [number]
        assert found["lists"] == [[float(number)]]


def test_training_does_not_wait_for_the_disk_and_a_checkpoint_appears_only_when_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released, run, engine = threading.Event(), RunConfig(dir=str(tmp_path)), SmallEngine()

    def slowly(content: Any, path: Path) -> Any:
        assert released.wait(10)
        return write_file(content, path)

    monkeypatch.setattr(snapshot, "write_file", slowly)
    done: list[checkpoint.Saved] = []
    saver = checkpoint.Saver(engine, run, ALONE, done.append)
    saver.save(1, {"step": 1})
    saver.poll()
    assert checkpoint.newest(tmp_path) is None
    assert not done
    released.set()
    saver.finish()
    assert checkpoint.newest(tmp_path) == "step-000001"
    assert [saved.folder.name for saved in done] == ["step-000001"]
    saver.poll()
    assert len(done) == 1


def test_an_error_of_the_writing_thread_is_raised_by_the_rank(tmp_path: Path) -> None:
    def defect(folder: Path, rank: int, sink: Sink) -> None:
        sink(({"x": "no tensor"}, {}), folder / "ema-rank-00000.safetensors")

    with pytest.raises(ValueError, match=r"expected torch\.Tensor"):
        save_one(SmallEngine(), RunConfig(dir=str(tmp_path)), 1, [defect])
    assert checkpoint.newest(tmp_path) is None


def test_a_copy_that_does_not_fit_into_memory_is_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(snapshot, "available_memory", lambda: 100_000)
    files = SaveFiles(copies=True)
    files.put({"x": torch.zeros(10_000)}, tmp_path / "small.pt")
    files.put({"x": torch.zeros(20_000)}, tmp_path / "large.pt")
    assert not (tmp_path / "small.pt").exists()
    assert (tmp_path / "large.pt").exists()
    assert "training waits for its checkpoints to be written, since a copy of 0.0 GB" in capsys.readouterr().err
    found = files.write(list).result(10)
    assert found == {path: file_of(path) for path in (tmp_path / "small.pt", tmp_path / "large.pt")}


def test_the_manifest_lists_every_file_with_its_size(run: RunConfig) -> None:
    manifest = read_manifest(step(run, 9))
    assert manifest.step == 9
    sizes = {path.name: path.stat().st_size for path in step(run, 9).iterdir() if path.name != MANIFEST}
    assert {name: file.bytes for name, file in manifest.files.items()} == sizes
    assert {OPTIMIZER, MODEL, AVERAGE} == set(sizes)


def test_copies_use_their_buffers_again_while_the_rest_of_the_content_grows(tmp_path: Path) -> None:
    copies, tensor = HostCopies(), torch.arange(5)
    for length in range(4):
        content = {"progress": list(range(length)), "weights": tensor + length, "shape": torch.Size([2])}
        kept = Content.of(content, tmp_path / "x.pt")
        assert copies.missing(kept) == (0 if length else tensor.nbytes)
        copied = copies.of(kept)
        assert copied["progress"] == list(range(length))
        assert copied["weights"].tolist() == (tensor + length).tolist()
        assert isinstance(copied["shape"], torch.Size)
        assert copied["weights"].data_ptr() != content["weights"].data_ptr()


def test_an_update_waits_for_the_copies_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copying, writing, made = threading.Event(), threading.Event(), HostCopies.of

    def copy(self: HostCopies, content: Content) -> Any:
        assert copying.wait(10)
        return made(self, content)

    def write(content: Any, path: Path) -> Any:
        assert writing.wait(10)
        return write_file(content, path)

    monkeypatch.setattr(HostCopies, "of", copy)
    monkeypatch.setattr(snapshot, "write_file", write)
    engine, updated = SmallEngine(), threading.Event()
    saver = checkpoint.Saver(engine, RunConfig(dir=str(tmp_path)), ALONE, lambda saved: None)
    saver.save(1, {"step": 1})
    threading.Thread(target=lambda: (engine.train_to(2), updated.set())).start()
    assert not updated.wait(0.2)
    assert not engine.weights.any()
    copying.set()
    assert updated.wait(10)
    writing.set()
    saver.finish()
    found = torch.load(checkpoint.folder_of(tmp_path, 1) / MODEL)
    assert not found["weights"].any()


def test_ranks_check_equal_shares_of_every_kind_of_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"model_states": 1, "optim_states": 1000}
    files = {f"rank_{rank}_{kind}.pt": File(size, "") for rank in range(4) for kind, size in sizes.items()}
    checked: list[list[str]] = []
    monkeypatch.setattr(resume, "read_manifest", lambda _: Manifest(1, Layout(4, 3, "torch.float32"), files))
    monkeypatch.setattr(resume, "check_files", lambda folder, manifest, names: checked.append(names))
    for rank in range(4):
        assert resume.damage(tmp_path, rank, 4) is None
    assert all(sorted(files[name].bytes for name in names) == [1, 1000] for names in checked)
    assert sorted(name for names in checked for name in names) == sorted(files)
