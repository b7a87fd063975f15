"""Memory plans of every family: the planned input shapes equal those that the policy's velocity passes."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from bpgo_video.config.policy import LoraConfig
from bpgo_video.planning.fake import Allocations
from bpgo_video.planning.footprint import footprint, kept_tensors, transformer_inputs
from bpgo_video.planning.job import Job
from bpgo_video.planning.memory import reckon
from bpgo_video.planning.models import find_model
from bpgo_video.policies import hunyuan15, wan
from tests.families import CASES, Case

DTYPES = {torch.float32: {}, torch.bfloat16: {"bf16": {"enabled": True}}}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def folder(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("family") / "pipeline"
    case.write(path)
    return path


class Called(Exception):
    """Raised by a transformer call; contains its arguments."""


def recorder(name: str, **given: Any) -> None:
    raise Called(given)


def job_of(case: Case, folder: Path, dtype: torch.dtype) -> Job:
    """A job of the family's recipe on one rank, in micro-batches of two samples, with adapters."""
    recipe = case.recipe(folder)
    config = replace(
        recipe,
        rollout=replace(recipe.rollout, micro_batch_size=2),
        policy=replace(recipe.policy, lora=LoraConfig(rank=2, target_modules=case.lora)),
    )
    ds_config = {**DTYPES[dtype], "zero_optimization": {"stage": 3}}
    return Job(config, ds_config, ranks=1, model=find_model(str(folder)))


def shapes(given: dict[str, Any]) -> dict[str, Any]:
    """Shape and dtype of each tensor and unchanged other values, without None."""
    kept = {name: value for name, value in given.items() if value is not None}
    return tree_map(lambda part: (tuple(part.shape), part.dtype) if isinstance(part, Tensor) else part, kept)


def passed(case: Case, folder: Path, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """The policy's transformer, and the arguments that velocity passes to it for two samples."""
    policy: Any = case.policy(folder, dtype=dtype)
    prompts = case.prompts(policy, case.recipe(folder), dtype)
    latents = torch.zeros(2, *policy.latent_shape(case.video))
    module, policy.transformers = policy.transformers[policy.transformer_names[0]], recorder
    with pytest.raises(Called) as called:
        policy.velocity(latents, torch.tensor(0.95), prompts.conditioning)
    return module, called.value.args[0]


@pytest.fixture
def few_image_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of image tokens of the small encoders."""
    monkeypatch.setattr(wan, "CLIP_TOKENS", 5)
    monkeypatch.setattr(hunyuan15, "SIGLIP_TOKENS", 4)


@pytest.mark.usefixtures("few_image_tokens")
def test_planned_inputs_equal_those_of_velocity(case: Case, folder: Path) -> None:
    """In bf16, where some inputs stay in fp32."""
    _, given = passed(case, folder, torch.bfloat16)
    planned = transformer_inputs(job_of(case, folder, torch.bfloat16).policy, case.video, 2, torch.bfloat16)
    assert shapes(planned) == shapes(given)


@pytest.mark.usefixtures("few_image_tokens")
def test_a_dry_run_counts_the_memory_of_the_transformer(case: Case, folder: Path) -> None:
    """Counted in the same way on real tensors; the plan includes all text padding (Mochi drops it)."""
    module, given = passed(case, folder, torch.float32)
    planned = footprint(job_of(case, folder, torch.float32).policy, case.video, 2, torch.float32)
    for parameter in module.parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    leaves = [part for part in tree_leaves(given) if isinstance(part, Tensor)]
    with Allocations([*kept_tensors(module), *leaves]) as counted:
        with torch.no_grad():
            module(**given)
        forward = counted.mark()
        given["hidden_states"].requires_grad_()
        module(**given)[0].square().mean().backward()
    assert 0.99 < planned.forward.peak / forward < 1.2
    assert 0.99 < planned.replay.peak / counted.peak < 1.1


def test_a_folder_is_planned_by_its_family(case: Case, folder: Path) -> None:
    job = job_of(case, folder, torch.float32)
    policy: Any = case.policy(folder, components=("vae",))
    assert type(job.policy) is type(policy)
    assert job.latents == policy.latent_shape(case.video)
    points = job.config.sampler.num_steps + 1
    samples = job.config.rollout.prompts_per_step * job.config.rollout.group_size
    assert reckon(job).phases["denoise"]["trajectories"] == samples * points * 4 * prod(job.latents)
    noisy = (torch.zeros(1),) if policy.vae_config.get("timestep_conditioning") else ()
    pixels = policy.pipeline.vae.decode(torch.zeros(1, *job.decoded), *noisy).sample
    frames = case.video.num_frames if len(job.decoded) == 4 else 1
    assert pixels.shape[-2:] == (case.video.height, case.video.width)
    assert pixels.numel() == frames * 3 * case.video.height * case.video.width
