"""Command lines: flags over a recipe's values, or flags alone, with the checks and messages of YAML.

bpgo-video train --config tiny_wan_bpgo --run.num-steps 20
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar, get_type_hints

import tyro
from pydantic import TypeAdapter, ValidationError
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

from bpgo_video.cli import print_error, prints_for_host
from bpgo_video.config.bpgo import Config, ConfigError
from bpgo_video.config.learner import RewardConfig
from bpgo_video.config.reading import KINDS, check_kind, config_from_dict, explain, read_recipe
from bpgo_video.config.sft import Recipe

Settings = TypeVar("Settings")

SHOWN = SimpleNamespace(rewards={"NAME": RewardConfig(model="clip_score")})  # in `--help` without a recipe
CONFIG_HELP = (
    "--config FILE  the recipe (required), or the name of a shipped one (bpgo-video recipes); the flags below change "
    "its values. With --config the defaults shown are "
    "that recipe's, and the flags those of its kind (bpgo, sft). A recipe may name another as `base:`."
)
PLAIN = ConstructorRegistry()


@PLAIN.struct_rule
def _plain(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Flags become plain data, as YAML does, and are checked as it is."""
    if not dataclasses.is_dataclass(info.type):
        return None
    hints = get_type_hints(info.type, include_extras=True)
    fields = (
        StructFieldSpec(
            field.name, hints[field.name], _default(field, info.default), _help(info.type, field.name, hints)
        )
        for field in dataclasses.fields(info.type)
    )
    return StructConstructorSpec(dict, tuple(fields))


def _help(tree: type, name: str, hints: Mapping[str, Any]) -> str:
    """The docstring of a field where it is declared, or of the section that it holds; empty where there is none."""
    owners = (vars(owner).get("__pydantic_fields__", {}) for owner in tree.__mro__)
    texts = [fields[name].description for fields in owners if name in fields]
    section = hints[name].__doc__ if dataclasses.is_dataclass(hints[name]) else None
    return " ".join(next(filter(None, (*texts, section)), "").split())


def _default(field: dataclasses.Field[Any], whole: Any) -> Any:
    """A field's value in the settings that flags change, or its own where those lack it."""
    if hasattr(whole, field.name):
        return getattr(whole, field.name)
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return tyro.MISSING if field.default is dataclasses.MISSING else field.default


def _parse(tree: type, args: Sequence[str], default: Any, **shown: Any) -> tuple[dict[str, Any], list[str]]:
    """Plain data of `tree`, and the words that belong to no flag; of several ranks on a host one speaks."""
    data, unknown = tyro.cli(
        tree,
        args=args,
        default=default,
        return_unknown_args=True,
        config=(tyro.conf.AvoidSubcommands,),  # of None or a mapping
        registry=PLAIN,
        console_outputs=prints_for_host(),
        **shown,
    )
    return data, unknown


def read_settings(
    tree: type[Settings], args: Sequence[str], prog: str | None = None, description: str | None = None
) -> Settings:
    """Flat settings of flags alone.

    Raises:
        ConfigError: an unknown flag, or a value out of range.
    """
    data, unknown = _parse(tree, args, tyro.MISSING, prog=prog, description=examples_apart(description))
    if unknown:
        flags = {f"--{field.name.replace('_', '-')}": field.default for field in dataclasses.fields(tree)}  # type: ignore[arg-type]
        raise ConfigError(_explain_flags(unknown, flags, args))
    try:
        return TypeAdapter(tree).validate_python(data)
    except ValidationError as error:
        raise ConfigError(explain(error, "command line", tree)) from None


def examples_apart(description: str | None) -> str:
    """Indented lines as paragraphs of their own: tyro joins neighbouring lines."""
    return re.sub("\n+    ", "\n\n    ", description or "")


def load_config(argv: Sequence[str] | None = None, description: str | None = None, prog: str | None = None) -> Config:
    """`load_recipe` of kind bpgo; exits with code 2 and a message if it is of another."""
    config = load_recipe(argv, description, prog, kind="bpgo")
    assert isinstance(config, Config)
    return config


def load_recipe(
    argv: Sequence[str] | None = None,
    description: str | None = None,
    prog: str | None = None,
    kind: str | None = None,
) -> Recipe:
    """The configuration of a command line: `--config FILE`, then dotted flags over it.

    The file's `recipe` decides which flags exist; without a file, `--help` shows those of `kind`, or of bpgo. The
    launcher's `--local_rank` is ignored. Exits with code 2 and a message, once on every host, where something is wrong.

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
    shown = {"prog": prog, "description": f"{examples_apart(description)}\n\n{CONFIG_HELP}".strip()}
    try:
        if known.config is None and {"-h", "--help"} & set(rest):
            _parse(KINDS[kind or "bpgo"].tree, rest, SHOWN, **shown)
        if known.config is None:
            raise ConfigError("--config FILE is required, for example --config tiny_wan_bpgo")
        recipe = read_recipe(known.config)
        if kind is not None:
            check_kind(recipe, kind, str(known.config))
        data, unknown = _parse(type(recipe), rest, recipe, **shown)
        if unknown:
            raise ConfigError(_explain_flags(unknown, dict(_flags(recipe)), rest))
        return config_from_dict(data, "command line")
    except ConfigError as error:
        raise SystemExit(print_error(error)) from None


def _flags(node: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The flag and the value of everything in a tree."""
    if dataclasses.is_dataclass(node):
        children = {field.name: getattr(node, field.name) for field in dataclasses.fields(node)}
    elif isinstance(node, dict) and node:
        children = node
    else:
        yield f"--{name}", node
        return
    for key, child in children.items():
        yield from _flags(child, f"{name}.{key.replace('_', '-')}".lstrip("."))


def _explain_flags(unknown: Sequence[str], known: Mapping[str, Any], args: Sequence[str]) -> str:
    """What is wrong with the words of `args` that no flag takes; a value after an unknown flag belongs to it."""
    flags = [word.partition("=")[0] for word in unknown if word.startswith("--")]
    lines = []
    for flag in flags:
        near = difflib.get_close_matches(flag, known, n=1, cutoff=0.6)
        lines.append(f"{flag}: unknown flag{f'; perhaps you meant {near[0]}' if near else ''}; --help lists all")
    if not flags:
        lines.append(_explain_word(unknown[0], args[: args.index(unknown[0])], known))
    return "\n  ".join(["command line:", *lines])


def _explain_word(word: str, before: Sequence[str], known: Mapping[str, Any]) -> str:
    """Why a word has no flag: it follows a switch, or a value."""
    flag = before[-1].replace("_", "-").replace(".no-", ".") if before else ""
    if isinstance(known.get(flag), bool):
        off = ".no-".join(flag.rsplit(".", 1))
        return f"{word!r} belongs to no flag; switches take no value: write {flag} or {off}"
    return f"{word!r} belongs to no flag; --help lists all"
