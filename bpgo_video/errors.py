"""Sentences that many error messages share."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable

OTHER_NAMES = {  # key or flag -> what people type for it
    "ranks": "gpus num_gpus nproc_per_node num_processes world_size",
    "optim.learning_rate": "lr base_lr",
    "run.num_steps": "steps max_steps epochs num_epochs iterations",
    "run.dir": "output_dir output out save_dir logdir",
    "run.resume": "resume_from resume_from_checkpoint",
    "run.save_every": "save_steps",
    "rollout.prompts_per_step": "batch_size train_batch_size global_batch_size",
    "rollout.group_size": "num_samples num_generations",
    "rollout.micro_batch_size": "batch_size_per_gpu micro_batch",
    "sft.batch_size": "train_batch_size global_batch_size",
    "sft.micro_batch_size": "batch_size_per_gpu micro_batch",
    "policy.folder": "model model_path pretrained_model",
    "policy.lora.rank": "lora_rank",
    "policy.lora.alpha": "lora_alpha",
    "video.num_frames": "frames",
    "sampler.guidance_scale": "guidance cfg cfg_scale",
    "data.shards": "dataset train_data data_path prompts",
    "loss.kl_weight": "kl kl_coef kl_beta",
    "loss.clip_range": "clip clip_eps",
    "ema.decay": "ema_decay",
    "evaluation.every": "eval_steps",
    "parallel.sequence": "sequence_parallel",
    "num_steps": "steps",  # of bpgo-video generate, as the next ones
    "num_frames": "frames",
    "guidance_scale": "guidance cfg cfg_scale",
    "output": "output_dir out save_dir",
    "policy": "model model_path",
}


def likely(word: str, known: Collection[str]) -> list[str]:
    """The known keys that an unknown one may mean: by another name, by its last part, or by spelling.

    Args:
        word: a key, `optim.lr`, or a flag, `--optim.lr`; known keys have the same form.
    """

    def key(name: str) -> str:
        return name.removeprefix("--").replace("-", "_")

    section, _, last = key(word).rpartition(".")
    parts = {name: key(name).rpartition(".") for name in known}
    named = [name for name in known if last in OTHER_NAMES.get(key(name), "").split()]
    same = [name for name, (_, _, part) in parts.items() if part == last]
    siblings = {part: name for name, (above, _, part) in parts.items() if above == section}
    near = [siblings[part] for part in difflib.get_close_matches(last, siblings, n=1, cutoff=0.5)]
    return named or same or near or difflib.get_close_matches(word, list(known), n=1)


def suggestion(word: str, known: Iterable[str], limit: int = 1, cutoff: float = 0.6) -> str:
    """`; perhaps you meant --output`, the nearest of the known names; empty if none is near."""
    return meant(difflib.get_close_matches(word, list(known), n=limit, cutoff=cutoff))


def meant(names: Collection[str]) -> str:
    """`; perhaps you meant --output`; empty for no names."""
    return f"; perhaps you meant {' or '.join(names)}" if names else ""


def unknown(name: str, value: object, known: Iterable[str], otherwise: str = "") -> str:
    """`scheduler is 'eular'; known are ddim, dpm, euler; perhaps you meant euler`

    Args:
        name: the setting, flag or key as the user writes it.
        otherwise: what is valid besides the known names, such as `, or module:Name`.
    """
    names = list(known)
    return f"{name} is {value!r}; known are {', '.join(names) or 'none'}{otherwise}{suggestion(str(value), names)}"


def some_of(names: Iterable[str], limit: int = 3) -> str:
    """`a, b, c and 5 more`, in sorted order."""
    ordered = sorted(names)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + more
