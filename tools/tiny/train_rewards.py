"""Training of the embedded default's two learned rewards on the world of moving shapes, from scratch.

    python -m tools.tiny.train_rewards --output bpgo_video/tiny/weights

clip    a small CLIPModel that scores frames for shape and colour; a frame cannot show a direction
motion  a small video-text model that scores clips for their direction

Both learn from soft labels on frames and clips with the errors of a half-trained policy (warped outlines, blended
shapes, patches of another colour, fading, blur, noise, stray objects; stops, jitter, jumps, wrong turns), so that
scores also rank imperfect videos. They are imperfect on purpose: perfect rewards would not show the effect of BPGO.
Deterministic in --seed on one thread. Finally prints how often correct captions score higher than wrong ones.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import (
    avg_pool2d,
    binary_cross_entropy_with_logits,
    grid_sample,
    interpolate,
    normalize,
    one_hot,
)
from tqdm import trange
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from bpgo_video.rewards import Clips
from bpgo_video.rewards.networks import Preprocessing
from bpgo_video.rewards.text import ClipScore
from bpgo_video.rewards.tiny_rewards import LearnedMotion, MotionMatch
from bpgo_video.tiny import world as world
from tools.tiny.train_policy import build_tokenizer

IMAGE_SIZE, TEXT_TOKENS = 64, 16
CLEAN_SHARE = 0.2  # of the frame model's training steps, which come first and use clean frames
MEAN = STD = (0.25, 0.25, 0.25)


def build_clip(tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
    """transformers' CLIPModel with half a million parameters."""
    shared: dict = {"num_attention_heads": 4, "intermediate_size": 192}
    shared["initializer_factor"] = 3.0  # learns shapes in a third of the steps that 1 needs
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    text = {"vocab_size": len(tokenizer), "hidden_size": 64, "num_hidden_layers": 2}
    text |= {"max_position_embeddings": TEXT_TOKENS, **shared, **special}
    vision = {"hidden_size": 96, "num_hidden_layers": 3, "image_size": IMAGE_SIZE, "patch_size": 8, **shared}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def ramp(value: Tensor, low: float, high: float) -> Tensor:
    return ((value - low) / (high - low)).clamp(0, 1)


def random_amounts(shape: tuple[int, ...], share: float, largest: float, generator: torch.Generator) -> Tensor:
    """Uniform values in [0, largest] for a share of the entries, zero for the others."""
    amount, chosen = torch.rand(2, *shape, generator=generator)
    return largest * amount * (chosen < share)


def waves(count: int, channels: int, cells: int, generator: torch.Generator) -> Tensor:
    """Smooth noise: (count, channels, SIZE, SIZE)."""
    coarse = torch.randn(count, channels, cells, cells, generator=generator)
    return interpolate(coarse, (world.SIZE, world.SIZE), mode="bicubic")


def damaged_masks(shapes: Tensor, centres: Tensor, radius: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Damaged outlines, (count, SIZE, SIZE), and how well each shows every shape, (count, 3).

    Half are blended with another shape or rounded, most are warped. The label of a shape is the overlap with its clean
    outline at the same position, shared among shapes of similar overlap.
    """
    count = len(shapes)
    clean = torch.stack([world.coverage(torch.full_like(shapes, k), centres, radius) for k in range(3)])
    rows = torch.arange(count)
    second_shape = torch.randint(3, (count,), generator=generator)
    blend = random_amounts((count,), 0.5, 1.0, generator)[:, None, None]
    mixed = avg_pool2d(torch.lerp(clean[shapes, rows], clean[second_shape, rows], blend)[:, None], 5, 1, 2)[:, 0]
    mask = torch.where(blend > 0, ((mixed - 0.5) * 3 + 0.5).clamp(0, 1), clean[shapes, rows])
    axis = (torch.arange(world.SIZE) + 0.5) * 2 / world.SIZE - 1
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)
    pixels = random_amounts((count,), 0.6, 2.5, generator)[:, None, None, None] * waves(count, 2, 8, generator)
    grid = grid + pixels.permute(0, 2, 3, 1) * 2 / world.SIZE
    mask = grid_sample(mask[:, None], grid, align_corners=False)[:, 0]
    overlap = torch.minimum(mask, clean).sum(dim=(2, 3)) / torch.maximum(mask, clean).sum(dim=(2, 3))
    quality = ramp(overlap.amax(dim=0), 0.5, 0.97) * ramp(radius, 3.0, 6.0)
    return mask, ((overlap / 0.03).softmax(dim=0) * quality).T


def damaged_colours(count: int, mask: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Colours with patches of a second one, (count, 3, SIZE, SIZE), and how well `mask` shows each, (count, 4)."""
    first, second = torch.randint(4, (2, count), generator=generator)
    palette = torch.tensor(list(world.COLOURS.values()))[..., None, None]
    even, patchy = random_amounts((2, count, 1, 1, 1), 0.35, 1.0, generator)
    sharp = waves(count, 1, 10, generator) * 2 + 6 * patchy - 4
    share = torch.maximum(0.7 * even, torch.where(patchy > 0, sharp.clamp(0, 1), 0.0))
    colour = torch.lerp(palette[first], palette[second], share)
    area = mask.sum(dim=(1, 2)).clamp(min=1)
    part = ((share[:, 0] * mask).sum(dim=(1, 2)) / area)[:, None]
    labels = one_hot(first, 4) * ramp(1 - part, 0.3, 1.0) + one_hot(second, 4) * ramp(part, 0.3, 1.0)
    return colour, torch.where((first == second)[:, None], one_hot(first, 4).float(), labels)


def damaged_frames(
    shapes: Tensor, centres: Tensor, radius: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Frames (count, 3, SIZE, SIZE), and how well each shows every shape (count, 3) and every colour (count, 4)."""
    count = len(shapes)
    mask, shape_labels = damaged_masks(shapes, centres, radius, generator)
    colour, colour_labels = damaged_colours(count, mask, generator)
    stray, fade, haze, noise = random_amounts((4, count, 1, 1, 1), 0.15, 1.0, generator)
    position = world.SIZE * torch.rand(count, 2, generator=generator)
    second = world.coverage(shapes.roll(1), position, 3 + 5 * torch.rand(count, generator=generator))
    opacity = torch.maximum(mask, second * (stray[:, 0] > 0) * (1 - mask))[:, None] * (1 - 0.8 * fade)
    frames = torch.lerp(world.BACKGROUND + 0.15 * haze * waves(count, 3, 8, generator), colour, opacity)
    frames = frames + 0.12 * noise * torch.randn(frames.shape, generator=generator)
    blurred = torch.rand(count, 1, 1, 1, generator=generator) < 0.15
    frames = torch.where(blurred, avg_pool2d(frames, 5, 1, 2, count_include_pad=False), frames).clamp(0, 1)
    quality = (1 - fade) * (1 - 0.5 * (stray > 0)) * (1 - 0.3 * noise) * (1 - 0.3 * haze)
    return frames, shape_labels * quality[:, :, 0, 0] * (1 - 0.4 * blurred[:, :, 0, 0]), colour_labels


def random_frames(count: int, damaged: bool, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Frames of random shapes, positions and sizes, with the labels of `damaged_frames`."""
    shapes = torch.randint(3, (count,), generator=generator)
    centres = 12 + (world.SIZE - 24) * torch.rand(count, 2, generator=generator)
    radius = 4 + 7 * torch.rand(count, generator=generator)
    if damaged:
        return damaged_frames(shapes, centres, radius, generator)
    colours = torch.randint(4, (count,), generator=generator)
    mask = world.coverage(shapes, centres, radius)[:, None]
    palette = torch.tensor(list(world.COLOURS.values()))[colours][..., None, None]
    frames = mask * palette + (1 - mask) * world.BACKGROUND
    return frames, one_hot(shapes, 3).float(), one_hot(colours, 4).float()


def random_captions(count: int, generator: torch.Generator) -> list[world.Caption]:
    """Random captions, half of them without a colour, because shapes are harder to learn than colours."""
    captions = world.all_captions()
    plain = [caption for caption in captions if caption.colour is None and caption.shape]
    return [pool[i] for pool in (plain, captions) for i in torch.randint(len(pool), (count // 2,), generator=generator)]


def attribute_match(labels: Tensor, stated: Sequence[str | None], names: Sequence[str]) -> Tensor:
    """How well samples match each text in one attribute, [samples, texts]; an open attribute uses the best label."""
    columns = [labels.amax(dim=1) if name is None else labels[:, list(names).index(name)] for name in stated]
    return torch.stack(columns, dim=1)


def train_clip(output: Path, args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    tokenizer = build_tokenizer()
    clip = build_clip(tokenizer).train()
    tokenizer.save_pretrained(output)
    edges = {"size": {"shortest_edge": IMAGE_SIZE}, "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}}
    processor = {"image_processor_type": "CLIPImageProcessor", **edges, "resample": 3}
    processor |= {"image_mean": MEAN, "image_std": STD}
    (output / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n", "utf-8")
    normalise = Preprocessing.of_folder(output)
    bias = torch.nn.Parameter(torch.tensor(-2.0))
    optimizer = torch.optim.AdamW([*clip.parameters(), bias], lr=args.clip_learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.clip_learning_rate, args.clip_steps, pct_start=0.1)
    progress = trange(args.clip_steps, desc="clip", mininterval=10)
    for step in progress:
        damaged = step >= CLEAN_SHARE * args.clip_steps
        frames, shape_labels, colour_labels = random_frames(args.batch_size, damaged, generator)
        chosen = random_captions(32, generator)
        labels = attribute_match(shape_labels, [c.shape for c in chosen], world.SHAPES)
        labels = labels * attribute_match(colour_labels, [c.colour for c in chosen], list(world.COLOURS))
        ids = tokenizer([c.text for c in chosen], padding=True, return_tensors="pt").input_ids
        images = normalize(clip.get_image_features(pixel_values=normalise(frames)).pooler_output, dim=-1)
        texts = normalize(clip.get_text_features(input_ids=ids).pooler_output, dim=-1)
        cosines = images @ texts.T
        loss = binary_cross_entropy_with_logits(6.0 * cosines + bias, labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if (step + 1) % 300 == 0:
            clip.save_pretrained(output)
    clip.eval().save_pretrained(output)


def damaged_clips(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Clips with errors in their motion, and how well each shows every direction: [count, 4]."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    scenes = world.sample_scenes([world.Caption(None, None, None)] * count, generator)
    steps = scenes.centres.diff(dim=1)
    stops = (uniform(count, steps.shape[1]) < 0.8 * uniform(count, 1)) & (uniform(count, 1) < 0.4)
    steps = torch.where(stops[..., None], 0.15 * steps, steps)
    turn = (uniform(count) - 0.5) * 4 * (uniform(count) < 0.4)
    cos, sin = turn.cos()[:, None], turn.sin()[:, None]
    turned = torch.stack([cos * steps[..., 0] - sin * steps[..., 1], sin * steps[..., 0] + cos * steps[..., 1]], dim=-1)
    when = (uniform(count, 1) * steps.shape[1]).floor()
    steps = torch.where((torch.arange(steps.shape[1]) >= when)[..., None], turned, steps)
    jitter = 2.5 * uniform(count, 1, 1) * (uniform(count, 1, 1) < 0.4)
    steps = steps + jitter * torch.randn(steps.shape, generator=generator)
    centres = torch.cat([scenes.centres[:, :1], scenes.centres[:, :1] + steps.cumsum(dim=1)], dim=1)
    clean = world.render(world.Scenes(scenes.shapes, scenes.colours, scenes.directions, centres, scenes.radius))
    length = centres.shape[1]
    radius = scenes.radius[:, None] * (1 - random_amounts((count, length), 0.2, 0.5, generator))
    damaged, *_ = damaged_frames(
        scenes.shapes.repeat_interleave(length), centres.flatten(0, 1), radius.flatten(), generator
    )
    frames = torch.where(uniform(count, 1, 1, 1, 1) < 0.4, clean, damaged.unflatten(0, (count, length)))
    along = torch.einsum("sfc,dc->sdf", steps, torch.tensor(list(world.DIRECTIONS.values())))
    sideways = (steps.square().sum(dim=-1)[:, None] - along.square()).clamp(min=0).sqrt()
    right = ((along - 0.3) / 0.9).clamp(0, 1) * (1 - (sideways / along.clamp(min=0.3) - 0.2) / 0.8).clamp(0, 1)
    return frames, right.mean(dim=-1)


def train_motion(output: Path, args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    model = MotionMatch()
    pool = [damaged_clips(128, generator) for _ in range(args.clips // 128)]
    videos = torch.cat([(clips * 255).round().byte() for clips, _ in pool])
    directions = torch.cat([labels for _, labels in pool])
    captions = world.all_captions()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.motion_learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.motion_learning_rate, args.motion_steps, pct_start=0.1
    )
    progress = trange(args.motion_steps, desc="motion", mininterval=10)
    for _ in progress:
        rows = torch.randint(len(videos), (args.batch_size,), generator=generator)
        chosen = [captions[i] for i in torch.randint(len(captions), (32,), generator=generator)]
        labels = attribute_match(directions[rows], [c.direction for c in chosen], list(world.DIRECTIONS))
        logits = model.logits(model.embed_videos(videos[rows] / 255), model.embed_texts([c.text for c in chosen]))
        loss = binary_cross_entropy_with_logits(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.save(output)


@torch.no_grad()
def ranking_accuracy(reward: ClipScore | LearnedMotion, attribute: str, count: int = 256) -> float:
    """Share of rendered held-out clips that score higher with their caption than with a wrong `attribute`."""
    generator = torch.Generator().manual_seed(17)
    clear = [caption for caption in world.captions("heldout") if caption.is_clear]
    right = [clear[i % len(clear)] for i in range(count)]
    videos = world.render(world.sample_scenes(right, generator))
    names = {"shape": world.SHAPES, "colour": list(world.COLOURS), "direction": list(world.DIRECTIONS)}[attribute]
    wrong = []
    for caption in right:
        index = list(names).index(getattr(caption, attribute)) + 1
        wrong.append(world.Caption(**{**vars(caption), attribute: names[index % len(names)]}))
    clips = (Clips(videos, world.FPS, tuple(caption.text for caption in texts)) for texts in (right, wrong))
    better, worse = (reward(batch).values.mean(dim=1) for batch in clips)
    return float((better > worse).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="new folder for clip/ and motion/")
    parser.add_argument("--clip-steps", type=int, default=2400)
    parser.add_argument("--motion-steps", type=int, default=1000)
    parser.add_argument("--clips", type=int, default=3072, help="damaged clips for training the motion model")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--clip-learning-rate", type=float, default=2e-3)
    parser.add_argument("--motion-learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    started = time.time()
    train_motion(args.output / "motion", args)
    train_clip(args.output / "clip", args)
    clip, motion = ClipScore(str(args.output / "clip")), LearnedMotion(str(args.output / "motion"))
    accuracy = {name: ranking_accuracy(clip, name) for name in ("shape", "colour")}
    accuracy["direction"] = ranking_accuracy(motion, "direction")
    print(json.dumps({"heldout_ranking_accuracy": accuracy, "seconds": round(time.time() - started)}))


if __name__ == "__main__":
    main()
