"""Command lines: flags that change a recipe's values, or flags alone, with the checks and messages of YAML.

bpgo-video train tiny_wan_bpgo --run.num-steps 20
"""

from __future__ import annotations

import argparse
import dataclasses
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import redirect_stderr, redirect_stdout, suppress
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn, TypeVar, get_type_hints

import tyro
from pydantic import TypeAdapter, ValidationError
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

from bpgo_video.cli import RANKS, print_error, print_note
from bpgo_video.config.bpgo import Config, ConfigError
from bpgo_video.config.fields import explain
from bpgo_video.config.learner import RewardConfig
from bpgo_video.config.reading import TREES, check_kind, config_from_dict, read_written
from bpgo_video.config.sft import Recipe
from bpgo_video.errors import InputError, likely, meant, shown

Settings = TypeVar("Settings")

EXAMPLE = SimpleNamespace(rewards={"NAME": RewardConfig(model="clip_score")})  # shown by --help without a recipe
HELP_ORDER = ("run", "data", "policy", "video", "optim", "rewards", "rollout", "sampler", "loss", "bpgo", "prior")
COMMON = ("--ranks", "--config", "--verbose")  # flags of every command that runs on ranks
COMMON_HELP = f"""--ranks N   {RANKS}
--verbose   show what DeepSpeed and its launcher log"""
RECIPE_HELP = f"""RECIPE      a YAML file, or the name of a shipped recipe (bpgo-video recipes); also as --config RECIPE
{COMMON_HELP}

Each key of a recipe is a flag below. With a RECIPE, --help shows its values and the flags of its kind, bpgo or sft."""
PLAIN_DATA = ConstructorRegistry()


@PLAIN_DATA.struct_rule
def _as_plain_data(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Turn the flags of a section into a dictionary, which is then checked as YAML is."""
    if not dataclasses.is_dataclass(info.type):
        return None
    hints = get_type_hints(info.type, include_extras=True)
    specs = []
    order = {name: place for place, name in enumerate(HELP_ORDER)}
    for field in sorted(dataclasses.fields(info.type), key=lambda field: order.get(field.name, len(order))):
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


def _parse(tree: type, args: Sequence[str], default: Any) -> tuple[dict[str, Any], list[str]]:
    """Plain data of `tree`, and the words that belong to no flag. Raises ConfigError for a value of another type."""
    try:
        with redirect_stderr(io.StringIO()) as printed:
            data, unknown = tyro.cli(
                tree,
                args=args,
                default=default,
                return_unknown_args=True,
                config=(tyro.conf.AvoidSubcommands,),  # for unions with None or a mapping
                registry=PLAIN_DATA,
            )
    except SystemExit as stopped:
        if not stopped.code:
            raise  # --help
        raise ConfigError(f"command line: {_boxed(printed.getvalue())}; --help explains it") from None
    return data, unknown


def _boxed(text: str) -> str:
    """The first paragraph in the box that tyro prints; of required options, which explain themselves, the names."""
    lines = [line.strip("│|\n ") for line in text.splitlines()[1:]]
    parts = (list(part) for is_text, part in groupby(lines, lambda line: bool(line.strip("─-╰╯+"))) if is_text)
    first = next(parts, [""])
    if first[0].startswith("Missing from"):
        return f"required, and not given: {', '.join(line.split()[0] for line in first if line.startswith('--'))}"
    return shown(" ".join(first).removeprefix("Error parsing "), quoted=False)


def _show_help(tree: type, default: Any, usage: str, description: str) -> NoReturn:
    """Print usage and description as they are, then a table of flags for each section, and exit."""
    print(f"usage: {usage}\n\n{description}\n")
    with redirect_stdout(io.StringIO()) as shown, suppress(SystemExit):
        _parse(tree, ["--help"], default)
    tables = shown.getvalue().partition("\n\n")[2]  # after tyro's usage
    print("\n".join(line.rstrip() for line in tables.splitlines()))
    raise SystemExit(0)


def read_settings(tree: type[Settings], args: Sequence[str], prog: str, description: str = "") -> Settings:
    """Settings without sections, from flags alone.

    Raises:
        ConfigError: an unknown flag, or a value out of range.
    """
    if {"-h", "--help"} & set(args):
        _show_help(tree, tyro.MISSING, f"{prog} FLAGS", f"{description}\n\n{COMMON_HELP}")
    data, unknown = _parse(tree, args, tyro.MISSING)
    flags = {f"--{field.name.replace('_', '-')}": field.default for field in dataclasses.fields(tree)}  # type: ignore[arg-type]
    if unknown:
        raise ConfigError(_explain_words(unknown, flags, args))
    try:
        return TypeAdapter(tree).validate_python(data)
    except ValidationError as error:
        raise ConfigError(explain(error, "command line", tree)) from None


def load_config(words: Sequence[str], prog: str = "", description: str = "") -> Config:
    """`load_recipe` of kind bpgo; exits with code 2 and a message if it is of another kind."""
    config = load_recipe(words, prog, description, kind="bpgo")
    assert isinstance(config, Config)
    return config


def load_recipe(
    words: Sequence[str],
    prog: str = "",
    description: str = "",
    kind: str | None = None,
    report: Callable[[str], None] = print_note,
) -> Recipe:
    """The recipe of a command line: a first word or `--config` names it, dotted flags change its values.

    The file's `recipe` decides which flags exist; without a file, `--help` shows those of `kind`, or of bpgo. On an
    error it exits with code 2 and a message, once on every host.

    Args:
        prog: name of the command in its `--help`.
        description: of the command there.
        kind: refuse a recipe of another kind, before its flags are read.
        report: receives a line for each value of a shipped recipe that a method replaces.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", type=Path)
    known, rest = early.parse_known_args(recipe_as_flag(words))
    try:
        recipe, written = (None, set()) if known.config is None else read_written(known.config)
        if recipe is not None and kind is not None:
            check_kind(recipe, kind, str(known.config))
        if {"-h", "--help"} & set(rest):
            tree = type(recipe) if recipe else TREES[kind or "bpgo"]
            _show_help(tree, recipe or EXAMPLE, f"{prog} RECIPE [FLAGS]", f"{description}\n\n{RECIPE_HELP}")
        if recipe is None:
            raise ConfigError("a recipe is required as the first word, for example tiny_wan_bpgo; --help explains it")
        return apply_flags(recipe, rest, written, report)
    except (InputError, OSError) as error:
        raise SystemExit(print_error(error)) from None


def apply_flags(
    recipe: Recipe,
    words: Sequence[str],
    written: AbstractSet[str] = frozenset(),
    report: Callable[[str], None] = lambda _: None,
) -> Recipe:
    """The recipe with the values of dotted flags; see `config_from_dict`.

    Raises:
        ConfigError: an unknown flag, a value out of range, or values that do not go together.
    """
    data, unknown = _parse(type(recipe), words, recipe)
    if unknown:
        raise ConfigError(_explain_words(unknown, dict(_flags(recipe)), words))
    flags = [word.partition("=")[0].removeprefix("--") for word in words if word.startswith("--")]
    given = {flag.replace("-", "_").replace(".no_", ".") for flag in flags}
    return config_from_dict(data, "command line", written | given, report)


def recipe_as_flag(words: Sequence[str]) -> list[str]:
    """A command line with `--config RECIPE` where the recipe is the first word."""
    return ["--config", *words] if words and not words[0].startswith("-") else list(words)


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
        lines.append(f"{flag}: unknown flag{meant(likely(flag, [*known, *COMMON]))}; --help lists all")
    if not lines:
        word = unknown[0]
        before = args[: args.index(word)]
        flag = before[-1].replace("_", "-").replace(".no-", ".") if before else ""
        reason = "--help lists all"
        if isinstance(known.get(flag), bool):
            reason = f"switches take no value: write {flag} or {'.no-'.join(flag.rsplit('.', 1))}"
        lines.append(f"{word!r} belongs to no flag; {reason}")
    return "\n  ".join(["command line:", *lines])
