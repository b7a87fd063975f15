"""`bpgo-video study`: resumed studies, refused settings, and reports."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock

from bpgo_video.__main__ import main
from bpgo_video.documents import MalformedFile
from bpgo_video.errors import InputError
from bpgo_video.study.jobs import run_study
from bpgo_video.study.preregistration import read_preregistration
from bpgo_video.study.report import compare, number
from bpgo_video.study.results import LOCK, first_difference
from tests.made.recipes import ROOT
from tests.study.small import YAML, plan, preregistration


def lines(folder: Path) -> list[dict[str, object]]:
    """The results without times, in the order of the runs."""
    found = [json.loads(line) for line in (folder / "results.jsonl").read_text("utf-8").splitlines()]
    for line in found:
        line["outcome"].pop("seconds")
    return sorted(found, key=lambda line: json.dumps(line))


def study(folder: Path, *words: str) -> int:
    return main(["study", *words, "--preregistration", str(preregistration(folder.parent))])


def test_a_study_that_was_cut_off_continues_to_the_same_results(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        assert study(folder, "surrogate", "--output", str(folder)) == 0
    path = cut / "results.jsonl"
    text = path.read_text("utf-8")
    assert text.count("\n") == 2 * 2 * 2 + 2 * 3 * 3  # tuning: regimes, seeds, rates; then regimes, arms, seeds
    path.write_text(text[: len(text) // 2], "utf-8")  # in the middle of a line
    assert study(cut, "surrogate", "--output", str(cut)) == 0
    assert lines(cut) == lines(whole)
    kept = [json.loads(line) for line in path.read_text("utf-8").splitlines()][: text[: len(text) // 2].count("\n")]
    assert kept == [json.loads(line) for line in text.splitlines()][: len(kept)]  # not run again, times included


@pytest.mark.slow
def test_several_processes_find_the_same(tmp_path: Path) -> None:
    small = plan(tmp_path)
    small = replace(small, regimes={"noisy": small.regimes["noisy"]}, demands=[])
    run_study(small, tmp_path / "one", processes=1)
    run_study(small, tmp_path / "two", processes=2)
    assert lines(tmp_path / "one") == lines(tmp_path / "two")


def test_a_folder_grows_by_arms_and_the_report_covers_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "study"
    study(folder, "surrogate", "--output", str(folder), "--arms", "larger", "--regimes", "clean")
    first = lines(folder)
    study(folder, "surrogate", "--output", str(folder), "--arms", "agreement")
    assert [line for line in lines(folder) if line in first] == first
    report = (folder / "report.md").read_text("utf-8")
    assert "| `larger` | " in report
    assert "`agreement` minus `grpo` | clean | >= 0, <= 0 | 0 [0, 0] | yes |" in report
    assert "| noisy | >= +1000.00 |" in report
    assert "| NO |" in report
    assert "`agreement` | 2.00 |" in report
    assert "`bpgo-video study surrogate --output" in report
    for name in ("gains.svg", "intervals.svg", "comparison.json"):
        assert (folder / name).stat().st_size > 0


def test_results_of_other_settings_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "study"
    words = ["surrogate", "--output", str(folder), "--arms", "larger"]
    study(folder, *words)
    assert study(folder, *words, "--seeds", "4") == 2
    assert "has results with seeds = 3, and this command has 4" in capsys.readouterr().err
    changed = tmp_path / "changed.yaml"
    changed.write_text(YAML.replace("learning_rate: 2.0", "learning_rate: 3.0"), "utf-8")
    assert main(["study", *words, "--preregistration", str(changed)]) == 2
    assert "arms.larger.learning_rate = 2.0, and this command has 3.0" in capsys.readouterr().err
    changed.write_text(YAML.replace("noise: [0.5, 4.0]", "noise: [0.5, 5.0]"), "utf-8")
    assert main(["study", *words, "--preregistration", str(changed)]) == 2
    assert "regimes.noisy.noise = [0.5, 4.0]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("surrogate: {}", "surrogate.seeds: required, and not given"),
        ("- surrogate", "is no mapping of the sections"),
        (YAML.replace("arm: agreement", "arm: agrement"), "arm is 'agrement'; known are grpo, larger, agreement"),
        (YAML.replace("trust: reliability", "trust: relaibility"), "trust: Input should be 'sigmoid'"),
        (YAML.replace(", rho: scorings", ""), "names its source: `rho`"),
        (YAML.replace("{learning_rate: 2.0}", "{bpgo: {alpha: 0.5}}"), "names its `prior`"),
    ],
)
def test_a_mistake_in_a_preregistration_is_named(written: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(written, "utf-8")
    with pytest.raises(MalformedFile) as raised:
        read_preregistration(path)
    assert str(path) in str(raised.value)
    assert message in str(raised.value)


def test_a_file_takes_the_sections_that_it_lacks_from_the_package(tmp_path: Path) -> None:
    assert read_preregistration(preregistration(tmp_path)).video == read_preregistration().video


def test_settings_differ_by_their_first_leaf_and_new_entries_do_not() -> None:
    one = {"seeds": 3, "arms": {"a": {"bpgo": {}}, "b": {"bpgo": {"alpha": 1}}}}
    assert first_difference(one, {"seeds": 3, "arms": {"a": {"bpgo": {}}, "c": {}}}) is None
    assert first_difference(one, {"seeds": 4, "arms": {}}) == ("seeds", 3, 4)
    assert first_difference(one, {"seeds": 3, "arms": {"b": {"bpgo": {"alpha": 2}}}}) == ("arms.b.bpgo.alpha", 1, 2)
    assert first_difference(one, {"seeds": 3, "arms": {"b": {"bpgo": {}}}}) == ("arms.b.bpgo", None, {})


def test_one_process_writes_to_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "study"
    folder.mkdir()
    with FileLock(folder / LOCK):
        assert study(folder, "surrogate", "--output", str(folder)) == 2
    assert "another process writes a study" in capsys.readouterr().err


def test_seeds_of_tuning_are_not_compared(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"seeds 999 to 1001 overlap with those of tuning, 1000 to 1001"):
        run_study(replace(plan(tmp_path), first_seed=999), tmp_path / "study", processes=1)


def test_arms_that_lack_seeds_are_left_out(tmp_path: Path) -> None:
    small = plan(tmp_path)
    results = run_study(small, tmp_path / "study", processes=1)
    names = {"regimes": list(small.regimes), "arms": list(small.arms)}
    short = [line for line in results.lines if (line.arm, line.seed) != ("larger", 2)]
    compared = compare(small, names, short)
    assert compared.arms == ["grpo", "agreement"]
    assert set(compared.cells) == {("clean", "agreement"), ("noisy", "agreement")}


def test_signals_of_a_dump_are_reported(tmp_path: Path) -> None:
    dump = tmp_path / "dump.jsonl"
    line = '{"t": "a red object", "o": [0.%d, 0.2], "c": [0.%d, 0.%d], "m": [0.5]}\n'
    dump.write_text("".join(line % (i % 7, 3 * i % 8, 5 * i % 9) for i in range(12)), "utf-8")
    folder = tmp_path / "signals"
    assert study(folder, "signals", "--output", str(folder), "--groups", str(dump)) == 0
    assert "- groups: 3 of 4 samples, dump.jsonl" in (folder / "report.md").read_text("utf-8")
    rows = json.loads((folder / "signals.json").read_text("utf-8"))["rows"]
    assert {row["score"] for row in rows} == {"clip_score", "oracle with noise"}


@pytest.mark.slow
def test_sampled_groups_continue_after_a_kill_and_repeat_bit_for_bit(tmp_path: Path) -> None:
    folder = tmp_path / "signals"
    command = [sys.executable, "-m", "bpgo_video", "study", "signals", "--output", str(folder), "--prompts", "2"]
    command += ["--preregistration", str(preregistration(tmp_path))]
    subprocess.run(command, check=True, cwd=ROOT)
    dump = folder / "groups.jsonl"
    whole = dump.read_text("utf-8")
    assert whole.count("\n") == 2 * 4
    dump.write_text(whole[: len(whole) * 3 // 4], "utf-8")  # the second group is not complete
    subprocess.run(command, check=True, cwd=ROOT)
    assert dump.read_text("utf-8") == whole
    refused = subprocess.run([*command, "--seed", "1"], cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
    assert refused.returncode == 2
    assert "has results with seed = 0, and this command has 1" in refused.stderr


def test_the_list_shows_what_an_arm_sets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert study(tmp_path / "x", "surrogate", "--list", "--arms", "larger") == 0
    shown = capsys.readouterr().out
    assert "learning_rate: 2.0" in shown
    assert "agreement" not in shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.004, "0"), (-0.004, "0"), (0.126, "+.13"), (-0.126, "-.13"), (-12.0, "-12.00"), (10.5, "+10.50")],
)
def test_numbers_have_a_sign_and_no_leading_zero(value: float, shown: str) -> None:
    assert number(value) == shown
