"""Command lines: help, --ranks, and errors of the user's input in one line, once on every host."""

from __future__ import annotations

import argparse
import difflib
import io
import locale
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from bpgo_video.launching import become_launcher

RANKS = "start N ranks on this machine with DeepSpeed's launcher; without it this process is one rank, or a launcher's"


def adapt_to_locale() -> None:
    """Let commands print in any locale: a table shows "?" for a character that the locale lacks, such as "±".

    Raises:
        SystemExit: torch could not read its own files, which are UTF-8; the message says what to set.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        "—".encode().decode(locale.getpreferredencoding(False))
    except UnicodeDecodeError as error:
        sys.exit(f"error: Python reads text files as {error.encoding} here, and torch's are UTF-8: set PYTHONUTF8=1")


class Parser(argparse.ArgumentParser):
    """A parser that names a misspelt flag, with the nearest, before it misses another; once on every host.

    Attributes:
        more_help: the end of --help, where it is slow to compute.
    """

    more_help: Callable[[], str] | None = None

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
            self.error(f"{flag} is a flag of recipes, and this command takes none of those; change it in the recipe")
        near = difflib.get_close_matches(flag, known, n=1)
        self.error(f"{flag}: unknown flag{f'; perhaps you meant {near[0]}' if near else ''}; --help lists all")

    def error(self, message: str) -> NoReturn:
        if not speaks():
            self.exit(2)
        super().error(message)


def shown_as(name: str, text: str | None, script: str | None = None, ranks: bool = False) -> dict[str, Any]:
    """How a command presents itself in its help: arguments of argparse's parsers, and of `load_recipe`.

    Args:
        name: of the subcommand of `bpgo-video`.
        text: the command's docstring: a line, indented examples, explanations.
        script: the docstring of a script of the clone that runs the command; its examples replace the command's.
        ranks: the help lists no flags of the command's own, so that --ranks is explained here.
    """
    paragraphs = (text or "").strip().split("\n\n")
    if script is not None:
        paragraphs = [script.strip(), *(part for part in paragraphs if not part.startswith("    "))]
    if ranks:
        paragraphs.append(f"--ranks N  {RANKS}.")
    return {"prog": None if script else f"bpgo-video {name}", "description": "\n\n".join(paragraphs)}


def add_ranks(command: argparse.ArgumentParser) -> None:
    """The flags of a command that runs on several ranks; `run_command` acts on them."""
    command.add_argument("--ranks", type=positive, metavar="N", help=RANKS)
    command.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher adds it


def on_ranks(module: str, arguments: Sequence[str] | None) -> list[str]:
    """The arguments without `--ranks N`. With it this process becomes the launcher of N ranks of `module`."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--ranks", type=positive)
    known, rest = early.parse_known_args(arguments)
    if known.ranks is not None:
        try:
            become_launcher(module, known.ranks, rest)
        except ValueError as error:
            raise SystemExit(tell(error)) from None
    return rest


def device(text: str) -> str:
    """An argument's type: what torch knows as a device."""
    import torch  # heavy, and --help does not need it

    try:
        torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no device; cpu, cuda or cuda:1") from None
    return text


def positive(text: str) -> int:
    """An argument's type: an integer of 1 or more."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} must be 1 or more")
    return value


def above_zero(text: str) -> float:
    """An argument's type: a finite number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{value} must be above 0, and finite")
    return value


def not_negative(text: str) -> float:
    """An argument's type: a finite number of 0 or more."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{value} must be 0 or more, and finite")
    return value


def speaks() -> bool:
    """Whether this rank prints for its host: hosts may have logs of their own."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def tell(error: Exception) -> int:
    """Print an error that the user can fix, once on every host.

    Returns:
        the exit code: 2 where the configuration is wrong, else 1.
    """
    if speaks():
        print(f"error: {error}", file=sys.stderr, flush=True)
    return int(getattr(error, "exit_code", 1))


def show_loading_once() -> None:
    """Show model loading on one rank, and not in a log file, which would keep every carriage return."""
    import diffusers  # heavy, and a tool's --help needs neither
    import transformers

    if os.environ.get("RANK", "0") != "0" or not sys.stderr.isatty():
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()


def run_command(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> int:
    """Call the `run` that the chosen command has set; its exit code.

    A command that sets `more` receives the arguments that are not its own there. With --ranks of `add_ranks`, ranks of
    the parser's `module` start instead.
    """
    args, more = parser.parse_known_args(arguments)
    if more and "more" not in args:
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    args.more = more
    if "module" in args and getattr(args, "ranks", None) is not None:
        on_ranks(args.module, arguments)
    try:
        args.run(args)
    except (ValueError, OSError) as error:  # what wrong input raises; anything else is a defect and keeps its traceback
        return tell(error)
    return 0
