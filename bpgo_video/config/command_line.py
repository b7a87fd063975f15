"""Command lines: flags that change a recipe's values, or flags alone, with the checks and messages of YAML.

bpgo-video train --config tiny_wan_bpgo --run.num-steps 20
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar, get_type_hints

import tyro
from pydantic import TypeAdapter, ValidationError
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

from bpgo_video.cli import print_error
from bpgo_video.config.bpgo import Config, ConfigError
from bpgo_video.config.fields import explain
from bpgo_video.config.learner import RewardConfig
from bpgo_video.config.reading import TREES, check_kind, config_from_dict, read_recipe
from bpgo_video.config.sft import Recipe
from bpgo_video.errors import suggestion
from bpgo_video.failures import told

Settings = TypeVar("Settings")

EXAMPLE = SimpleNamespace(rewards={"NAME": RewardConfig(model="clip_score")})  # shown by --help without a recipe
CONFIG_HELP = (
    "--config FILE  the recipe (required), or the name of a shipped one (bpgo-video recipes); the flags below change "
    "its values. With --config, the flags and the defaults are those of that recipe and its kind (bpgo, sft). A recipe "
    "may name another one as `base:`."
)
PLAIN_DATA = ConstructorRegistry()


@PLAIN_DATA.struct_rule
def _as_plain_data(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Turn the flags of a section into a dictionary, which is then checked as YAML is."""
    if not dataclasses.is_dataclass(info.type):
        return None
    hints = get_type_hints(info.type, include_extras=True)
    specs = []
    for field in dataclasses.fields(info.type):
        if hasattr(info.default, field.name):  # the recipe's value
            default = getattr(info.default, field.name)
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        else:
            default = tyro.MISSING if field.default is dataclasses.MISSING else field.default
        help_text = _help(info.type, field.name, hints[field.name])
        specs.append(StructFieldSpec(field.name, hints[field.name], default, help_text))
    return StructConstructorSpec(dict, tuple(specs))


def _help(tree: type, name: str, hint: Any) -> str:
    """The docstring of a field in the class that declares it, or else of the section that it holds."""
    owners = (vars(owner).get("__pydantic_fields__", {}) for owner in tree.__mro__)
    texts = [fields[name].description for fields in owners if name in fields]
    section = hint.__doc__ if dataclasses.is_dataclass(hint) else None
    return " ".join(next(filter(None, (*texts, section)), "").split())


def _parse(tree: type, args: Sequence[str], default: Any, **shown: Any) -> tuple[dict[str, Any], list[str]]:
    """Plain data of `tree`, and the words that belong to no flag. One rank of a host prints."""
    with told():
        data, unknown = tyro.cli(
            tree,
            args=args,
            default=default,
            return_unknown_args=True,
            config=(tyro.conf.AvoidSubcommands,),  # for unions with None or a mapping
            registry=PLAIN_DATA,
            **shown,
        )
    return data, unknown


def read_settings(
    tree: type[Settings], args: Sequence[str], prog: str | None = None, description: str | None = None
) -> Settings:
    """Settings without sections, from flags alone.

    Raises:
        ConfigError: an unknown flag, or a value out of range.
    """
    data, unknown = _parse(tree, args, tyro.MISSING, prog=prog, description=_separate_examples(description))
    if unknown:
        flags = {f"--{field.name.replace('_', '-')}": field.default for field in dataclasses.fields(tree)}  # type: ignore[arg-type]
        raise ConfigError(_explain_words(unknown, flags, args))
    try:
        return TypeAdapter(tree).validate_python(data)
    except ValidationError as error:
        raise ConfigError(explain(error, "command line", tree)) from None


def _separate_examples(description: str | None) -> str:
    """Make paragraphs of indented lines: tyro joins neighbouring lines."""
    return re.sub("\n+    ", "\n\n    ", description or "")


def load_config(argv: Sequence[str] | None = None, description: str | None = None, prog: str | None = None) -> Config:
    """`load_recipe` of kind bpgo; exits with code 2 and a message if it is of another kind."""
    config = load_recipe(argv, description, prog, kind="bpgo")
    assert isinstance(config, Config)
    return config


def load_recipe(
    argv: Sequence[str] | None = None,
    description: str | None = None,
    prog: str | None = None,
    kind: str | None = None,
) -> Recipe:
    """The recipe of a command line: `--config FILE`, then dotted flags that change its values.

    The file's `recipe` decides which flags exist; without a file, `--help` shows those of `kind`, or of bpgo. The
    launcher's `--local_rank` is ignored. On an error it exits with code 2 and a message, once on every host.

    Args:
        description: of the command, in its `--help`.
        prog: name of the command there.
        kind: refuse a recipe of another kind, before its flags are read.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", type=Path)
    early.add_argument("--local_rank", type=int)
    known, rest = early.parse_known_args(argv)
    shown = {"prog": prog, "description": f"{_separate_examples(description)}\n\n{CONFIG_HELP}".strip()}
    try:
        if known.config is None and {"-h", "--help"} & set(rest):
            _parse(TREES[kind or "bpgo"], rest, EXAMPLE, **shown)
        if known.config is None:
            raise ConfigError("--config FILE is required, for example --config tiny_wan_bpgo")
        recipe = read_recipe(known.config)
        if kind is not None:
            check_kind(recipe, kind, str(known.config))
        data, unknown = _parse(type(recipe), rest, recipe, **shown)
        if unknown:
            raise ConfigError(_explain_words(unknown, dict(_flags(recipe)), rest))
        return config_from_dict(data, "command line")
    except ConfigError as error:
        raise SystemExit(print_error(error)) from None


def _flags(node: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Each flag of a recipe, with its value."""
    if dataclasses.is_dataclass(node):
        children = {field.name: getattr(node, field.name) for field in dataclasses.fields(node)}
    elif isinstance(node, dict) and node:
        children = node
    else:
        yield f"--{name}", node
        return
    for key, child in children.items():
        yield from _flags(child, f"{name}.{key.replace('_', '-')}".lstrip("."))


def _explain_words(unknown: Sequence[str], known: Mapping[str, Any], args: Sequence[str]) -> str:
    """Why words of `args` belong to no flag; a value after an unknown flag needs no line of its own."""
    lines = []
    for flag in (word.partition("=")[0] for word in unknown if word.startswith("--")):
        lines.append(f"{flag}: unknown flag{suggestion(flag, known)}; --help lists all")
    if not lines:
        word = unknown[0]
        before = args[: args.index(word)]
        flag = before[-1].replace("_", "-").replace(".no-", ".") if before else ""
        reason = "--help lists all"
        if isinstance(known.get(flag), bool):
            reason = f"switches take no value: write {flag} or {'.no-'.join(flag.rsplit('.', 1))}"
        lines.append(f"{word!r} belongs to no flag; {reason}")
    return "\n  ".join(["command line:", *lines])
