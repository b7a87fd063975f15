"""Full-scale recipes: each is valid, its batch divides over its GPUs, and its memory plan fits."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bpgo_video.config.deepspeed import read_ds_config
from bpgo_video.config.reading import ds_config_file, read_yaml
from bpgo_video.planning.job import Job, count_step
from bpgo_video.planning.memory import reckon
from bpgo_video.planning.models import diffusers_class, find_model
from bpgo_video.policies.attention import check_heads
from bpgo_video.rewards.reward import source_of
from bpgo_video.rollouts.rules import check_experts
from tests.families import CASES
from tests.made.recipes import ROOT

SCALED = sorted((ROOT / "pipelines" / "configs").glob("*gb.yaml"))
ONE_LAYER = {"num_layers": 1, "num_single_layers": 1, "vace_layers": [0]}
NAME = re.compile(r"_(?P<gpus>\d+)x(?P<gigabytes>\d+)gb$")
PARAMETERS = {  # billions of parameters of all transformers
    "wan21_1.3b": 1.42, "wan21_14b": 14.29, "wan22_a14b": 28.58, "hunyuanvideo": 12.82, "cogvideox_5b": 5.57,
    "ltx_video": 1.92, "ltx2": 18.88, "flux_dev": 11.90, "sd35_medium": 2.24, "qwen_image": 20.43,
    "wan21_vace_1.3b": 2.15, "skyreels2_df_1.3b": 1.44,
}  # fmt: skip


def job_of(path: Path) -> tuple[Job, int]:
    """A job of the recipe on the GPUs in its name, and their gigabytes."""
    numbers = NAME.search(path.stem)
    assert numbers is not None
    config, gigabytes = read_yaml(path), int(numbers["gigabytes"])
    model = find_model(config.policy.folder)
    ds_config = read_ds_config(str(ds_config_file(config.deepspeed)))
    job = Job(config, ds_config, int(numbers["gpus"]), model, gigabytes=gigabytes)
    return job, gigabytes


FAMILIES = {  # small pipelines of random weights
    "wan21_vace": "vace", "skyreels2": "skyreels_forcing",
    "wan21": "wan", "wan22_a14b": "wan22_image", "hunyuanvideo": "hunyuan", "cogvideox": "cogvideox", "ltx2": "ltx2",
    "ltx": "ltx", "flux_dev": "flux", "sd35": "sd35", "qwen_image": "qwen_image",
}  # fmt: skip


@pytest.mark.parametrize("path", SCALED, ids=lambda path: path.stem)
def test_the_trained_steps_match_the_familys_transformers(path: Path, tmp_path: Path) -> None:
    """A run checks experts and their guidance before it loads them."""
    case = CASES[next(case for name, case in FAMILIES.items() if path.stem.startswith(name))]
    case.write(tmp_path)
    config = read_yaml(path)
    check_experts(case.policy(tmp_path, components=()), replace(config, policy=replace(config.policy, family=None)))


@pytest.mark.parametrize("path", SCALED, ids=lambda path: path.stem)
def test_held_out_rewards_share_no_network_with_training(path: Path) -> None:
    config = read_yaml(path)
    held, trained = (
        {source_of(name, reward) for name, reward in rewards.items()}
        for rewards in (config.evaluation.rewards, config.rewards)
    )
    assert held
    assert not held & trained


def test_there_is_a_recipe_for_each_model() -> None:
    found = {path.stem for path in SCALED}
    assert all(any(stem.startswith(name) for stem in found) for name in PARAMETERS)


@pytest.mark.parametrize("path", SCALED, ids=lambda path: path.stem)
def test_each_recipe_matches_its_model(path: Path) -> None:
    """Text tokens, size, heads and the batch: in well under a second."""
    job, _ = job_of(path)
    config, model = job.config, job.model
    assert config.policy.max_sequence_length == model.text_tokens
    assert set(config.policy.trained) <= set(model.transformers)
    assert (
        job.policy.video_shape(config.video)[1]
        == (config.video.num_frames - 1) // (8 if "ltx" in model.name else 4) + 1
    )
    with torch.device("meta"):
        module = diffusers_class(model.transformer).from_config({**model.transformer, **ONE_LAYER})
    check_heads(
        {**module.config, "_class_name": type(module).__name__}, config.parallel.sequence, job.policy.sequence_plan
    )
    samples = config.rollout.prompts_per_step * config.rollout.group_size
    assert samples % (job.ranks // config.parallel.sequence * config.rollout.micro_batch_size) == 0
    assert config.bpgo.needs_prior
    assert config.prior.kind != "none"


@pytest.mark.slow
@pytest.mark.parametrize("path", SCALED, ids=lambda path: path.stem)
def test_the_memory_plan_fits(path: Path) -> None:
    job, gigabytes = job_of(path)
    found = count_step(job)
    name = next(name for name in PARAMETERS if path.stem.startswith(name))
    adapters = found["trained"] if job.config.policy.lora.rank else 0
    assert (found["parameters"] - adapters) / 1e9 == pytest.approx(PARAMETERS[name], abs=0.006)
    assert found["groups"] * job.config.parallel.sequence == job.ranks
    assert found["samples"] == found["groups"] * found["micro_batches"] * job.config.rollout.micro_batch_size
    assert sum(found["passes"]) == found["micro_batches"] * job.config.sampler.trained_count
    plan = reckon(job)
    assert plan.fits(gigabytes), f"{plan.tightest}: {plan.peak / 1e9:.1f} GB"
    assert plan.peak > 5e9, "a smaller plan would be incomplete"
