"""The public API of docs/api.md: documented names and parameters exist, and the mathematics has light imports."""

from __future__ import annotations

import importlib
import inspect
import os
import subprocess
import sys

import pytest

from bpgo_video.diffusion import SAMPLERS
from bpgo_video.policies import FAMILIES, Policy
from bpgo_video.rewards import RewardModel
from tests.made.recipes import ROOT, python_path

SIGNATURES = {  # parameters in order; append a new parameter with a default here too
    "bpgo_video.learner": {
        "BPGOAdvantages": "advantage contrastive trust transformed",
        "PriorAnchor": "mean std count scale version",
        "PriorAnchor.of_samples": "rewards version",
        "PriorAnchor.without_samples": "mean scale version",
        "bpgo_advantages": "rewards prior scale alpha k contrast zeta trust transform normalise",
        "contrastive_reward_transformation": "rewards prior scale contrast",
        "group_relative": "rewards",
        "reliability_adaptive_scaling": "rewards prior scale alpha k centre",
    },
    "bpgo_video.diffusion": {
        "Step": "sigma next_sigma sigma_g",
        "Transition": "mean std",
        "Transition.sample": "self noise",
        "Transition.log_prob": "self next_latents",
        "Transition.frame_log_prob": "self next_latents",
        "shifted_sigmas": "num_steps shift",
        "steps_of": "sigmas",
        "transition": "sampler velocity latents step eta",
    },
    "bpgo_video.rewards": {
        "Clips": "videos fps texts images audio groups",
        "FrameSampling": "count fps",
        "FrameSampling.indices": "self total fps",
        "FrameScores": "values times std",
        "RewardModel.__call__": "self clips",
    },
    "bpgo_video.policies": {
        "Policy.decode": "self latents conditioning",
        "Policy.encode": "self texts",
        "Policy.latent_shape": "self video",
        "Policy.sigmas": "self num_steps video shift",
        "Policy.start": "self noise conditioning",
        "Policy.velocity": "self latents sigma conditioning",
        "family": "path name",
        "guided_velocity": "policy latents sigma guidance scale",
        "load_policy": "folder max_sequence_length components dtype vae_dtype device build load name options",
    },
}
TABLES = {"bpgo_video.diffusion": {"SAMPLERS"}, "bpgo_video.policies": {"FAMILIES"}}
NAMES = [(module, name) for module, names in SIGNATURES.items() for name in names]


@pytest.mark.parametrize(("module", "name"), NAMES, ids=[f"{module}.{name}" for module, name in NAMES])
def test_a_public_name_keeps_its_parameters(module: str, name: str) -> None:
    found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    parameters = [parameter for parameter in inspect.signature(found).parameters if not parameter.startswith("_")]
    assert parameters == SIGNATURES[module][name].split()


@pytest.mark.parametrize("module", SIGNATURES)
def test_a_folder_exports_its_public_names(module: str) -> None:
    public = {name.split(".")[0] for name in SIGNATURES[module]} | TABLES.get(module, set())
    assert public <= set(importlib.import_module(module).__all__)


def test_every_public_name_is_on_the_page() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    public = {name.split(".")[0] for names in (*SIGNATURES.values(), *TABLES.values()) for name in names}
    assert not {name for name in public if f"`{name}" not in page}


def test_samplers_keep_their_names_and_share_a_signature() -> None:
    assert {"ode", "flow_sde", "dance_sde", "cps", "sage", "truncated"} <= set(SAMPLERS)
    assert {tuple(inspect.signature(sampler).parameters) for sampler in SAMPLERS.values()} == {
        ("velocity", "latents", "step", "eta")
    }


def test_families_keep_their_names() -> None:
    known = "Wan WanImageToVideo LTX LTXImageToVideo HunyuanVideo HunyuanVideoImageToVideo HunyuanVideo15 Mochi"
    known += " HunyuanVideo15ImageToVideo CogVideoX CogVideoXImageToVideo Kandinsky5T2V Kandinsky5I2V"
    assert {f"{name}Pipeline" for name in known.split()} <= set(FAMILIES)


def test_required_attributes_of_rewards_and_policies_are_unchanged() -> None:
    members = {"name", "version", "range", "higher_is_better", "differentiable", "kind", "frames"}
    assert set(RewardModel.__annotations__) <= members, "a class written for an older version would no longer work"
    assert {"folder", "pipeline", "transformers", "transformer_names", "fps"} <= set(Policy.__annotations__)


def test_the_mathematics_and_the_contract_of_rewards_import_no_model_library() -> None:
    program = (
        "import sys, bpgo_video.learner, bpgo_video.diffusion, bpgo_video.rewards; "
        "print(*sorted({'deepspeed', 'diffusers', 'transformers', 'peft', 'accelerate'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": python_path()}
    command = [sys.executable, "-c", program]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.split() == []
