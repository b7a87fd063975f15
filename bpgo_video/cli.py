"""Command lines: parsers, argument types, --ranks, and errors in one line, printed once on every host."""

from __future__ import annotations

import argparse
import io
import locale
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NoReturn, TypeVar

from bpgo_video.errors import suggestion
from bpgo_video.failures import exit_code, explained, tell, told
from bpgo_video.launching import become_launcher

Number = TypeVar("Number", int, float)
RANKS = "start N ranks on this machine with DeepSpeed's launcher; without it, run as one rank or under a launcher"
EXAMPLE = re.compile(r"^    \S.*(?:\\\n.*)*", re.MULTILINE)  # an indented line and those that continue it


def adapt_to_locale() -> None:
    """Let commands print in any locale: "?" replaces a character that the locale lacks, such as "±".

    Raises:
        SystemExit: the locale cannot decode torch's own files, which are UTF-8; the message says what to set.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        "—".encode().decode(locale.getpreferredencoding(False))
    except UnicodeDecodeError as error:
        sys.exit(f"error: Python reads text files as {error.encoding} here, but torch's are UTF-8: set PYTHONUTF8=1")


class Parser(argparse.ArgumentParser):
    """A parser that suggests the nearest flag for an unknown one and prints errors once on every host.

    The help of a subcommand ends with the examples of the parent's description that use it.

    Attributes:
        more_help: computes the end of --help, where that is slow.
    """

    more_help: Callable[[], str] | None = None

    def __init__(self, *args: Any, examples: Iterable[str] = (), **options: Any) -> None:
        super().__init__(*args, **{"formatter_class": argparse.RawDescriptionHelpFormatter, **options})
        own = [example for example in examples if self.prog.split()[-1] in example.split()]
        self.epilog = self.epilog or "\n".join(["examples:", *own] if own else [])

    def add_subparsers(self, **options: Any) -> Any:  # type: ignore[override]
        options["parser_class"] = partial(Parser, examples=EXAMPLE.findall(self.description or ""))
        return super().add_subparsers(**options)

    def format_help(self) -> str:
        if self.more_help is not None:
            self.epilog = self.more_help()
        return super().format_help()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._subparsers is None and self.get_default("more") is None:
            for word in sys.argv[1:] if args is None else args:
                self._check_flag(word.partition("=")[0])
        return super().parse_known_args(args, namespace)

    def _check_flag(self, flag: str) -> None:
        known = self._option_string_actions
        if not flag.startswith("--") or any(option.startswith(flag) for option in known):
            return
        if "." in flag:
            self.error(f"{flag} is a flag of recipes, which this command does not take; change the recipe instead")
        self.error(f"{flag}: unknown flag{suggestion(flag, known)}; --help lists all")

    def error(self, message: str) -> NoReturn:
        with told():
            super().error(message)


def help_of(name: str, text: str | None, script: str | None = None, ranks: bool = False) -> dict[str, Any]:
    """Name and description of a command's help, as arguments of argparse's parsers and of `load_recipe`.

    Args:
        name: of the subcommand of `bpgo-video`.
        text: the command's docstring: a summary, indented examples, explanations.
        script: the docstring of the repository's script for the command; its examples replace the command's.
        ranks: explain --ranks here, for a command whose parser does not declare it.
    """
    paragraphs = (text or "").strip().split("\n\n")
    if script is not None:
        paragraphs = [script.strip(), *(part for part in paragraphs if not part.startswith("    "))]
    if ranks:
        paragraphs.append(f"--ranks N  {RANKS}.")
    return {"prog": None if script else f"bpgo-video {name}", "description": "\n\n".join(paragraphs)}


def add_ranks(command: argparse.ArgumentParser) -> None:
    """Add --ranks, which `run_command` acts on, and the launcher's own flag."""
    command.add_argument("--ranks", type=positive, metavar="N", help=RANKS)
    command.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # added by the launcher


def launch_if_ranks(module: str, arguments: Sequence[str] | None) -> list[str]:
    """Become the launcher of N ranks of `module` if the arguments hold `--ranks N`; else return the arguments."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--ranks", type=positive)
    known, rest = early.parse_known_args(arguments)
    if known.ranks is not None:
        try:
            become_launcher(module, known.ranks, rest)
        except ValueError as error:
            raise SystemExit(print_error(error)) from None
    return rest


def _number(kind: Callable[[str], Number], rule: str, holds: Callable[[Number], bool]) -> Callable[[str], Number]:
    """An argument's type: a number for which the rule holds."""

    def parse(text: str) -> Number:
        value = kind(text)
        if not (holds(value) and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{value} must be {rule}")
        return value

    parse.__name__ = getattr(kind, "__name__", "number")  # argparse: "invalid int value"
    return parse


positive = _number(int, "1 or more", lambda value: value >= 1)
above_zero = _number(float, "above 0, and finite", lambda value: value > 0)
not_negative = _number(float, "0 or more, and finite", lambda value: value >= 0)


def device(text: str) -> str:
    """An argument's type: a device that torch knows."""
    import torch  # slow, and --help does not need it

    try:
        torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no device; write cpu, cuda or cuda:1") from None
    return text


def print_error(error: Exception) -> int:
    """Print an error that the user can fix, once on every host.

    Returns:
        the exit code: 2 for wrong input, else 1.
    """
    tell(explained(error))
    return exit_code(error)


def show_loading_once() -> None:
    """Hide progress bars of model loading, except on the terminal of rank 0: a log file keeps every redrawn bar."""
    import diffusers  # slow, and --help needs neither
    import transformers

    if os.environ.get("RANK", "0") != "0" or not sys.stderr.isatty():
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()


def run_command(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None, errors: tuple[type[Exception], ...] = ()
) -> int:
    """Call the `run` that the chosen command has set; returns its exit code.

    A command with a default `more` receives unknown arguments there. With the --ranks of `add_ranks`, ranks of the
    parser's `module` start instead.

    Args:
        errors: exceptions that wrong input raises, besides ValueError and OSError; others keep their traceback.
    """
    args, more = parser.parse_known_args(arguments)
    if more and "more" not in args:
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    args.more = more
    if "module" in args and getattr(args, "ranks", None) is not None:
        launch_if_ranks(args.module, arguments)
    expected: tuple[type[Exception], ...] = (ValueError, OSError, *errors)
    try:
        args.run(args)
    except expected as error:
        return print_error(error)
    return 0
