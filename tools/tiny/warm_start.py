"""Supervised warm start of the embedded policies: clips of the world as video shards, and the `sft` recipe.

    python -m tools.tiny.warm_start --output runs/tiny-clips     # only writes clips for the embedded policy

train_policy.py and train_image_policy.py write the clips and train on them.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path

import torch

from bpgo_video.config.bpgo import VideoConfig
from bpgo_video.config.reading import config_from_dict
from bpgo_video.config.sft import SftConfig
from bpgo_video.data.records import (
    LATENTS,
    NEGATIVE,
    PromptRecord,
    encoder_stamp,
    layout_of,
    write_index,
    write_shard,
    write_tensors,
)
from bpgo_video.data.writer import clip_stamp
from bpgo_video.files import resolve_folder
from bpgo_video.policies import Policy, load_policy
from bpgo_video.tiny import world as world
from bpgo_video.training.sft import train

VIDEO = VideoConfig(world.FRAMES, world.SIZE, world.SIZE, float(world.FPS))
TEXT_TOKENS = 16
CHUNK = 16  # clips encoded at once
HELDOUT = 64
DS_CONFIG = Path(__file__).parents[2] / "ds_configs" / "zero1.json"


def write_clips(policy_folder: str, output: Path, count: int, heldout: int = HELDOUT, seed: int = 0) -> Path:
    """Write clips of the world's training captions to `output`, in the format of tools/make_video_shards.py.

    The caption of a clip is complete, or leaves some attributes open.

    Args:
        policy_folder: pipeline with the VAE and the text encoder.
        count, heldout: clips in the splits "train" and "heldout", which have the same captions.
    """
    folder = resolve_folder(policy_folder)
    policy = load_policy(policy_folder, max_sequence_length=TEXT_TOKENS)
    negative = {name: value[0] for name, value in policy.encode([""]).items()}
    write_tensors(output / NEGATIVE, negative)
    layout = layout_of(negative, TEXT_TOKENS)
    shard = write_shard(output / "clips-000000.tar", clips(policy, count, heldout, seed), 0, layout)
    stamp = clip_stamp(folder, VIDEO, policy.takes_images)
    write_index(output, [shard], encoder_stamp(folder, TEXT_TOKENS), more=stamp)
    return output


def clips(policy: Policy, count: int, heldout: int, seed: int) -> Iterator[PromptRecord]:
    """`count` training records, then `heldout` others, encoded CHUNK at a time."""
    generator = torch.Generator().manual_seed(seed)
    clear = [caption for caption in world.captions("train") if caption.is_clear]
    scenes = world.sample_scenes([clear[i % len(clear)] for i in range(count + heldout)], generator)
    choices = caption_choices(scenes)
    picks = torch.rand(len(choices), generator=generator).tolist()
    texts = [options[int(pick * len(options))] for options, pick in zip(choices, picks, strict=True)]
    for rows in torch.arange(len(texts)).split(CHUNK):
        videos = world.render(scenes.of(rows))
        images = policy.image_conditioning(videos[:, 0], VIDEO) if policy.takes_images else {}
        clip = {LATENTS: policy.encode_video(videos), **images}
        conditioning = policy.encode([texts[row] for row in rows.tolist()])
        for i, row in enumerate(rows.tolist()):
            yield PromptRecord(
                id=row,
                prompt=texts[row],
                split="train" if row < count else "heldout",
                conditioning={name: value[i] for name, value in conditioning.items()},
                clip={name: value[i] for name, value in clip.items()},
            )


def caption_choices(scenes: world.Scenes) -> list[list[str]]:
    """All captions of the training split that match each scene: the complete one and those with open attributes."""
    known = {caption: caption.text for caption in world.captions("train")}
    choices = []
    for index in range(len(scenes.shapes)):
        options = itertools.product(*((value, None) for value in astuple(scenes.caption(index))))
        captions = (world.Caption(*values) for values in options)
        choices.append([known[caption] for caption in captions if caption in known])
    return choices


def add_arguments(parser: argparse.ArgumentParser, steps: int, clips: int, learning_rate: float) -> None:
    """Add the options of both training scripts; `recipe` sets everything else."""
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--clips", type=int, default=clips)
    parser.add_argument("--learning-rate", type=float, default=learning_rate)
    parser.add_argument("--seed", type=int, default=0)


def recipe(policy_folder: Path, shards: Path, run_dir: Path, args: argparse.Namespace) -> SftConfig:
    """A recipe that trains all transformer weights at uniform noise levels and drops a tenth of the captions."""
    every = max(1, args.steps // 10)
    config = config_from_dict(
        {
            "recipe": "sft",
            "run": {"dir": str(run_dir), "num_steps": args.steps, "seed": args.seed, "save_every": every},
            "policy": {"folder": str(policy_folder), "max_sequence_length": TEXT_TOKENS},
            "video": vars(VIDEO),
            "data": {"shards": str(shards)},
            "deepspeed": str(DS_CONFIG),
            "sft": {"batch_size": args.batch_size, "micro_batch_size": args.batch_size, "density": "uniform"},
            "optim": {
                "learning_rate": args.learning_rate,
                "weight_decay": 0.01,
                "schedule": "cosine",
                "warmup_updates": args.steps // 20,
            },
            "evaluation": {"split": "heldout", "every": every, "max_clips": HELDOUT},
        }
    )
    assert isinstance(config, SftConfig)
    return config


def train_warm_start(policy_folder: Path, output: Path, args: argparse.Namespace) -> None:
    """Write the clips, run the recipe, and copy the trained policy to `output`."""
    folder = output.with_name(f"{output.name}-training")
    shards = write_clips(str(policy_folder), folder / "clips", args.clips, seed=args.seed)
    train(recipe(policy_folder, shards, folder / "run", args))
    shutil.copytree(folder / "run" / "export", output, dirs_exist_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="new folder of shards")
    parser.add_argument("--policy", default="package:bpgo_video.tiny/weights/wan", help="pipeline folder (%(default)s)")
    parser.add_argument("--clips", type=int, default=512, help="number of training clips (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_clips(args.policy, args.output, args.clips, seed=args.seed)


if __name__ == "__main__":
    main()
