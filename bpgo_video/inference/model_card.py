"""Model card of a model folder: a README.md with what was trained, how, by which code, and the weights' hashes.

The code is the package's version and, in a checkout, the git commit.
"""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import metadata_load

from bpgo_video.config.reading import to_yaml
from bpgo_video.config.sft import Recipe
from bpgo_video.data.fingerprint import fingerprint
from bpgo_video.files import resolve_folder
from bpgo_video.policies import family
from bpgo_video.policies.networks import transformer_names

CARD = "README.md"
EXPORTED = "A diffusers pipeline with its transformer"


@dataclass(frozen=True)
class CardFacts:
    """Facts for a model card.

    Attributes:
        config: the run's recipe.
        step: number of finished training steps.
        weights: raw, or ema for their average.
        contents: description of the folder.
        code: versions of the program that trained, in order; empty if the checkpoint does not name them.
    """

    config: Recipe
    step: int
    weights: str
    contents: str
    code: Sequence[str] = ()


def write_card(facts: CardFacts, folder: Path) -> None:
    """Write README.md into a finished model folder: the hub's YAML header, then the text."""
    config = facts.config
    base = resolve_folder(config.policy.folder)
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(lambda name: files(__package__).joinpath(name).read_text("utf-8")),
    )
    weights = sorted(path for kind in ("*.safetensors", "*.pt") for path in folder.rglob(kind))
    text = environment.get_template(f"model_card_{config.recipe}.md.j2").render(
        header=yaml.safe_dump(header(config, base), sort_keys=False, allow_unicode=True).strip(),
        facts=facts,
        config=config,
        base_fingerprint=fingerprint(base, transformer_names(base)),
        config_sha256=hashlib.sha256(to_yaml(config).encode()).hexdigest(),
        written_by=this_code(),
        hashes={str(path.relative_to(folder)): sha256(path) for path in weights},
    )
    (folder / CARD).write_text(text, "utf-8")


def header(config: Recipe, base: Path) -> dict[str, Any]:
    """The card's YAML, by which the hub sorts models; the license is that of the base model's card, if there is one."""
    task = "image-to-video" if family(base, config.policy.family).takes_images else "text-to-video"
    tags = ["bpgo_video", config.algorithm, *(["lora"] if config.policy.lora.rank else [])]
    found: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": task, "tags": tags}
    if not config.policy.folder.startswith((".", "/", "~", "package:")):
        found["base_model"] = config.policy.folder
    base_card = metadata_load(base / CARD) or {} if (base / CARD).is_file() else {}
    return found | {name: base_card[name] for name in ("license", "license_name", "license_link") if name in base_card}


def sha256(path: Path) -> str:
    """64 hex digits of a whole file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@cache
def this_code() -> str:
    """`bpgo_video 0.1.0, commit 6f1c...`, or `6f1c...-dirty` if files differ from the commit.

    Call it when a run starts: the result is cached, and later changes of the checkout do not affect the run.
    """
    found = commit(Path(__file__))
    return f"bpgo_video {version('bpgo-video')}" + (f", commit {found}" if found else "")


def commit(file: Path) -> str | None:
    """The commit of the checkout that tracks a file; None if git does not track it or is not installed."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.parent), *arguments]
        return subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)  # an environment may be inside a checkout of something else
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):  # OSError also if PATH names folders that this user may not read
        return None
