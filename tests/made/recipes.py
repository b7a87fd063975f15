"""Small variants of the shipped recipe, and prompt shards for them; shared by tests and their ranks."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from bpgo_video.config.bpgo import Config, RewardConfig
from bpgo_video.config.reading import config_from_dict, read_yaml, to_yaml
from bpgo_video.data.records import encoder_stamp
from bpgo_video.data.writer import build_shards
from bpgo_video.files import resolve_folder
from bpgo_video.policies import load_policy

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "pipelines" / "configs" / "tiny_wan_bpgo.yaml"
PROMPTS = {
    "train": ["a red circle moving left", "a blue square moving up", "a green triangle moving right", "a red object"],
    "heldout": ["a red circle moving down", "a shape moving right"],
}


def python_path(*folders: Path) -> str:
    """PYTHONPATH for subprocesses of tests: these folders, the checkout, then the test's PYTHONPATH."""
    given = os.environ.get("PYTHONPATH", "")
    return os.pathsep.join([*map(str, folders), str(ROOT), *filter(None, [given])])


def make_shards(folder: Path, pipeline: Path | None = None) -> Path:
    """Write shards of a few prompts, embedded by the encoder of a pipeline or of the shipped policy."""
    recipe = read_yaml(RECIPE)
    length, where = recipe.policy.max_sequence_length, str(pipeline or recipe.policy.folder)
    policy = load_policy(where, components=("text_encoder",), max_sequence_length=length)
    inputs = []
    for split, texts in PROMPTS.items():
        path = folder.parent / f"{split}.jsonl"
        path.write_text("".join(f'{{"prompt": "{text}", "split": "{split}"}}\n' for text in texts))
        inputs.append(path)
    build_shards(inputs, folder, policy.encode, encoder_stamp(resolve_folder(where), length))
    return folder


def small_recipe(run_dir: Path, shards: Path, **sections: dict[str, Any]) -> Config:
    """The shipped recipe reduced to seconds: two prompts of four samples, four denoising steps, a fixed prior.

    Args:
        sections: changes by section, such as optim={"name": "sgd"}.
    """
    recipe = read_yaml(RECIPE)
    heldout = dict.fromkeys(recipe.evaluation.rewards)
    base: dict[str, dict[str, Any]] = {
        "run": {"dir": str(run_dir), "num_steps": 1, "save_every": 1},
        "data": {"shards": str(shards)},
        "sampler": {"num_steps": 4, "train_steps": "all"},
        "rollout": {"prompts_per_step": 2, "group_size": 4, "micro_batch_size": 4},
        "optim": {"schedule": "constant", "warmup_updates": 0},
        "prior": {"kind": "constant", "mean": 0.1, "scale": 0.1},
        "evaluation": {"num_steps": 4, "samples_per_prompt": 2, "every": 0, "videos": 1},
    }
    for name, values in base.items():
        recipe = replace(recipe, **{name: replace(getattr(recipe, name), **{**values, **sections.pop(name, {})})})
    for name, values in sections.items():
        value = values if not isinstance(values, dict) else replace(getattr(recipe, name), **values)
        recipe = replace(recipe, **{name: value})
    assert heldout.keys() == recipe.evaluation.rewards.keys()
    return recipe


def without_evaluation(config: Config) -> Config:
    return replace(config, evaluation=replace(config.evaluation, rewards={}))


def rewarded_by(config: Config, model: str) -> Config:
    """The recipe with a single reward, given by dotted path."""
    return replace(config, rewards={"only": RewardConfig(model=model)})


__all__ = ["config_from_dict", "make_shards", "rewarded_by", "small_recipe", "to_yaml", "without_evaluation"]
