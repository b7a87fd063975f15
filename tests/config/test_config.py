"""Strict validation of recipes: each error names the key, the value and a fix."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import yaml
from deepspeed.accelerator import get_accelerator

from bpgo_video.config.bpgo import ConfigError
from bpgo_video.config.deepspeed import read_ds_config
from bpgo_video.config.reading import config_from_dict, ds_config_file, read_recipe, read_yaml, to_yaml
from bpgo_video.config.rules import check_world
from bpgo_video.distributed.engine import require_supported
from tests.made.recipes import RECIPE, ROOT


def tree() -> dict:
    return yaml.safe_load(RECIPE.read_text())


@pytest.mark.parametrize("path", sorted((ROOT / "pipelines" / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_survives_a_round_trip(path: Path) -> None:
    config = read_recipe(path)
    assert config_from_dict(yaml.safe_load(to_yaml(config))) == config
    read_ds_config(str(ds_config_file(config.deepspeed)))


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("run", "num_stepps", 3, "run.num_stepps: unknown key; perhaps you meant num_steps"),
        ("optim", "lr", 3, "optim.lr: unknown key; perhaps you meant learning_rate"),
        ("bpgo", "lora_rank", 3, "bpgo.lora_rank: unknown key; perhaps you meant policy.lora.rank"),
        ("rollout", "group_size", 1, "rollout.group_size: Input should be greater than or equal to 2 (given: 1)"),
        ("sampler", "name", "euler", "sampler.name"),
        ("bpgo", "alpha", 1.5, "bpgo.alpha"),
        ("policy", "lora", {"rnak": 4}, "perhaps you meant rank"),
    ],
)
def test_a_bad_key_or_value_is_named(section: str, key: str, value: object, message: str) -> None:
    broken = tree()
    broken.setdefault(section, {})[key] = value
    with pytest.raises(ConfigError) as error:
        config_from_dict(broken)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("lr", "lr: unknown key; perhaps you meant optim.learning_rate"),
        ("steps", "perhaps you meant run.num_steps"),
        ("gpus", "perhaps you meant --ranks"),
        ("seed", "perhaps you meant run.seed"),
        ("batch_size", "perhaps you meant rollout.prompts_per_step"),
    ],
)
def test_a_key_outside_its_section_or_by_another_name_suggests_the_real_one(key: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_dict(tree() | {key: 3})


def test_a_misspelt_reward_key_suggests_the_nearest_name() -> None:
    broken = tree()
    broken["rewards"]["motion"]["wieght"] = 1.0
    with pytest.raises(ConfigError, match=r"rewards\.motion\.wieght: unknown key; perhaps you meant weight"):
        config_from_dict(broken)


def test_a_reward_cannot_be_trained_on_and_held_out() -> None:
    broken = tree()
    broken["evaluation"]["rewards"]["motion"] = broken["rewards"]["motion"]
    with pytest.raises(ConfigError, match=r"motion.*two names"):
        config_from_dict(broken)


def test_bpgo_without_an_anchor_is_refused() -> None:
    broken = tree() | {"prior": {"kind": "none"}}
    with pytest.raises(ConfigError, match=r"need an anchor.*bpgo\.zeta to 0 and bpgo\.alpha to 0"):
        config_from_dict(broken)
    assert config_from_dict(broken | {"bpgo": {"alpha": 0.0, "zeta": 0.0}}).algorithm == "grpo"


def test_trust_in_reliability_needs_several_scorings_that_differ() -> None:
    broken = tree() | {"bpgo": {"trust": "reliability"}}
    del broken["rewards"]["truth"]
    for reward in broken["rewards"].values():
        reward.pop("trust", None)
    with pytest.raises(ConfigError, match=r"alignment has trust 'reliability'.*set rewards\.alignment\.rescorings"):
        config_from_dict(broken)
    for again in ([broken["rewards"]["alignment"]["options"]], [{"frames": 4}, {"frames": 4}]):
        for reward in broken["rewards"].values():
            reward["rescorings"] = again
        with pytest.raises(ConfigError, match="options that differ"):
            config_from_dict(broken)
    for reward in broken["rewards"].values():
        reward["rescorings"] = [{"frames": 4}, {"frames": 3}]
    assert set(config_from_dict(broken).rescored) == set(broken["rewards"])
    assert config_from_dict(broken | {"bpgo": {"alpha": 0.0}}).rescored, "without trust the mean trains too"


def test_a_watched_reward_has_neither_trust_nor_anchor() -> None:
    recipe = tree()
    assert recipe["rewards"]["truth"]["weight"] == 0
    assert list(config_from_dict(recipe).bpgo_by_reward) == ["alignment", "motion"]
    recipe["rewards"]["truth"]["trust"] = "none"
    with pytest.raises(ConfigError, match=r"truth is watched \(weight 0\), and trust and rescorings"):
        config_from_dict(recipe)


def test_a_reward_may_have_a_trust_of_its_own() -> None:
    recipe = tree() | {"bpgo": {"trust": "frames", "alpha": 0.5, "zeta": 0.0}, "prior": {"kind": "none"}}
    recipe["rewards"]["motion"]["trust"] = "none"
    config = config_from_dict(recipe)
    assert {name: bpgo.trust for name, bpgo in config.bpgo_by_reward.items()} == {
        "alignment": "frames",
        "motion": "none",
    }
    assert config.uses_trust
    assert not config.needs_prior
    recipe["rewards"]["motion"]["trust"] = "sigmoid"
    with pytest.raises(ConfigError, match=r"prior\.kind is 'none'.*need an anchor"):
        config_from_dict(recipe)


def test_an_anchor_is_required_only_where_it_is_used() -> None:
    for bpgo in ({"zeta": 0.0, "trust": "none"}, {"zeta": 0.0, "alpha": 0.0}):
        recipe = tree() | {"prior": {"kind": "none"}, "bpgo": bpgo}
        for reward in recipe["rewards"].values():
            reward.pop("trust", None)
        assert config_from_dict(recipe).algorithm == "grpo"
    with pytest.raises(ConfigError, match="need an anchor"):
        config_from_dict(tree() | {"prior": {"kind": "none"}, "bpgo": {"trust": "none", "zeta": 0.5}})


@pytest.mark.parametrize(("key", "value"), [("best_of", 1), ("drop_zero_std", True)])
def test_nft_requires_every_sample(key: str, value: object) -> None:
    broken = other_starts() | {"advantage": {key: value}, "bpgo": {"alpha": 0.0}}
    config_from_dict(broken)
    broken["loss"] = {"objective": "nft"}
    with pytest.raises(ConfigError, match=rf"advantage\.{key}.*loss\.objective"):
        config_from_dict(broken)


@pytest.mark.parametrize(
    ("change", "keys"),
    [
        ({"loss": {"objective": "awm"}}, ("credit.kind", "loss.objective")),
        ({"advantage": {"combine": "gdpo"}}, ("credit.kind", "advantage.combine")),
    ],
)
def test_frame_credit_needs_log_probs_and_a_fixed_size(change: dict, keys: tuple[str, str]) -> None:
    with pytest.raises(ConfigError) as error:
        config_from_dict(other_starts() | {"credit": {"kind": "segment"}} | change)
    assert all(key in str(error.value) for key in keys)
    config_from_dict(other_starts() | {"credit": {"kind": "video"}} | change)


@pytest.mark.parametrize("objective", ["awm", "nft"])
@pytest.mark.parametrize(
    ("key", "value"), [("ratio", "guard"), ("trust_region", "divergence_mask"), ("step_weights", "flash")]
)
def test_comparing_transitions_needs_an_objective_that_replays_them(objective: str, key: str, value: str) -> None:
    loss = {"objective": objective, "step_weights": "none"}
    config_from_dict(other_starts() | {"loss": loss})
    with pytest.raises(ConfigError, match=rf"loss\.{key} is '{value}' with loss\.objective = '{objective}'"):
        config_from_dict(other_starts() | {"loss": loss | {key: value}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": {"kl_reference": "previous"}}, "loss.kl_reference is 'previous'"),
        ({"loss": {"kl_weight": 0.1}}, "loss.kl_weight is 0.1.*loss.dpo_beta"),
        ({"loss": {"dpo_pairs": 5}}, "loss.dpo_pairs is 5, .*lower it to 4"),
        ({"bpgo": {"trust": "sigmoid", "zeta": 0.0}}, r"the trust of \['motion'\] weighs groups by the level"),
        ({"rollout": {"micro_batch_size": 1}}, "micro_batch_size is 1 with loss.objective = 'dpo'"),
        ({"advantage": {"best_of": 2}}, "advantage.best_of is 2 .*has loss.dpo_pairs instead"),
    ],
)
def test_pairs_refuse_what_they_would_not_use(change: dict[str, dict], message: str) -> None:
    recipe = yaml.safe_load(to_yaml(read_recipe(ROOT / "pipelines" / "configs" / "tiny_wan_dpo.yaml")))
    config_from_dict(recipe)
    recipe["rewards"]["motion"]["trust"] = None
    recipe["bpgo"]["trust"] = "none"
    config_from_dict(recipe)
    for section, values in change.items():
        recipe[section] |= values
    with pytest.raises(ConfigError, match=message):
        config_from_dict(recipe)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bpgo": {"alpha": 0.5}}, "bpgo.alpha is 0.5 .*uses no advantage"),
        ({"optim": {"updates_per_rollout": 2}}, "optim.updates_per_rollout is 2 .*one gradient"),
        ({"loss": {"draft_steps": 9}}, "loss.draft_steps is 9, but a video takes 8"),
        ({"sampler": {"solver": "adams_bashforth"}}, "sampler.solver is 'adams_bashforth'"),
        ({"loss": {"draft_steps": 2}, "parallel": {"sequence": 2}}, "draft_steps is 2 with parallel.sequence = 2"),
        ({"policy": {"frozen_rest_on": "cpu"}}, "policy.frozen_rest_on is 'cpu'"),
    ],
)
def test_differentiated_rewards_refuse_what_they_would_not_use(change: dict[str, dict], message: str) -> None:
    recipe = yaml.safe_load(to_yaml(read_recipe(ROOT / "pipelines" / "configs" / "tiny_wan_draft.yaml")))
    config_from_dict(recipe)
    for key, value, words in (
        ("offload", True, "have offload"),
        ("aggregate", "share_above", "a share has no gradient"),
    ):
        broken = copy.deepcopy(recipe)
        broken["rewards"]["alignment"] |= {key: value, "aggregate_at": 0.5 if key == "aggregate" else None}
        with pytest.raises(ConfigError, match=words):
            config_from_dict(broken)
    for section, values in change.items():
        recipe[section] |= values
    with pytest.raises(ConfigError, match=message):
        config_from_dict(recipe)


def other_starts() -> dict:
    """The recipe with a start of its own for each sample, as objectives on final videos need."""
    return tree() | {"rollout": tree()["rollout"] | {"same_start": False}}


@pytest.mark.parametrize("objective", ["awm", "nft"])
def test_equal_starts_and_no_noise_would_make_equal_samples(objective: str) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.same_start is True with loss\.objective"):
        config_from_dict(tree() | {"loss": {"objective": objective}})


@pytest.mark.parametrize(
    ("aggregate", "message"),
    [
        ({"aggregate": "min", "aggregate_at": 0.5}, "does not use"),
        ({"aggregate": "soft_min"}, "needs a number"),
        ({"aggregate": "soft_min", "aggregate_at": 0.0}, "above 0"),
        ({"aggregate": "top_share", "aggregate_at": 1.5}, "at most 1"),
    ],
)
def test_an_aggregate_needs_its_parameter(aggregate: dict, message: str) -> None:
    for section in ("rewards", "evaluation"):
        reward = {"own": {"model": "shapes_oracle", **aggregate}}
        change = {"rewards": reward} if section == "rewards" else {"evaluation": {"rewards": reward}}
        with pytest.raises(ConfigError, match=rf"{section}.*own\.aggregate.*{message}"):
            config_from_dict(tree() | change)


@pytest.mark.parametrize(
    ("advantage", "bpgo", "keys"),
    [
        ({"normalise": "max_std"}, {"alpha": 0.5}, ("advantage.normalise", "bpgo.alpha")),
        ({"drop_zero_std": True}, {}, ("advantage.drop_zero_std", "bpgo.alpha")),
        ({"normalise": "none"}, {"zeta": 0.5}, ("advantage.normalise", "bpgo.zeta")),
        ({"normalise": "win_rate"}, {"zeta": 0.5}, ("advantage.normalise", "bpgo.zeta")),
        ({"best_of": 5}, {}, ("advantage.best_of", "rollout.group_size")),
        ({}, {"alpha": 1.0}, ("bpgo.alpha", "released form")),
        ({}, {"alpha": 1.0, "form": "released", "trust": "sigmoid"}, ("bpgo.alpha", "released form")),
    ],
)
def test_combinations_that_the_learner_refuses_are_named(advantage: dict, bpgo: dict, keys: tuple[str, str]) -> None:
    with pytest.raises(ConfigError) as error:
        config_from_dict(tree() | {"advantage": advantage, "bpgo": bpgo})
    assert all(key in str(error.value) for key in keys)
    if bpgo.get("alpha") != 1.0 and "best_of" not in advantage:
        config_from_dict(tree() | {"advantage": advantage, "bpgo": {"alpha": 0.0, "zeta": 0.0}})


@pytest.mark.parametrize(
    ("change", "keys"),
    [
        ({"rollout": {"branches": [4]}}, ("rollout.branches", "rollout.group_size")),
        ({"rollout": {"same_start": False}}, ("rollout.branches", "rollout.same_start")),
        ({"rollout": {"branches": [2, 2, 2]}}, ("rollout.branches", "sampler.train_fraction")),
        ({"rollout": {"micro_batch_size": 3, "prompts_per_step": 6}, "sampler": {"share_steps": "batch"}},
         ("rollout.branches", "rollout.micro_batch_size")),
        ({"advantage": {"best_of": 2}}, ("rollout.branches", "advantage.best_of")),
        ({"credit": {"kind": "segment"}}, ("rollout.branches", "credit.kind")),
        ({"rollout": {"same_start": False}, "loss": {"objective": "nft", "step_weights": "none"}},
         ("rollout.branches", "loss.objective")),
        ({"rollout": {"same_start": False}, "loss": {"objective": "awm", "step_weights": "none"}},
         ("rollout.branches", "loss.objective")),
    ],
)  # fmt: skip
def test_what_a_tree_of_samples_cannot_have_is_refused(change: dict[str, dict], keys: tuple[str, str]) -> None:
    branched = tree()
    branched["rollout"] = branched["rollout"] | {"branches": [4, 2]}
    config_from_dict(branched)
    config_from_dict(branched | {"run": branched["run"] | {"save_minutes": 0.0},
                                 "rollout": branched["rollout"] | {"sample_ahead": True}})  # fmt: skip
    with pytest.raises(ConfigError) as error:
        config_from_dict(branched | {name: branched.get(name, {}) | values for name, values in change.items()})
    assert all(key in str(error.value) for key in keys)


@pytest.mark.parametrize(
    ("sampler", "evaluation", "message"),
    [
        ({"sigmas": [0.5, 0.9, 0.1]}, {}, r"sampler.sigmas \[0.5, 0.9, 0.1\] must fall"),
        ({"sigmas": [1.0, 0.5]}, {}, r"are 2 steps, but sampler.num_steps is 3; set sampler.num_steps to 2"),
        ({"shift": 3.0}, {}, r"taken as they are, but sampler.shift is 3.0; set sampler.shift to null"),
        ({}, {"num_steps": 4}, r"evaluation.num_steps is 4; set evaluation.num_steps to 3, or evaluation.sigmas or"),
        ({}, {"solver": "shipped"}, r"evaluation.solver is 'shipped', which has noise levels of its own"),
        ({}, {"sigmas": [1.0, 0.5, 0.1], "shift": 3.0}, r"taken as they are, but evaluation.shift is 3.0"),
    ],
)
def test_noise_levels_that_other_settings_contradict_are_refused(sampler: dict, evaluation: dict, message: str) -> None:
    config = stated_levels()
    config_from_dict(copy.deepcopy(config))
    config["sampler"] |= sampler
    config["evaluation"] |= evaluation
    with pytest.raises(ConfigError, match=message):
        config_from_dict(config)


def stated_levels() -> dict:
    config = tree()
    config["sampler"] |= {"num_steps": 3, "sigmas": [1.0, 0.7, 0.5], "train_fraction": 1.0}
    config["evaluation"] |= {"num_steps": 3}
    return config


def test_held_out_videos_may_have_another_schedule() -> None:
    config = stated_levels()
    config["evaluation"] |= {"num_steps": 8, "shift": 3.0}
    found = config_from_dict(config)
    assert found.evaluation.sigmas_or(found.sampler) == ()


def test_centring_one_prompt_is_refused() -> None:
    broken = tree() | {"bpgo": {"ras_center": "batch_mean"}}
    config_from_dict(broken)
    broken["rollout"]["prompts_per_step"] = 1
    with pytest.raises(ConfigError, match=r"bpgo\.ras_center.*rollout\.prompts_per_step"):
        config_from_dict(broken)


def test_an_indivisible_world_size_error_names_valid_sizes() -> None:
    config = read_yaml(RECIPE)
    check_world(config, 2)
    with pytest.raises(ConfigError, match="do not divide into 3 ranks"):
        check_world(config, 3)


@pytest.mark.parametrize("key", ["train_batch_size", "gradient_clipping", "optimizer", "scheduler"])
def test_recipe_keys_are_refused_in_the_deepspeed_json(tmp_path: Path, key: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(f'{{"{key}": 1}}')
    with pytest.raises(ConfigError, match=key):
        read_ds_config(str(path))


@pytest.mark.parametrize(
    ("precision", "named"),
    [
        ('"data_types": {"grad_accum_dtype": "bf16"}', "data_types"),
        ('"communication_data_type": "bf16"', "communication_data_type"),
        ('"torch_autocast": {"enabled": true}', "torch_autocast"),
        ('"bf16": {"enabled": true, "bf16_optimizer_states": true}', r"bf16\.bf16_optimizer_states"),
    ],
)
def test_precision_has_one_switch(tmp_path: Path, precision: str, named: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(f'{{"zero_optimization": {{"stage": 3}}, {precision}}}')
    with pytest.raises(ConfigError, match=rf"sets '{named}', but precision has one switch, bf16\.enabled.* Remove"):
        read_ds_config(str(path))


def test_bf16_is_refused_on_a_device_that_lacks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    require_supported({"bf16": {"enabled": True}})
    monkeypatch.setattr(type(get_accelerator()), "is_bf16_supported", lambda self: False)
    require_supported({})
    with pytest.raises(ConfigError, match=r"enables bf16, which this cpu does not support; use a JSON without bf16"):
        require_supported({"bf16": {"enabled": True}})


def test_a_deepspeed_json_without_zero_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimisation": {"stage": 2}}')
    with pytest.raises(ConfigError, match=r"stage is 0 \(it has no zero_optimization\); it must be 1, 2 or 3"):
        read_ds_config(str(path))
    path.write_text('{"zero_optimization": {"stage": 0}}')
    with pytest.raises(ConfigError, match="stage is 0; it must be"):
        read_ds_config(str(path))


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_every_shipped_deepspeed_json_is_accepted(path: Path) -> None:
    assert read_ds_config(str(path))["zero_optimization"]["stage"] in (1, 2, 3)


def test_a_recipe_overrides_its_base_key_by_key(tmp_path: Path) -> None:
    base, recipe = tmp_path / "base.yaml", tmp_path / "recipe.yaml"
    base.write_text(RECIPE.read_text())
    recipe.write_text("base: base.yaml\noptim: {learning_rate: 3.0e-5}\nrewards: {only: {model: clip_score}}\n")
    config, original = read_yaml(recipe), read_yaml(base)
    assert config.optim.learning_rate == 3e-5
    assert config.optim.updates_per_rollout == original.optim.updates_per_rollout
    assert set(config.rewards) == {"only"}, "the rewards of the base are replaced, not merged"
    assert config.evaluation == original.evaluation


def test_a_missing_or_circular_base_is_named(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("base: second.yaml\n")
    with pytest.raises(
        ConfigError,
        match=r"first\.yaml: base 'second\.yaml' is neither a file nor a shipped recipe",
    ):
        read_yaml(first)
    second.write_text("base: first.yaml\n")
    with pytest.raises(ConfigError, match=r"first\.yaml is its own base, by way of .*first\.yaml -> .*second\.yaml"):
        read_yaml(first)


SFT = ROOT / "pipelines" / "configs" / "tiny_wan_sft.yaml"


def test_an_unknown_kind_of_recipe_is_named() -> None:
    with pytest.raises(ConfigError, match=r"recipe is 'dpo'; known are bpgo, sft"):
        config_from_dict(tree() | {"recipe": "dpo"})


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("sft", {"batch_sise": 3}, "sft.batch_sise: unknown key; perhaps you meant batch_size"),
        ("optim", {"updates_per_rollout": 3}, "optim.updates_per_rollout: unknown key"),
        ("sft", {"batch_size": 30, "micro_batch_size": 16}, "30 is no multiple of sft.micro_batch_size 16"),
        ("evaluation", {"split": "train"}, "held-out clips must not be trained on"),
        ("evaluation", {"weights": "ema"}, "set ema.decay"),
        ("policy", {"lora": {"rnak": 4}}, "perhaps you meant rank"),
    ],
)
def test_errors_of_an_sft_recipe_are_named(section: str, values: dict, message: str) -> None:
    broken = yaml.safe_load(SFT.read_text()) | {"ema": {"decay": 0.0}}
    broken[section] = broken.get(section, {}) | values
    with pytest.raises(ConfigError) as error:
        config_from_dict(broken)
    assert message in str(error.value)


def test_an_indivisible_number_of_clips_is_named() -> None:
    config = read_recipe(SFT)
    check_world(config, 2)
    with pytest.raises(ConfigError, match=r"sft.batch_size 32 clips do not divide into 3 ranks x micro_batch_size 16"):
        check_world(config, 3)
