"""A synthetic run folder, and a recipe for a random policy and a few prompts with tags; nothing is trained."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import WanPipeline

from bpgo_video.config.bpgo import Config, RewardConfig
from bpgo_video.config.policy import LoraConfig
from bpgo_video.config.reading import to_yaml
from bpgo_video.data.records import encoder_stamp
from bpgo_video.data.writer import build_shards
from bpgo_video.policies import load_policy
from bpgo_video.policies.lora import add_lora
from bpgo_video.rewards import Clips, FrameSampling, FrameScores
from tests.made.random_wan import TEXT_TOKENS, random_wan
from tests.made.recipes import small_recipe
from tests.made.zero_checkpoints import write_checkpoint

PROMPTS = [
    {"prompt": "a red circle moving down", "split": "heldout", "tags": ["clear"]},
    {"prompt": "a shape moving right", "split": "heldout", "tags": ["open"]},
    {"prompt": "a blue square moving up", "split": "heldout", "tags": ["clear"]},
    *({"prompt": text, "tags": []} for text in ("a red object", "a green triangle moving right")),
]


class WhichPrompt:
    """A score that differs between prompts and between samples of a prompt."""

    name, version, range = "which prompt", "7", (0.0, 10.0)
    higher_is_better, differentiable, kind, frames = True, False, "test", FrameSampling()

    def __call__(self, clips: Clips) -> FrameScores:
        length = torch.tensor([[float(len(text))] for text in clips.texts])
        return FrameScores(length + clips.videos[:, 4, 0, 20, 20, None])


def tagged_recipe(root: Path) -> Config:
    """A recipe for a random policy in `root`/wan and shards of PROMPTS in `root`/shards, scored by WhichPrompt."""
    policy = load_policy(str(random_wan(root / "wan")), max_sequence_length=TEXT_TOKENS, components=("text_encoder",))
    (root / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in PROMPTS))
    stamp = encoder_stamp(policy.folder, TEXT_TOKENS)
    build_shards([root / "prompts.jsonl"], root / "shards", policy.encode, stamp)
    config = small_recipe(root / "run", root / "shards", policy={"folder": str(policy.folder)})
    rewards = {"which": RewardConfig(model="tests.made.written_runs:WhichPrompt")}
    return replace(config, evaluation=replace(config.evaluation, rewards=rewards))


def write_run(base: Path, run_dir: Path, lora: LoraConfig, recipe: Config | None = None) -> Path:
    """Write a run with one checkpoint whose weights differ from the base model's; return its folder.

    Args:
        recipe: of the run; None uses a small one whose shards do not exist.
    """
    generator = torch.Generator().manual_seed(7)
    model = WanPipeline.from_pretrained(base).transformer
    if lora.rank:
        add_lora(model, lora, seed=0)
    trained = {
        f"transformer.{name}": parameter.detach() + 0.1 * torch.randn(parameter.shape, generator=generator)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    write_checkpoint(run_dir / "checkpoints" / "step-000002", [trained])
    (run_dir / "checkpoints" / "latest").write_text("step-000002")
    config = recipe or small_recipe(run_dir, run_dir / "shards")
    policy = replace(config.policy, folder=str(base), lora=lora)
    (run_dir / "config.yaml").write_text(to_yaml(replace(config, policy=policy)))
    return run_dir
