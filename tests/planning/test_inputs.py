"""What a plan puts through a transformer is what the family's velocity passes, and every family's folder can be planned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bpgo_video.config.bpgo import LoraConfig
from bpgo_video.planning import inputs
from bpgo_video.planning.inputs import Batch, arguments
from bpgo_video.planning.models import find_model
from bpgo_video.planning.plan import Job, reckon
from tests.families import CASES, Case

NUMBERS = ("rope_interpolation_scale", "return_dict")  # no activations hang on them
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
    """A transformer was called with these arguments."""


def recorder(name: str, **given: Any) -> None:
    raise Called(given)


def job_of(case: Case, folder: Path, dtype: torch.dtype) -> Job:
    """Its recipe on one rank, micro-batches of two samples, both kinds of guidance left out."""
    recipe = case.recipe(folder)
    config = replace(
        recipe,
        rollout=replace(recipe.rollout, micro_batch_size=2),
        policy=replace(recipe.policy, lora=LoraConfig(rank=2, target_modules=case.lora)),
    )
    ds_config = {**DTYPES[dtype], "zero_optimization": {"stage": 3}}
    return Job(config, ds_config, ranks=1, model=find_model(str(folder)))


def shapes(given: dict[str, Any]) -> dict[str, Any]:
    """Shape and dtype of each tensor, other values as they are, what is not given left out."""
    return {
        name: [(tuple(part.shape), part.dtype) for part in (value if isinstance(value, tuple) else (value,))]
        if isinstance(value, Tensor | tuple)
        else value
        for name, value in given.items()
        if value is not None and name not in NUMBERS
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_plan_puts_through_what_velocity_passes(
    case: Case, folder: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy: Any = case.policy(folder)
    prompts = case.prompts(policy, case.recipe(folder), dtype)
    policy.transformers = recorder
    latents = torch.zeros(2, *policy.latent_shape(case.video))
    with pytest.raises(Called) as called:
        policy.velocity(latents, torch.tensor(0.5), prompts.conditioning)
    (given,) = called.value.args
    if "encoder_hidden_states_image" in given and given["encoder_hidden_states_image"] is not None:
        monkeypatch.setattr(inputs, "IMAGE_TOKENS", given["encoder_hidden_states_image"].shape[1])
    job = job_of(case, folder, dtype)
    batch = Batch(2, job.computed, case.text_tokens, dtype, job.policy.given_frames)
    own = type(job.policy).transformer_inputs
    name = job.model.transformer["_class_name"]
    planned = arguments(name, job.policy.transformer_config, batch, own)  # type: ignore[attr-defined]
    assert shapes(planned) == shapes(given)
    assert job.latents == latents.shape[1:]


def test_its_folder_is_planned(case: Case, folder: Path) -> None:
    job = job_of(case, folder, torch.float32)
    video = reckon(job).phases[0].parts
    points = job.config.sampler.num_steps + 1
    samples = job.config.rollout.prompts_per_step * job.config.rollout.group_size
    assert video["trajectories"] == samples * points * 4 * torch.Size(job.latents).numel()
    assert type(job.policy) is type(case.policy(folder, components=()))
    _, frames, height, width = job.decoded
    policy: Any = case.policy(folder, components=("vae",))
    pixels = policy.pipeline.vae.decode(torch.zeros(1, *job.decoded), *_level(policy)).sample
    assert pixels.shape[2:] == (case.video.num_frames, case.video.height, case.video.width)


def _level(policy: Any) -> tuple[Tensor, ...]:
    return (torch.zeros(1),) if policy.vae_config.get("timestep_conditioning") else ()
