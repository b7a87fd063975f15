"""Extensions from outside the package (sampler, trust, objective, reward, family), trained together by name alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from bpgo_video.config.reading import config_from_dict, read_yaml, to_yaml
from bpgo_video.diffusion.sde import SAMPLERS
from tests.made.recipes import RECIPE, make_shards, python_path, small_recipe

OUTSIDE = '''
import torch

from bpgo_video.diffusion import Transition
from bpgo_video.policies.wan import WanPolicy
from bpgo_video.rewards import Clips, FrameSampling, FrameScores
from bpgo_video.rollouts.replay import Replay
from bpgo_video.types import Loss


def constant_noise(velocity, latents, step, eta):
    return Transition(latents.float() + step.dt * velocity.float(), eta * (-step.dt).sqrt())


def fixed_trust(scores, settings):
    return torch.full_like(scores.rewards[:, 0], 1.25)


class Constant(Replay):
    def loss(self, trajectory, index):
        loss = super().loss(trajectory, index)
        return Loss(0 * loss.value + 7, loss.metrics)


class Redness:
    name, version, range = "redness", "1", (0.0, 1.0)
    higher_is_better, differentiable, kind = True, True, "real"
    frames = FrameSampling()

    def __call__(self, clips: Clips) -> FrameScores:
        return FrameScores(clips.videos[:, :, 0].mean(dim=(2, 3)), clips.times)


class Family(WanPolicy):
    """Wan by another name."""
'''


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe that names all extensions, with their module on this process's path."""
    (tmp_path / "outside.py").write_text(OUTSIDE, encoding="utf-8")
    config = small_recipe(tmp_path / "run", make_shards(tmp_path / "shards"))
    tree = yaml.safe_load(to_yaml(config))
    tree["evaluation"]["rewards"] = {}
    tree["rewards"] = {"red": {"model": "outside:Redness"}}
    tree["sampler"]["name"], tree["bpgo"]["trust"] = "outside:constant_noise", "outside:fixed_trust"
    tree["loss"] |= {"objective": "outside:Constant", "step_weights": "none"}
    tree["policy"]["family"] = "outside:Family"
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def test_external_extensions_train_together(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {**os.environ, "PYTHONPATH": python_path(recipe.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bpgo_video", "train", "--ranks", "1", "--config", str(recipe)]
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (record,) = map(json.loads, (recipe.parent / "run" / "metrics.jsonl").read_text("utf-8").splitlines())
    assert record["trust_mean"] == 1.25
    assert record["loss"] == 7
    assert 0 < record["reward/red"] < 1
    assert record["ratio_error_first_update_max"] == 0, "rollout and replay have the same density"
    monkeypatch.syspath_prepend(recipe.parent)
    assert read_yaml(recipe.parent / "run" / "config.yaml").sampler.name == "outside:constant_noise"


@pytest.mark.parametrize(
    ("section", "key"), [("sampler", "name"), ("bpgo", "trust"), ("loss", "objective"), ("prior", "kind")]
)
def test_a_name_that_cannot_be_imported_is_a_recipe_error(section: str, key: str) -> None:
    tree = yaml.safe_load(to_yaml(read_yaml(RECIPE)))
    tree[section][key] = "nowhere.to_be_found:it"
    with pytest.raises(ValueError, match=rf"{key} is 'nowhere.to_be_found:it', which cannot be imported.*PYTHONPATH"):
        config_from_dict(tree)


def test_a_table_names_a_missing_entry() -> None:
    with pytest.raises(KeyError, match="sde_of_nobody"):
        SAMPLERS["sde_of_nobody"]
    assert SAMPLERS["math:sqrt"](4) == 2
