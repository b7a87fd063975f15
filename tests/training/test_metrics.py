"""The training log: strict records, truncation on resume, and reduction over ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from bpgo_video.documents import MalformedFile
from bpgo_video.training.metrics import METRICS_FILE, RECORD, RunLog, read_metrics, reduce_metrics, truncate
from bpgo_video.training.summary import power, summary_table, verdict
from bpgo_video.training.trackers import Trackers

VALUES = {"reward": 0.5, "trust_mean": 0.9, "grad_norm": 1.0, "ratio_mean": 1.0, "seconds": 0.25}


def log_steps(run_dir: Path, start: int, stop: int, **values: float) -> None:
    with RunLog(run_dir, Trackers(), total_steps=stop, start_step=start) as log:
        for step in range(start, stop):
            log.log(step, VALUES | values)


def test_a_record_is_on_disk_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    with RunLog(tmp_path, Trackers(), total_steps=2) as log:
        log.log(0, VALUES | {"heldout/oracle": 0.6})
        (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert json.loads(line) == {"step": 0, **VALUES, "heldout/oracle": 0.6}


def test_resume_keeps_the_lines_before_its_step_and_repeats_the_others(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log_steps(tmp_path, 0, 4, reward=1 / 3)
    before = path.read_text().splitlines()
    path.write_text(path.read_text() + '{"step": 4, "rew')  # killed in the middle of a line
    log_steps(tmp_path, 2, 5, reward=0.75)
    after = path.read_text().splitlines()
    assert after[:2] == before[:2]
    assert [(record["step"], record["reward"]) for record in read_metrics(path)[2:]] == [
        (step, 0.75) for step in (2, 3, 4)
    ]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_resume_also_repeats_frame_scores(tmp_path: Path) -> None:
    lines = [{"step": step, "reward": "own", "scores": [0.1, 0.2]} for step in (1, 3)]
    with RunLog(tmp_path, Trackers(), 6) as log:
        log.frames(lines[:1])
        log.frames(lines[1:])
    path = tmp_path / "samples" / "frame_scores.jsonl"
    assert [json.loads(line) for line in path.read_text().splitlines()] == lines
    path.write_text(path.read_text() + '{"step": 3, "cut')
    with RunLog(tmp_path, Trackers(), 6, start_step=3):
        assert [json.loads(line) for line in path.read_text().splitlines()] == lines[:1]


def test_late_values_are_printed_at_once_and_added_to_the_next_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunLog(tmp_path, Trackers(), total_steps=3) as log:
        log.log(0, VALUES)
        log.later("saved it", {"seconds/checkpoint": 2.0})
        assert "saved it\n" in capsys.readouterr().err
        log.log(1, VALUES)
        log.log(2, VALUES)
    found = [record.get("seconds/checkpoint") for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert found == [None, 2.0, None]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), torch.tensor(float("nan"))])
def test_a_non_finite_value_names_its_key_and_step_and_writes_nothing(tmp_path: Path, value: float) -> None:
    with (
        RunLog(tmp_path, Trackers(), total_steps=9) as log,
        pytest.raises(ValueError, match=r"'grad_norm'.*step 7"),
    ):
        log.log(7, VALUES | {"grad_norm": value})
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_record_must_be_new_and_complete(tmp_path: Path) -> None:
    with RunLog(tmp_path, Trackers(), total_steps=9) as log:
        log.log(0, VALUES)
        with pytest.raises(ValueError, match="step 0 is logged already"):
            log.log(0, VALUES)
        with pytest.raises(ValueError, match="step 1 lacks reward, trust_mean"):
            log.log(1, {"grad_norm": 1.0, "ratio_mean": 1.0, "seconds": 1.0})


@pytest.mark.parametrize("line", ["not json", "[1]", '{"reward": 1.0}', '{"step": 1, "reward": NaN}', '{"step": "a"}'])
def test_a_malformed_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 0}}\n{line}\n')
    with pytest.raises(MalformedFile, match=r"metrics.jsonl, line 2"):
        read_metrics(path)


def test_without_a_terminal_progress_is_printed_as_a_few_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log_steps(tmp_path, 0, 50)
    lines = capsys.readouterr().err.split("\n")
    assert lines[0].startswith("step 1/50  reward 0.5000  trust 0.900  12 s left")  # 49 steps of .25 s are left
    assert lines[1].startswith("step 50/50")
    assert lines[2:] == [""]
    assert "\r" not in "".join(lines)


def test_reduction_over_one_rank_changes_nothing() -> None:
    assert reduce_metrics({"a": torch.tensor(0.5), "b_max": 2.0}) == {"a": 0.5, "b_max": 2.0}


def _reduce_on(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    values = {"reward": (1.0, 2.0), "ratio_max": (-3.0, -4.0), "loss/trust_min": (5.0, 6.0)}
    reduced = reduce_metrics({key: torch.tensor(value[rank]) for key, value in values.items()})
    with RunLog(Path(folder) / f"run{rank}", Trackers(), total_steps=1) as log:
        log.log(0, VALUES | reduced)
    Path(folder, f"{rank}.json").write_text(json.dumps(reduced))
    dist.destroy_process_group()


def test_ranks_agree_on_means_and_extremes_and_only_rank_0_writes(tmp_path: Path) -> None:
    mp.spawn(_reduce_on, args=(str(tmp_path),), nprocs=2)
    for rank in (0, 1):
        reduced = json.loads((tmp_path / f"{rank}.json").read_text())
        assert reduced == {"reward": 1.5, "ratio_max": -3.0, "loss/trust_min": 5.0}
    assert (tmp_path / "run0" / "metrics.jsonl").exists()
    assert not (tmp_path / "run1").exists()


@pytest.mark.parametrize(
    ("after", "shown", "prompts", "words"),
    [
        (
            0.6,
            1,
            24,
            "Training helped: held-out score rose from 0.500 to 0.600, +0.100 [-0.200, +0.300] over 24 prompts",
        ),
        (0.4, -1, 24, "Training hurt: held-out score fell from 0.500 to 0.400, -0.100 ["),
        (
            0.6,
            0,
            24,
            "No difference shown: held-out score went from 0.500 to 0.600, +0.100 [-0.200, +0.300] over 24 prompts",
        ),
        (0.6, None, 24, "Held-out score went from 0.500 to 0.600 (no test recorded)"),
    ],
)
def test_the_verdict_comes_from_the_test_over_prompts(
    after: float, shown: int | None, prompts: int, words: str
) -> None:
    summary = {"heldout_before": 0.5, "heldout_after": after, "heldout_shown": shown, "heldout_prompts": prompts}
    assert words in (verdict(summary | {"heldout_interval": [-0.2, 0.3], "heldout_measures": 5}) or "")


@pytest.mark.parametrize(
    ("prompts", "detectable", "words"),
    [
        (6, None, "6 prompts are too few to show any difference among 5 measures"),
        (24, 0.0432, "24 prompts can show a difference of 0.043 (with 80% power)"),
        (24, 0.0, ""),  # all differences are equal
    ],
)
def test_the_summary_says_what_so_many_prompts_can_show(prompts: int, detectable: float | None, words: str) -> None:
    summary = {"heldout_before": 0.5, "heldout_after": 0.6, "heldout_shown": 0, "heldout_prompts": prompts}
    summary |= {"heldout_measures": 5, "heldout_detectable": detectable}
    assert power(summary) == words
    assert words in summary_table(summary)


def test_the_final_table_states_the_paired_difference_and_the_paths(tmp_path: Path) -> None:
    summary = {
        "heldout_before": 0.5,
        "heldout_after": 0.65,
        "heldout_difference_stderr": 0.012,
        "videos_generated": 3840,
        "seconds": {"rollout": 100.0, "reward": 5.0, "update": 120.0},
    }
    table = summary_table(summary, {"metrics": tmp_path / "metrics.jsonl"})
    for text in ("0.5000", "0.6500", "+0.1500 ± 0.0120", "3,840", "120.0", str(tmp_path / "metrics.jsonl")):
        assert text in table
    assert "\x1b" not in table


@pytest.mark.parametrize("resumed", [1, 2, 3, 4])
def test_a_damaged_line_matters_only_before_the_resumed_step(resumed: int, tmp_path: Path) -> None:
    """The damaged line is that of step 2."""
    lines = [f'{{"step": {step}, "seconds": 1.0}}\n'.encode() for step in range(5)]
    lines[2] = b'{"step": 2, "sec\x00\xff\n'
    (tmp_path / METRICS_FILE).write_bytes(b"".join(lines))
    if resumed <= 2:
        truncate(tmp_path / METRICS_FILE, RECORD, resumed)
        assert (tmp_path / METRICS_FILE).read_bytes() == b"".join(lines[:resumed])
        return
    with pytest.raises(MalformedFile, match=r"metrics\.jsonl, line 3"):
        truncate(tmp_path / METRICS_FILE, RECORD, resumed)
    assert (tmp_path / METRICS_FILE).read_bytes() == b"".join(lines), "nothing is cut from a damaged log"
