"""Train the embedded default's two learned rewards on the world of moving shapes, from scratch.

    python tools/tiny/train_rewards.py --output bpgo_video/tiny/weights

clip    a small CLIPModel that scores frames for shape and colour; a frame cannot show a direction
motion  a small video-text model that scores clips for their direction

Both learn from soft labels on frames and clips that are spoilt the way a half-trained policy spoils them (blended shapes
and colours, fading, blur, noise, stray objects; stops, jitter, jumps, wrong turns), so that scores grade imperfect
videos. They are imperfect on purpose: rewards that are right everywhere would not show what BPGO is for. Deterministic in
--seed on one thread. Prints at the end how well they tell right captions from wrong ones.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, binary_cross_entropy_with_logits, interpolate
from tqdm import trange
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from bpgo_video.rewards.clip import ClipScore
from bpgo_video.rewards.motion import LearnedMotion
from bpgo_video.tiny import world
from bpgo_video.tiny.motion import MotionMatch
from tools.tiny.train_policy import build_tokenizer

IMAGE_SIZE, TEXT_TOKENS = 32, 16
NORMALISATION = {"image_mean": [0.25, 0.25, 0.25], "image_std": [0.25, 0.25, 0.25]}


def build_clip(tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
    """transformers' CLIPModel at half a million parameters."""
    shared = {"num_attention_heads": 4, "intermediate_size": 192}
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    text = {"vocab_size": len(tokenizer), "hidden_size": 64, "num_hidden_layers": 2, "max_position_embeddings": TEXT_TOKENS}
    vision = {"hidden_size": 96, "num_hidden_layers": 4, "image_size": IMAGE_SIZE, "patch_size": 4}
    return CLIPModel(CLIPConfig(text_config={**text, **shared, **special}, vision_config={**vision, **shared}, projection_dim=64))


def soft(share: Tensor) -> Tensor:
    """A label that falls from 1 to 0 as `share` of something wrong goes from 0 to a half."""
    return (1 - 2 * share).clamp(0, 1)


def spoilt_frames(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Frames (count, 3, SIZE, SIZE), and how much each shows every shape [count, 3] and every colour [count, 4]."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    def some(probability: float, largest: float = 1.0) -> Tensor:
        return uniform(count) * largest * (uniform(count) < probability)

    shapes, colours = (torch.randint(n, (2, count), generator=generator) for n in (3, 4))
    centres = world.MARGIN + (world.SIZE - 2 * world.MARGIN) * uniform(count, 2)
    radius = 6.0 + 5.0 * uniform(count)
    blend, tint = some(0.4), some(0.4)
    masks = [world.coverage(shape, centres, radius) for shape in shapes]
    mask = (1 - blend)[:, None, None] * masks[0] + blend[:, None, None] * masks[1]
    palette = torch.tensor(list(world.COLOURS.values()))
    colour = (1 - tint)[:, None] * palette[colours[0]] + tint[:, None] * palette[colours[1]]
    fade, warp = some(0.3, 0.8), some(0.4)
    mask = mask * (1 - fade)[:, None, None]
    lumps = interpolate(torch.randn(count, 1, 9, 9, generator=generator), (world.SIZE, world.SIZE), mode="bicubic")[:, 0]
    mask = (mask + (warp * 0.9)[:, None, None] * lumps.clamp(-1, 1) * avg_pool2d(mask[:, None], 9, 1, 4)[:, 0]).clamp(0, 1)
    frames = mask[:, None] * colour[..., None, None] + (1 - mask[:, None]) * world.BACKGROUND
    stray, other = some(0.3), torch.randint(4, (count,), generator=generator)
    blob = world.coverage(shapes[1], world.SIZE * uniform(count, 2), 3 + 5 * uniform(count)) * stray[:, None, None]
    frames = torch.lerp(frames, palette[other][..., None, None].expand_as(frames), blob[:, None])
    blur = (some(0.3) > 0.3).view(-1, 1, 1, 1)
    frames = torch.where(blur, avg_pool2d(frames, 5, 1, 2, count_include_pad=False), frames)
    noise = some(0.5, 0.15)
    frames = (frames + noise.view(-1, 1, 1, 1) * torch.randn(frames.shape, generator=generator)).clamp(0, 1)
    quality = soft(0.5 * fade) * (1 - 0.7 * warp) * (1 - 0.5 * stray) * (1 - 2 * noise)
    shape_labels = _mixture(shapes, blend, 3) * quality[:, None]
    return frames, shape_labels, _mixture(colours, tint, 4) * soft(0.3 * fade)[:, None]


def _mixture(pair: Tensor, share: Tensor, values: int) -> Tensor:
    """Soft labels of (1 - share) of the first and share of the second; equal ones are no mixture."""
    first, second = (torch.nn.functional.one_hot(index, values).float() for index in pair)
    same = (pair[0] == pair[1])[:, None]
    labels = soft(share)[:, None] * first + soft(1 - share)[:, None] * second
    return torch.where(same, first, labels)


def attribute_match(labels: Tensor, wanted: Sequence[str | None], names: Sequence[str]) -> Tensor:
    """How far samples fulfil what texts want of one attribute: [samples, texts]; what is left open takes the best."""
    columns = [labels.amax(dim=1) if name is None else labels[:, list(names).index(name)] for name in wanted]
    return torch.stack(columns, dim=1)


def train_clip(output: Path, args: argparse.Namespace) -> None:
    generator = torch.Generator().manual_seed(args.seed)
    tokenizer = build_tokenizer()
    clip = build_clip(tokenizer)
    clip.save_pretrained(output)
    tokenizer.save_pretrained(output)
    processor = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": IMAGE_SIZE},
                 "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}, "resample": 3, **NORMALISATION}  # fmt: skip
    (output / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    reward = ClipScore(str(output))
    reward.clip = clip.train()
    captions = world.all_captions()
    bias = torch.nn.Parameter(torch.tensor(-2.0))
    optimizer = torch.optim.AdamW([*clip.parameters(), bias], lr=args.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, args.clip_steps, pct_start=0.1)
    progress = trange(args.clip_steps, desc="clip", mininterval=10)
    for _ in progress:
        frames, shape_labels, colour_labels = spoilt_frames(args.batch_size, generator)
        chosen = [captions[i] for i in torch.randint(len(captions), (32,), generator=generator)]
        labels = attribute_match(shape_labels, [c.shape for c in chosen], world.SHAPES)
        labels = labels * attribute_match(colour_labels, [c.colour for c in chosen], list(world.COLOURS))
        cosines = reward.embed_frames(frames) @ reward.embed_texts([c.text for c in chosen]).T
        loss = binary_cross_entropy_with_logits(6.0 * cosines + bias, labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{float(loss):.3f}", refresh=False)
    clip.eval().save_pretrained(output)


def spoilt_clips(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Clips whose track goes wrong in places, and how much of each moves in every direction: [count, 4]."""

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
    spoilt = world.Scenes(scenes.shapes, scenes.colours, scenes.directions, centres, scenes.radius)
    frames = world.render(spoilt)
    fade = 1 - 0.7 * uniform(count, 1, 1, 1, 1) * (uniform(count, 1, 1, 1, 1) < 0.3)
    frames = (world.BACKGROUND + fade * (frames - world.BACKGROUND)).clamp(0, 1)
    frames = (frames + 0.08 * uniform(count, 1, 1, 1, 1) * torch.randn(frames.shape, generator=generator)).clamp(0, 1)
    along = torch.einsum("sfc,dc->sdf", steps, torch.tensor(list(world.DIRECTIONS.values())))
    sideways = (steps.square().sum(dim=-1)[:, None] - along.square()).clamp(min=0).sqrt()
    right = ((along - 0.3) / 0.9).clamp(0, 1) * (1 - (sideways / along.clamp(min=0.3) - 0.2) / 0.8).clamp(0, 1)
    return frames, right.mean(dim=-1)


def train_motion(output: Path, args: argparse.Namespace) -> None:
    generator = torch.Generator().manual_seed(args.seed)
    model = MotionMatch()
    captions = world.all_captions()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, args.motion_steps, pct_start=0.1)
    progress = trange(args.motion_steps, desc="motion", mininterval=10)
    for _ in progress:
        videos, directions = spoilt_clips(args.batch_size, generator)
        chosen = [captions[i] for i in torch.randint(len(captions), (32,), generator=generator)]
        labels = attribute_match(directions, [c.direction for c in chosen], list(world.DIRECTIONS))
        logits = model.logits(model.embed_videos(videos), model.embed_texts([c.text for c in chosen]))
        loss = binary_cross_entropy_with_logits(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{float(loss):.3f}", refresh=False)
    model.save(output)


@torch.no_grad()
def ranking_accuracy(reward: ClipScore | LearnedMotion, attribute: str, count: int = 256) -> float:
    """How often rendered held-out clips score higher with their caption than with one whose `attribute` is wrong."""
    generator = torch.Generator().manual_seed(17)
    clear = [caption for caption in world.captions("heldout") if caption.is_clear]
    right = [clear[i % len(clear)] for i in range(count)]
    videos = world.render(world.sample_scenes(right, generator))
    names = {"shape": world.SHAPES, "colour": list(world.COLOURS), "direction": list(world.DIRECTIONS)}[attribute]
    wrong = []
    for caption in right:
        index = list(names).index(getattr(caption, attribute)) + 1
        wrong.append(world.Caption(**{**vars(caption), attribute: names[index % len(names)]}))
    scores = [reward(videos, [caption.text for caption in texts]).mean(dim=1) for texts in (right, wrong)]
    return float((scores[0] > scores[1]).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="gets the folders clip/ and motion/")
    parser.add_argument("--clip-steps", type=int, default=3000)
    parser.add_argument("--motion-steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    started = time.time()
    train_motion(args.output / "motion", args)
    train_clip(args.output / "clip", args)
    clip, motion = ClipScore(str(args.output / "clip")), LearnedMotion(str(args.output / "motion"))
    accuracy = {name: ranking_accuracy(clip, name) for name in ("shape", "colour")}
    accuracy["direction"] = ranking_accuracy(motion, "direction")
    print(json.dumps({"heldout_ranking_accuracy": accuracy, "seconds": round(time.time() - started)}))


if __name__ == "__main__":
    main()
