"""Checkpoints are complete or absent when processes die at any point of a save, at random, or on a full disk.

The processes are forks of the test process, so that fifty of them take only seconds.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from bpgo_video.config.bpgo import EmaConfig, RunConfig
from bpgo_video.distributed import checkpoint, resume
from bpgo_video.distributed.ema import EMA, load_average, save_average
from bpgo_video.distributed.engine import Engine
from bpgo_video.distributed.manifest import MANIFEST, CheckpointError, Layout, read_manifest
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.distributed.optimizer import Shard, ZeroMasters
from bpgo_video.distributed.snapshot import Sink

ALONE = Mesh(rank=0, world_size=1, device=torch.device("cpu"))
KILLED = 9
CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree", "test.write"}


class SmallEngine(Engine, ZeroMasters):
    """A fake engine whose weights and average are filled with the step number."""

    stage, dtype = 1, torch.float32

    def __init__(self) -> None:
        self.weights = torch.zeros(20_000)
        self.ema = EMA(self, EmaConfig(decay=0.9))

    def shards(self) -> list[Shard]:
        return [Shard("weight", (self.weights.numel(),), 0, self.weights)]

    def publish(self) -> None:
        pass

    @property
    def masters(self) -> ZeroMasters:
        return self

    def train_to(self, step: int) -> None:
        self.before_change()
        self.weights.fill_(step)
        self.ema.shards[0].values.fill_(step)

    def save(self, folder: Path, tag: str, state: Mapping[str, Any], sink: Sink) -> None:
        (folder / tag).mkdir(parents=True, exist_ok=True)
        for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
            sys.audit("test.write")
            sink({"weights": self.weights, **state}, folder / tag / name)

    def load(self, folder: Path, tag: str) -> dict[str, Any]:
        states = [torch.load(path) for path in sorted((folder / tag).glob("*.pt"))]
        assert len(states) == 2
        for state in states:
            self.weights.copy_(state.pop("weights"))
        return states[0]


def save(engine: SmallEngine, run: RunConfig, step: int) -> checkpoint.Saved:
    engine.train_to(step)
    return save_one(engine, run, step, [partial(save_average, engine.ema)])


def save_one(engine: SmallEngine, run: RunConfig, step: int, parts: Sequence[checkpoint.Part] = ()) -> checkpoint.Saved:
    found: list[checkpoint.Saved] = []
    saver = checkpoint.Saver(engine, run, ALONE, found.append)
    saver.save(step, {"step": step}, parts)
    saver.finish()
    return found[0]


def loadable(run: RunConfig) -> int:
    """The step that a resume would continue from, 0 without a checkpoint; asserts that every checkpoint is complete."""
    run_dir, found = Path(run.dir), []
    for folder in sorted((run_dir / checkpoint.FOLDER).glob("step-*")):
        engine = SmallEngine()
        assert read_manifest(folder).layout == Layout(1, 1, "torch.float32")
        assert resume.damage(folder) is None
        step = engine.load(folder.parent, folder.name)["step"]
        load_average(engine.ema, folder)
        assert folder.name == f"step-{step:06d}"
        assert bool((engine.weights == step).all())
        assert bool((engine.ema.shards[0].values == step).all())
        found.append(step)
    name = checkpoint.newest(run_dir)
    assert name is None or int(name.removeprefix("step-")) in found
    return 0 if name is None else int(name.removeprefix("step-"))


def forked(work: Callable[[], None]) -> int:
    """Fork a process that runs `work` and exits with 0; return its id."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(int(sys.exc_info()[1] is not None))
    return child


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killing(folder: Path, at: int) -> None:
    """Kill this process immediately before its `at`-th change to a file."""
    changes = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal changes
        if event not in CHANGES or (event != "test.write" and not str(arguments[0]).startswith(str(folder))):
            return
        changes += 1
        if changes == at:
            os._exit(KILLED)

    sys.addaudithook(hook)


def test_a_process_killed_before_any_file_change_leaves_complete_checkpoints(tmp_path: Path) -> None:
    ended_at = []
    for at in range(1, 200):
        run = RunConfig(dir=str(tmp_path / str(at)), keep_checkpoints=1)
        engine = SmallEngine()
        save(engine, run, 2)

        def third(at: int = at, engine: SmallEngine = engine, run: RunConfig = run) -> None:
            killing(Path(run.dir), at)
            save(engine, run, 3)

        code = wait(forked(third))
        step = loadable(run)
        if code == 0:
            assert step == 3
            break
        assert code == KILLED
        ended_at.append(step)
        save(engine, run, 3)
        assert loadable(run) == 3, "leftovers do not prevent the next save"
        assert not list((Path(run.dir) / checkpoint.FOLDER).glob(f"{checkpoint.PARTIAL}*"))
    assert sorted(ended_at) == ended_at, "the old checkpoint up to some change, the new one from then on"
    assert set(ended_at) == {2, 3}
    assert len(ended_at) > 15


@pytest.mark.slow
def test_fifty_kills_at_random_moments_leave_a_resumable_run(tmp_path: Path) -> None:
    run = RunConfig(dir=str(tmp_path), keep_checkpoints=2, keep_every=50)
    draws, steps, inside = random.Random(0), [0], 0
    for _ in range(50):
        reader, writer = os.pipe()

        def on(writer: int = writer) -> None:
            engine, step = SmallEngine(), loadable(run)
            while True:
                step += 1
                saved = save(engine, run, step)
                os.write(writer, f"{saved.seconds}\n".encode())

        child = forked(on)
        seconds = float(os.read(reader, 100).split()[0])  # written by its first save; the process is now in a later one
        time.sleep(draws.uniform(0, 1.5 * seconds))
        os.kill(child, signal.SIGKILL)
        assert wait(child) == -signal.SIGKILL
        os.close(reader)
        os.close(writer)
        steps.append(loadable(run))
        inside += bool(list((tmp_path / checkpoint.FOLDER).glob(f"{checkpoint.PARTIAL}*")))
    assert all(after > before for before, after in pairwise(steps)), "a completed save is never lost"
    assert inside > 10, "some kills must interrupt a save"


def limited(bytes_of_a_file: int) -> None:
    """Make larger writes to a file fail, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_of_a_file, bytes_of_a_file))


@pytest.mark.parametrize("free_bytes", [0, 1000, 79_000, 81_000])
def test_a_full_disk_is_reported_and_the_previous_checkpoint_is_intact(tmp_path: Path, free_bytes: int) -> None:
    run, engine = RunConfig(dir=str(tmp_path)), SmallEngine()
    save(engine, run, 1)

    def save_on_full_disk() -> None:
        limited(free_bytes)
        with pytest.raises(
            CheckpointError, match=r"step 2 could not be written .* GB free .* is step-000001, untouched"
        ):
            save(engine, run, 2)

    assert wait(forked(save_on_full_disk)) == 0
    assert loadable(run) == 1
    save(engine, run, 2)
    assert loadable(run) == 2
    assert sorted(path.name for path in (tmp_path / checkpoint.FOLDER).iterdir()) == [
        "latest", "step-000001", "step-000002",
    ]  # fmt: skip


def test_another_error_is_not_reported_as_a_full_disk(tmp_path: Path) -> None:
    def defect(folder: Path, rank: int, sink: Sink) -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match=r"^shapes do not match$"):
        save_one(SmallEngine(), RunConfig(dir=str(tmp_path)), 1, [defect])


@pytest.mark.parametrize(
    ("keep", "every", "kept"), [(1, 0, [12]), (3, 0, [10, 11, 12]), (2, 5, [5, 10, 11, 12]), (1, 4, [4, 8, 12])]
)
def test_the_newest_and_every_nth_checkpoint_are_kept(tmp_path: Path, keep: int, every: int, kept: list[int]) -> None:
    run, engine = RunConfig(dir=str(tmp_path), keep_checkpoints=keep, keep_every=every), SmallEngine()
    for step in range(1, 13):
        save(engine, run, step)
    folders = sorted((tmp_path / checkpoint.FOLDER).glob("step-*"))
    assert [int(folder.name.removeprefix("step-")) for folder in folders] == kept


def test_a_million_steps_are_sorted_by_number(tmp_path: Path) -> None:
    run, engine = RunConfig(dir=str(tmp_path), keep_checkpoints=2), SmallEngine()
    for step in (999_998, 999_999, 1_000_000):
        save(engine, run, step)
    assert loadable(run) == 1_000_000
    assert {path.name for path in (tmp_path / checkpoint.FOLDER).glob("step-*")} == {"step-999999", "step-1000000"}


def test_a_save_reports_its_size_and_duration(tmp_path: Path) -> None:
    saved = save(SmallEngine(), RunConfig(dir=str(tmp_path)), 7)
    assert saved.bytes == sum(path.stat().st_size for path in saved.folder.iterdir() if path.name != MANIFEST)
    assert saved.bytes > 3 * 4 * 20_000
    assert saved.metrics() == {
        "seconds/checkpoint": saved.seconds,
        "checkpoint/write_seconds": saved.write_seconds,
        "checkpoint/bytes": float(saved.bytes),
    }
    assert 0 < saved.seconds <= saved.write_seconds < 10
    assert str(saved).startswith("checkpoint step-000007: 0.2 MB, written in ")


@pytest.mark.parametrize("rank", [0, 1, 12])
def test_each_rank_flushes_its_own_files(tmp_path: Path, rank: int) -> None:
    expected = {f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", f"ema-rank-{rank:05d}.safetensors"}
    foreign = {f"zero_pp_rank_{other}_mp_rank_00_optim_states.pt" for other in (2, 10, 11, 121)}
    for name in expected | foreign:
        (tmp_path / name).touch()
    found = {path.name for path in checkpoint.files_of_rank(rank, tmp_path)}
    assert expected <= found
    assert rank == 0 or not foreign & found
