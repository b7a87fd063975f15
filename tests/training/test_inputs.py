"""Validation before any model is loaded: invalid input is reported with the value, the rule and a remedy."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bpgo_video.config.bpgo import Config, ConfigError, RewardConfig
from bpgo_video.config.reading import read_recipe, to_yaml
from bpgo_video.config.rules import OWNER, check_world
from bpgo_video.data.priors import PriorError, PriorTable, write_priors
from bpgo_video.data.records import ShardError
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.policies import Policy, load_policy
from bpgo_video.training import inputs, session
from bpgo_video.training.lease import Lease
from bpgo_video.training.run_folder import check_run_dir, open_run_dir
from tests.made.recipes import make_shards, small_recipe

MESH = Mesh(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("prompts") / "shards")


@pytest.fixture
def config(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setattr(inputs, "load_policy", without_models)
    return small_recipe(tmp_path / "run", shards)


def without_models(*arguments: Any, components: Collection[str], **options: Any) -> Policy:
    assert not components, "a model was loaded"
    return load_policy(*arguments, components=components, **options)


def test_valid_input_passes(config: Config) -> None:
    ds_config, found = inputs.check_inputs(config, MESH)
    assert ds_config["zero_optimization"]["stage"] == 3
    assert len(found) == 6


def test_a_missing_model_folder_is_named(config: Config) -> None:
    config = replace(config, policy=replace(config.policy, folder="models/nowhere/wan"))
    with pytest.raises(FileNotFoundError, match="'models/nowhere/wan' does not exist; give a local folder"):
        inputs.check_inputs(config, MESH)


def test_missing_shards_name_the_tool(config: Config) -> None:
    config = replace(config, data=replace(config.data, shards="nowhere"))
    with pytest.raises(ShardError, match=r"nowhere.*bpgo-video prompts build"):
        inputs.check_inputs(config, MESH)


def test_a_truncated_shard_is_named(config: Config, shards: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(shards, broken)
    tar = next(broken.glob("*.tar"))
    tar.write_bytes(tar.read_bytes()[:700])
    config = replace(config, data=replace(config.data, shards=str(broken)))
    with pytest.raises(ShardError, match=tar.name):
        inputs.check_inputs(config, MESH)


def test_a_missing_prior_names_the_command(config: Config) -> None:
    config = replace(config, prior=replace(config.prior, kind="reference"))
    with pytest.raises(PriorError, match=r"bpgo-video priors RECIPE"):
        inputs.check_inputs(config, MESH)


def test_a_prior_of_another_reward_version_is_refused(config: Config, shards: Path, tmp_path: Path) -> None:
    stale = tmp_path / "stale"
    shutil.copytree(shards, stale)
    for name in config.rewards:
        row = {1: (0.0, 1.0, 8, 1.0)}
        table = PriorTable(reward=name, version="another version", scale=1, policy="policy", settings={}, anchors=row)
        write_priors(stale, table)
    changed = replace(
        config, prior=replace(config.prior, kind="reference"), data=replace(config.data, shards=str(stale))
    )
    checked = inputs.check_inputs(changed, MESH)
    with pytest.raises(PriorError, match="another version"):
        session.build_session(changed, MESH, *checked)


def test_shards_of_another_text_encoder_are_refused(config: Config) -> None:
    config = replace(config, policy=replace(config.policy, max_sequence_length=32))
    with pytest.raises(ShardError, match="max_sequence_length"):
        inputs.check_inputs(config, MESH)


def test_an_indivisible_world_size_is_refused(config: Config) -> None:
    with pytest.raises(ConfigError, match="3 ranks"):
        check_world(config, 3)


def test_an_existing_run_is_never_overwritten(config: Config) -> None:
    check_run_dir(config)
    folder = Path(config.run.dir)
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "metrics.jsonl").touch()
    with pytest.raises(ConfigError, match=r"--run\.resume auto"):
        check_run_dir(config)
    again = replace(config, run=replace(config.run, resume="auto", num_steps=9))
    check_run_dir(again)
    other = replace(again, optim=replace(again.optim, learning_rate=0.5))
    with pytest.raises(ConfigError, match="other optim settings"):
        check_run_dir(other)


@pytest.mark.parametrize("resume", ["never", "auto"])
def test_a_folder_with_only_settings_is_not_a_run(config: Config, resume: Any) -> None:
    """A run that fails before its policy is loaded leaves such a folder; the corrected command can reuse it."""
    folder = Path(config.run.dir)
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(config))
    mended = replace(
        config,
        run=replace(config.run, resume=resume),
        policy=replace(config.policy, attention_backend="native"),
    )
    check_run_dir(mended)
    with Lease(folder / OWNER) as lease:
        open_run_dir(mended, MESH, lease)
    assert read_recipe(folder / "config.yaml") == mended
    (folder / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match=r"never overwritten|other policy settings"):
        check_run_dir(replace(mended, policy=config.policy))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rewards": {"motion": RewardConfig("learned_moton")}},
            r"rewards\.motion\.model is 'learned_moton'; known are .*; perhaps you meant learned_motion",
        ),
        ({"rewards": {"motion": RewardConfig("learned_motion", options={"mdoel": 1})}}, r"its options are \['model'\]"),
        ({"evaluation": {"rewards": {"held": RewardConfig("no_such:Reward")}}}, r"rewards\.held \(no_such:Reward\)"),
        ({"policy": {"attention_backend": "fastest"}}, r"attention_backend is 'fastest'; diffusers knows"),
    ],
)
def test_a_misspelt_name_is_reported_before_the_folder_is_created(
    config: Config, change: dict[str, Any], message: str
) -> None:
    sections = {"evaluation": config.evaluation, "policy": config.policy}
    broken = replace(
        config, **{key: replace(sections[key], **value) if key in sections else value for key, value in change.items()}
    )
    with pytest.raises(ConfigError, match=message):
        inputs.check_inputs(broken, MESH)


def test_a_resume_may_change_schedules_and_devices_but_not_the_computation(config: Config) -> None:
    far = RewardConfig(model="remote", options={"url": "http://a:1", "videos_per_request": 2})
    config = replace(config, rewards={"far": far}, run=replace(config.run, resume="auto"))
    folder = Path(config.run.dir)
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "metrics.jsonl").touch()
    moved = replace(far, timeout=9.0, offload=True, options={**far.options, "url": "https://b:2", "token_env": "T"})
    rollout = replace(config.rollout, score_ahead=0, offload_trajectories=True)
    check_run_dir(replace(config, rewards={"far": moved}, rollout=rollout))
    for reward in (replace(far, weight=2.0), replace(far, options={**far.options, "videos_per_request": 4})):
        with pytest.raises(ConfigError, match="other rewards settings"):
            check_run_dir(replace(config, rewards={"far": reward}))


def test_a_reward_that_listens_needs_a_policy_that_makes_sound(config: Config) -> None:
    heard = replace(config, rewards={**config.rewards, "heard": RewardConfig(model="audible")})
    with pytest.raises(ConfigError, match=r"rewards\.heard listens, but .* makes silent videos"):
        inputs.check_inputs(heard, MESH)
    inputs.check_audio(heard, True, ["heard"])


def test_segment_credit_is_refused_with_sound(config: Config) -> None:
    credited = replace(config, credit=replace(config.credit, kind="segment"))
    with pytest.raises(ConfigError, match=r"credit\.kind is 'segment', but .* samples video and sound as one row"):
        inputs.check_audio(credited, True, [])
    inputs.check_audio(credited, False, [])
