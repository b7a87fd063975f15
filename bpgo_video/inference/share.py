"""What is a generation to make? Its prompts, a job for every video, and all that the videos depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from bpgo_video.data.fingerprint import fingerprint
from bpgo_video.data.media import Media, read_media
from bpgo_video.data.prompt_files import read_prompts
from bpgo_video.data.reader import PromptShards
from bpgo_video.data.records import PromptRecord
from bpgo_video.inference.loading import means_of
from bpgo_video.inference.settings import CallSettings, GenerationError, GenerationSettings, Model, video_of
from bpgo_video.inference.video_files import TOLD, Job, Places, within

Reader = Callable[[GenerationSettings, bool], list[PromptRecord]]  # prompts; with their images, if the flag is set


def read_records(settings: GenerationSettings, with_images: bool = False) -> list[PromptRecord]:
    """The prompts of a file or of shards, without embeddings; with their images where the model continues images.

    Raises:
        GenerationError: a prompt has no image, or a split is named and there are no shards.
    """
    if settings.prompts.is_dir():
        found = PromptShards(settings.prompts).records(settings.split)
        pairs = ((record, record.media) for record in found)
    elif settings.split is not None:
        raise GenerationError(f"split is {settings.split!r}, but {settings.prompts} is no folder of prompt shards")
    else:
        lines = read_prompts([settings.prompts])
        pairs = ((line.record, {kind: read_media(kind, path) for kind, path in line.media.items()}) for line in lines)
    return [
        PromptRecord(
            record.id,
            record.prompt,
            record.split,
            record.tags,
            record.negative_prompt,
            media=_image(record, media, with_images),
            info=record.info,
        )
        for record, media in pairs
    ]


def _image(record: PromptRecord, media: Mapping[str, Media], with_images: bool) -> Mapping[str, Media]:
    if not with_images:
        return {}
    if "image" not in media:
        raise GenerationError(
            f"the model makes videos of images, but prompt {record.prompt!r} has none; give .jsonl lines with 'image'"
        )
    return {"image": media["image"]}


def plan(settings: GenerationSettings, prompts: Sequence[PromptRecord], places: Places | None = None) -> list[Job]:
    """Every video of the generation, samples of one prompt side by side; all in `settings.output` without `places`."""
    places = places or within(settings.output)
    return [
        Job(
            prompt,
            number,
            settings.seed,
            sample,
            file=places.videos / places.name(prompt, number, sample),
            sheet=places.sheets / f"{number:05d}.jpg",
        )
        for number, prompt in enumerate(prompts)
        for sample in range(settings.samples_per_prompt)
    ]


def describe(
    settings: GenerationSettings, model: Model, call: CallSettings, records: Sequence[PromptRecord]
) -> dict[str, Any]:
    """All that the videos depend on; plain JSON data."""
    folder, checkpoint, means = model.policy.folder, model.checkpoint, means_of(settings, model)
    parts = [path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    prompts = settings.prompts / "index.json" if settings.prompts.is_dir() else settings.prompts
    images = hashlib.sha256()
    for file in (file for record in records for file in record.media.values()):
        images.update(file.data)
    adapters = {name: hashlib.sha256(file.read_bytes()).hexdigest()[:16] for name, file in settings.adapters.items()}
    return {
        "policy_fingerprint": fingerprint(folder, parts),
        "checkpoint_fingerprint": checkpoint and fingerprint(checkpoint.folder.parent, (checkpoint.folder.name,)),
        "weights": checkpoint and settings.weights,
        "lora_sha256": adapters.get("transformer"),
        "lora_2_sha256": adapters.get("transformer_2"),
        "prompts_sha256": hashlib.sha256(prompts.read_bytes()).hexdigest()[:16],
        "generation_prompts_sha256": _digest_of_told(records),
        "images_sha256": images.hexdigest()[:16] if model.policy.takes_images else None,
        "split": settings.split,
        "seed": settings.seed,
        "negative_prompt": settings.negative_prompt,
        "samples_per_prompt": settings.samples_per_prompt,
        "scheduler": settings.scheduler,
        "flow_shift": settings.flow_shift,
        "family": settings.family,
        "fps": video_of(settings, call, model.policy).fps,
        "dtype": settings.dtype,
        "vae_tiling": means.vae_tiling,
        "attention_backend": means.attention_backend,
        **asdict(call),
        **model.policy.options,
    }


def _digest_of_told(records: Sequence[PromptRecord]) -> str | None:
    told = {str(record.id): record.info[TOLD] for record in records if TOLD in record.info}
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16] if told else None
