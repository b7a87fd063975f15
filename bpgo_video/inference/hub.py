"""Publishing of an export: its model card, and its upload to the Hugging Face Hub.

The card is a README.md with what was trained, how, by which code, and the weights' hashes. The code is the package's
version and, in a checkout, the git commit. The login is that of huggingface's client: HF_TOKEN, or what `hf auth login`
has stored. HF_ENDPOINT names another hub.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import yaml
from httpx2 import HTTPError
from huggingface_hub import HfApi, get_token, metadata_load
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from bpgo_video.config.bpgo import ConfigError
from bpgo_video.config.reading import to_yaml
from bpgo_video.config.sft import Recipe
from bpgo_video.files import PACKAGE_PREFIX, fingerprint, resolve_folder
from bpgo_video.policies import family
from bpgo_video.policies.networks import transformer_names
from bpgo_video.weights import read_json

CARD = "README.md"
FUSED = "fused.json"  # in a folder that `bpgo-video fuse` wrote, and in exports of runs that started from it
EXPORTED = "A diffusers pipeline with its transformer"
REMEDIES = {  # by HTTP status
    401: "the hub does not accept the login; type `hf auth login`, or set HF_TOKEN",
    403: "the login may not write there; make a token that may at https://huggingface.co/settings/tokens, and type "
    "`hf auth login`",
    404: "the hub has no such organisation, or hides it from this login; check the name, or type `hf auth login`",
}
TEXTS = (".json", ".md", ".txt", ".jinja")  # files that may name folders of this machine


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
        shown=shown,
        config=config,
        base_fingerprint=fingerprint(base, transformer_names(base)),
        fused=read_json(base / FUSED) if (base / FUSED).is_file() else None,
        config_sha256=hashlib.sha256(to_yaml(config).encode()).hexdigest(),
        written_by=this_code(),
        hashes={str(path.relative_to(folder)): sha256(path) for path in weights},
    )
    (folder / CARD).write_text(text, "utf-8")


def header(config: Recipe, base: Path) -> dict[str, Any]:
    """The card's YAML, by which the hub sorts models; the license is that of the base model's card, if there is one."""
    kind = family(base, config.policy.family)
    task = next((f"{one}-to-video" for one in ("video", "image") if getattr(kind, f"takes_{one}s")), "text-to-video")
    tags = ["bpgo_video", config.algorithm, *(["lora"] if config.policy.lora.rank else [])]
    found: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": task, "tags": tags}
    if not (is_local(config.policy.folder) or config.policy.folder.startswith(PACKAGE_PREFIX)):
        found["base_model"] = config.policy.folder
    base_card = metadata_load(base / CARD) or {} if (base / CARD).is_file() else {}
    return found | {name: base_card[name] for name in ("license", "license_name", "license_link") if name in base_card}


def is_local(name: str) -> bool:
    """Whether the name of a model or of shards is a path of this machine."""
    return name.startswith((".", "/", "~")) or Path(name).exists()


def shown(name: str) -> str:
    """A hub id, URL or `package:...` as it is, and the last part of a path: cards name no folders of this machine."""
    return Path(name).name if is_local(name) else name


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


@dataclass(frozen=True)
class Repository:
    """A model repository on the hub.

    Attributes:
        name: ORG/NAME.
        private: create a private one, and refuse an existing public one; False leaves it to the hub.
        revision: branch, which is created if there is none; None is main.
    """

    name: str
    private: bool = False
    revision: str | None = None

    def create(self) -> None:
        """Create the repository and the branch where they do not exist: a wrong login ends here, before long work.

        Raises:
            ConfigError: with the command to type.
        """
        if get_token() is None:
            raise ConfigError(f"{self.name}: there is no login for the hub; type `hf auth login`, or set HF_TOKEN")
        with naming_remedies(self.name):
            hub = HfApi()
            hub.create_repo(self.name, private=self.private or None, exist_ok=True)
            if self.private and not hub.model_info(self.name).private:
                raise ConfigError(f"{self.name} exists and is public; name another repository, or omit --private")
            if self.revision is not None:
                hub.create_branch(self.name, branch=self.revision, exist_ok=True)

    def upload(self, folder: Path, message: str, folders: Sequence[Path]) -> str:
        """Upload every file of a folder; returns the address.

        Args:
            message: of the commit.
            folders: folders of this machine that no uploaded text may name; the home directory is another.

        Raises:
            ConfigError: with the command to type; the folder stays.
        """
        branch = f" --revision {self.revision}" if self.revision else ""
        again = f"the export is complete, `hf upload {self.name} {folder}{branch}` uploads it"
        private = [str(one) for one in folders] + [f"{home}/" for home in [os.path.expanduser("~")] if len(home) > 1]
        for file in (path for path in sorted(folder.rglob("*")) if path.suffix in TEXTS):
            if found := [word for word in private if word in file.read_text("utf-8")]:
                raise ConfigError(f"{file} names {found[0]}, and nothing was uploaded; remove it there; {again}")
        with naming_remedies(self.name, f"; {again}"):
            commit = HfApi().upload_folder(
                repo_id=self.name, folder_path=folder, revision=self.revision, commit_message=message
            )
        return f"{commit.repo_url}/tree/{self.revision or 'main'}"


@contextmanager
def naming_remedies(name: str, after: str = "; then repeat the command") -> Iterator[None]:
    """Turn the client's errors into ConfigErrors of one sentence, which ends with `after`."""
    try:
        yield
    except OfflineModeIsEnabled:
        raise ConfigError(f"{name}: HF_HUB_OFFLINE forbids the network; set HF_HUB_OFFLINE=0{after}") from None
    except (HTTPError, RuntimeError) as error:  # RuntimeError: of the client's upload of large files
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else 0
        reason = REMEDIES.get(status, " ".join(str(cause).split()))
        raise ConfigError(f"{name}: {reason}{after}") from error
