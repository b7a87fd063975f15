"""How does a tool meet its user? Errors that can be mended are told in one line, once on every host."""

from __future__ import annotations

import argparse
import difflib
import io
import locale
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors="replace")  # in a locale without "±" a table shows "?" there, and the command goes on
try:
    "—".encode().decode(locale.getpreferredencoding(False))
except UnicodeDecodeError as error:  # torch reads files of its own that are UTF-8 in whatever the locale says
    sys.exit(f"error: Python reads text files as {error.encoding} here, which torch's are not: set PYTHONUTF8=1")


class Parser(argparse.ArgumentParser):
    """A parser that names a misspelt flag, with the nearest, before it misses another; told once on every host.

    Attributes:
        more_help: what stands at the end of --help, where it takes long to come by.
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
    """Whether this rank is the first of its host: hosts may have logs of their own."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def tell(error: Exception) -> int:
    """Print an error that the user can mend, once on every host.

    Returns:
        the exit code: 2 where the configuration is wrong, else 1.
    """
    if speaks():
        print(f"error: {error}", file=sys.stderr, flush=True)
    return int(getattr(error, "exit_code", 1))


def show_loading_once() -> None:
    """Bars of model loading on one rank, and none in a log file, which would keep every carriage return."""
    import diffusers  # heavy, and a tool's --help needs neither
    import transformers

    if os.environ.get("RANK", "0") != "0" or not sys.stderr.isatty():
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()


def run_command(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> int:
    """Call the `run` that the chosen command has set; its exit code.

    A command that sets `more` is given the arguments that are not its own there.
    """
    args, more = parser.parse_known_args(arguments)
    if more and "more" not in args:
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    args.more = more
    try:
        args.run(args)
    except (ValueError, OSError) as error:  # what wrong input raises; anything else is a defect and keeps its traceback
        return tell(error)
    return 0
