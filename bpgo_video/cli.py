"""How does a tool meet its user? Errors that can be mended are told in one line, once on every host."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence


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
