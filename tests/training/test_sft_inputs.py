"""Inputs of supervised fine-tuning: refusals before a model is loaded, and the clips that are read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bpgo_video.config.bpgo import Config, ConfigError, VideoConfig
from bpgo_video.config.reading import to_yaml
from bpgo_video.config.sft import SftConfig
from bpgo_video.data.reader import PromptShards
from bpgo_video.data.records import LATENTS, ShardError
from bpgo_video.data.stream import EndlessOrder
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.files import resolve_folder
from bpgo_video.policies import Policy
from bpgo_video.rewards.tiny_rewards import oracle_scores
from bpgo_video.training import inputs
from bpgo_video.training.inputs import check_inputs, spread_rows
from bpgo_video.training.run_folder import check_run_dir
from bpgo_video.training.sft import ClipReader
from tests.made.clip_folders import HELDOUT, TRAIN, make_clips, sft_recipe
from tests.made.recipes import make_shards

CPU = torch.device("cpu")
MESH = Mesh(0, 1, CPU)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clips(tmp_path_factory.mktemp("clips") / "shards")


@pytest.fixture
def config(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SftConfig:
    monkeypatch.setattr(inputs, "load_policy", lambda *_, **__: pytest.fail("a model was loaded"))
    recipe = sft_recipe()
    return replace(
        recipe,
        run=replace(recipe.run, dir=str(tmp_path / "run")),
        data=replace(recipe.data, shards=str(clips)),
        sft=replace(recipe.sft, batch_size=8, micro_batch_size=4),
    )


def test_valid_input_passes(config: SftConfig) -> None:
    ds_config, shards = check_inputs(config, MESH)
    assert ds_config["zero_optimization"]["stage"] == 2
    assert shards.splits == {"train": TRAIN, "heldout": HELDOUT}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: replace(c, video=VideoConfig(9, 64, 32, 8.0)),
            r"clips of another video or VAE \(width 64, here 32\): set the recipe's `video`, or build shards",
        ),
        (lambda c: replace(c, sft=replace(c.sft, batch_size=24)), "a batch of 24 prompts needs a split with as many"),
        (lambda c: replace(c, evaluation=replace(c.evaluation, split="test")), "has no split 'test'"),
        (lambda c: replace(c, data=replace(c.data, shards="nowhere")), "nowhere do not exist"),
        (
            lambda c: replace(c, policy=replace(c.policy, family="WanImageToVideoPipeline")),
            r"holds \['latents'\] of each clip, but .* makes videos of images",
        ),
    ],
)
def test_incompatible_shards_are_named(
    config: SftConfig, change: Callable[[SftConfig], SftConfig], message: str
) -> None:
    with pytest.raises(ShardError, match=message):
        check_inputs(change(config), MESH)


def test_prompt_shards_and_clips_of_another_vae_are_refused(config: SftConfig, tmp_path: Path) -> None:
    prompts = make_shards(tmp_path / "prompts")
    with pytest.raises(ShardError, match="prompts without video clips"):
        check_inputs(replace(config, data=replace(config.data, shards=str(prompts))), MESH)
    folder = tmp_path / "wan"
    shutil.copytree(resolve_folder(config.policy.folder), folder)
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ShardError, match=r"another video or VAE \(other encoder\)"):
        check_inputs(replace(config, policy=replace(config.policy, folder=str(folder))), MESH)


def test_a_run_of_another_kind_is_not_continued(config: SftConfig, recipe: Config) -> None:
    run_dir = Path(config.run.dir)
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(to_yaml(recipe))
    (run_dir / "metrics.jsonl").touch()
    with pytest.raises(ConfigError, match="holds a run of kind 'bpgo', this one is 'sft'"):
        check_run_dir(replace(config, run=replace(config.run, resume="auto")))
    (run_dir / "config.yaml").write_text(to_yaml(config))
    slower = replace(config.parallel, heartbeat_timeout=90.0)
    check_run_dir(replace(config, run=replace(config.run, resume="auto"), parallel=slower))
    other = replace(config.sft, batch_size=16)
    with pytest.raises(ConfigError, match="was started with other sft settings"):
        check_run_dir(replace(config, run=replace(config.run, resume="auto"), sft=other))


def test_heldout_clips_are_evenly_spaced_over_their_split(config: SftConfig, clips: Path) -> None:
    shards, split = PromptShards(clips), config.evaluation.split
    assert spread_rows(shards, split, config.evaluation.max_clips).tolist() == list(range(TRAIN, TRAIN + HELDOUT))
    assert spread_rows(shards, split, 2).tolist() == [TRAIN, TRAIN + 2]
    assert not len(spread_rows(shards, None, 2))


def test_a_micro_batch_is_read_in_the_dtypes_of_the_policy(clips: Path) -> None:
    shards = PromptShards(clips)
    of_video = {"frame_rate": torch.tensor([29.97])}
    reader = ClipReader(
        shards, EndlessOrder(shards, "train", 0, 8), shards.rows("heldout"), torch.bfloat16, CPU, of_video
    )
    batch = reader.read([3, 1])
    assert batch.ids == [3, 1]
    assert batch.latents.dtype == torch.float32, "noise is added in full precision"
    assert torch.equal(batch.latents[1], shards.record(1).clip[LATENTS])
    assert batch.conditioning["prompt_embeds"].dtype == torch.bfloat16
    assert torch.equal(batch.conditioning["frame_rate"], torch.tensor([29.97, 29.97])), "also in full precision"


def test_captions_of_the_embedded_clips_are_correct(clips: Path, policy: Policy) -> None:
    records = list(PromptShards(clips).records())
    videos = policy.decode(torch.stack([record.clip[LATENTS] for record in records]), {})
    texts = [record.prompt for record in records]
    assert oracle_scores(videos, texts).mean() > 0.9
    assert oracle_scores(videos, texts[1:] + texts[:1]).mean() < 0.7
    assert len(set(texts)) > TRAIN / 2
