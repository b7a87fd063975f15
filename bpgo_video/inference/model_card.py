"""What is in a model folder? A README.md: what was trained, how, by which code; the hashes of the weights."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import yaml

from bpgo_video.code_version import this_code
from bpgo_video.config.reading import to_yaml
from bpgo_video.config.sft import Recipe
from bpgo_video.data.fingerprint import fingerprint
from bpgo_video.paths import resolve_folder
from bpgo_video.policies import family
from bpgo_video.policies.networks import transformer_names

CARD = "README.md"
EXPORTED = "A diffusers pipeline with its transformer"


@dataclass(frozen=True)
class CardFacts:
    """What a model card is about.

    Attributes:
        config: the run's own.
        step: finished training steps.
        weights: which of the run's weights these are, raw or averaged.
        code: the versions of the program that trained, in order; empty where the checkpoint does not say.
        contents: what the folder is, in words.
    """

    config: Recipe
    step: int
    weights: str
    contents: str
    code: Sequence[str] = ()


def write_card(facts: CardFacts, folder: Path) -> Path:
    """README.md of a finished model folder: huggingface's YAML header, then the text; its path."""
    config = facts.config
    base = resolve_folder(config.policy.folder)
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(lambda name: files(__package__).joinpath(name).read_text("utf-8")),
    )
    text = environment.get_template(f"model_card_{config.recipe}.md.j2").render(
        header=yaml.safe_dump(header(config, base), sort_keys=False, allow_unicode=True).strip(),
        facts=facts,
        config=config,
        base_fingerprint=fingerprint(base, transformer_names(base)),
        config_sha256=hashlib.sha256(to_yaml(config).encode()).hexdigest(),
        written_by=this_code(),
        hashes={str(path.relative_to(folder)): sha256(path) for path in weight_files(folder)},
    )
    (folder / CARD).write_text(text, "utf-8")
    return folder / CARD


def header(config: Recipe, base: Path) -> dict[str, Any]:
    """The card's YAML: what the hub files a model under. The license is the base model's, where its card names one."""
    tags = ["bpgo_video", config.algorithm, *(["lora"] if config.policy.lora.rank else [])]
    task = "image-to-video" if family(base, config.policy.family).takes_images else "text-to-video"
    found: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": task, "tags": tags}
    if not config.policy.folder.startswith((".", "/", "~", "package:")):
        found["base_model"] = config.policy.folder
    card = base / CARD
    parts = card.read_text("utf-8").split("---\n", 2) if card.is_file() else []
    if len(parts) == 3 and not parts[0]:
        given = yaml.safe_load(parts[1])
        found |= {name: given[name] for name in ("license", "license_name", "license_link") if name in given}
    return found


def weight_files(folder: Path) -> list[Path]:
    """safetensors, and the files of a DeepSpeed checkpoint."""
    return sorted(path for kind in ("*.safetensors", "*.pt") for path in folder.rglob(kind))


def sha256(path: Path) -> str:
    """Of a whole file, 64 hex digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
