"""Runs over two hosts: bit-equal to two local ranks for every kind of launch; errors name their host."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bpgo_video.config.bpgo import Config
from bpgo_video.training.metrics import read_metrics
from tests.distributed.test_launches import launch, recipe_file
from tests.distributed.two_hosts import ADDRESSES, INTERFACE, NAMES, Finished, TwoHosts, missing_requirement, two_hosts
from tests.made.recipes import ROOT, python_path, rewarded_by, small_recipe, without_evaluation

DEEPSPEED = str(Path(sys.executable).parent / "deepspeed")
TRAIN = "pipelines/train_video.py"
MODULE = ["--module", "bpgo_video.train"]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": python_path(), "GLOO_SOCKET_IFNAME": INTERFACE}
SECONDS = 240  # per launch: a good one takes 30, a hanging one the half hour of torch's timeout


@pytest.fixture(scope="module", autouse=True)
def possible() -> None:
    if reason := missing_requirement():
        pytest.skip(reason)


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TwoHosts]:
    """Two hosts and a `.deepspeed_env`, the only environment variables that pdsh passes on."""
    monkeypatch.chdir(ROOT)
    (tmp_path / "deepspeed_env").write_text("".join(f"{name}={value}\n" for name, value in ENVIRONMENT.items()))
    with two_hosts() as running:
        yield running


def over_ssh(hosts: TwoHosts, recipe: str, *flags: str) -> Finished:
    """Run the launcher on the first host; it reaches both hosts by pdsh and ssh."""
    command = [DEEPSPEED, "--hostfile", str(hosts.hostfile), TRAIN, "--config", recipe, *flags]
    return hosts.run(command, timeout=SECONDS, DS_ENV_FILE=str(Path(recipe).parent / "deepspeed_env"))[0]


def on_each(hosts: TwoHosts, recipe: str, *flags: str) -> list[Finished]:
    """Run one launcher per host, as a cluster's job starter does."""
    start = [DEEPSPEED, "--hostfile", str(hosts.hostfile), "--no_ssh", "--master_addr", ADDRESSES[0]]
    commands = [[*start, "--node_rank", str(rank), *MODULE, "--config", recipe, *flags] for rank in range(len(NAMES))]
    return hosts.run(*commands, timeout=SECONDS, **ENVIRONMENT)


def short_run(run_dir: Path, shards: Path, **sections: dict[str, Any]) -> Config:
    """A run of three steps under ZeRO-3 with evaluation, several checkpoints and an export."""
    config = small_recipe(run_dir, shards, run={"num_steps": 3, "save_every": 2}, **sections)
    assert config.deepspeed == "zero3"
    return config


def records(run_dir: Path) -> list[dict[str, Any]]:
    """Records of metrics.jsonl without timings."""
    return [
        {key: value for key, value in record.items() if not key.startswith(("seconds", "checkpoint"))}
        for record in read_metrics(run_dir / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> list[dict[str, Any]]:
    """Records of two ranks on this machine."""
    folder = tmp_path_factory.mktemp("local")
    result = launch(TRAIN, "--config", recipe_file(short_run(folder / "run", shards), folder / "recipe.yaml"))
    assert result.returncode == 0, result.stderr[-3000:]
    return records(folder / "run")


@pytest.mark.slow
def test_one_launch_over_ssh_equals_two_local_ranks(
    hosts: TwoHosts, tmp_path: Path, shards: Path, expected: list[dict[str, Any]]
) -> None:
    recipe = recipe_file(short_run(tmp_path / "run", shards), tmp_path / "recipe.yaml")
    first = over_ssh(hosts, recipe, "--run.num-steps", "2")
    assert first.returncode == 0, first.output[-6000:]
    resumed = over_ssh(hosts, recipe, "--run.resume", "auto")
    assert resumed.returncode == 0, resumed.output[-6000:]
    found = records(tmp_path / "run")
    assert len(found) == len(expected) == 3
    assert found[0] == expected[0]
    assert {key: found[1][key] for key in expected[1]} == expected[1], "the last evaluation is also equal"
    assert found[2] == expected[2]
    assert (tmp_path / "run" / "export" / "model_index.json").is_file()


@pytest.mark.slow
def test_one_launch_per_node_equals_two_local_ranks(
    hosts: TwoHosts, tmp_path: Path, shards: Path, expected: list[dict[str, Any]]
) -> None:
    recipe = recipe_file(short_run(tmp_path / "run", shards), tmp_path / "recipe.yaml")
    for result in on_each(hosts, recipe):
        assert result.returncode == 0, result.output[-6000:]
    assert records(tmp_path / "run") == expected


@pytest.mark.slow
def test_a_run_folder_on_a_local_disk_is_refused_by_name(hosts: TwoHosts, tmp_path: Path, shards: Path) -> None:
    config = without_evaluation(short_run(hosts.local / "run", shards))
    results = on_each(hosts, recipe_file(config, tmp_path / "recipe.yaml"))
    for result in results:
        assert result.returncode != 0
        assert "is not the folder that rank 0 has under this name" in result.output, "both consoles show the error"
    assert f"error: rank 1 on {NAMES[1]}: run.dir" in results[0].output
    assert "Loading" not in results[0].output, "before any model is loaded"


@pytest.mark.slow
def test_missing_prompts_on_one_node_are_reported_with_its_name(hosts: TwoHosts, tmp_path: Path, shards: Path) -> None:
    config = without_evaluation(short_run(tmp_path / "run", hosts.local / "shards"))
    copied = hosts.run(["cp", "-r", str(shards), str(hosts.local / "shards")], timeout=20)[0]
    assert copied.returncode == 0, copied.output
    result = over_ssh(hosts, recipe_file(config, tmp_path / "recipe.yaml"))
    assert result.returncode != 0
    assert f"error: rank 1 on {NAMES[1]}: the prompt shards {hosts.local / 'shards'} do not exist" in result.output
    assert not (tmp_path / "run").exists(), "nothing is written before the input is validated"


@pytest.mark.slow
def test_an_error_on_one_host_ends_the_other(hosts: TwoHosts, tmp_path: Path, shards: Path) -> None:
    config = without_evaluation(short_run(tmp_path / "run", shards))
    config = rewarded_by(config, "tests.distributed.toy_rewards:BreaksOnSecondRank")
    result = over_ssh(hosts, recipe_file(config, tmp_path / "recipe.yaml"))
    assert result.returncode != 0
    assert "RuntimeError: the reward model ran out of patience" in result.output


def test_stopping_the_hosts_ends_all_their_processes(tmp_path: Path) -> None:
    """This includes ranks that a launcher left running; nothing of the hosts is visible outside."""
    started = tmp_path / "started"
    with two_hosts() as running:
        folder = running.folder
        left_behind = f"hostname > {started}; touch {running.local}/x; setsid sleep 4321 & sleep 1"
        running.run(["sh", "-c", left_behind], timeout=20)
        assert started.read_text().strip() == NAMES[0]
        assert list(running.local.iterdir()) == []
        assert sleepers() == 1
    assert sleepers() == 0
    assert not folder.exists()


def sleepers() -> int:
    commands = (path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline"))
    return sum(command == b"sleep\x004321\x00" for command in commands)
