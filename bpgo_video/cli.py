"""Command lines: parsers, argument types, --ranks, and errors in one line, printed once on every host.

Nothing here imports torch: --help and errors in flags take no second.
"""

from __future__ import annotations

import argparse
import io
import locale
import logging
import math
import os
import re
import shlex
import socket
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from bpgo_video.errors import exit_code, explained, likely, meant, shown, tell, told

Number = TypeVar("Number", int, float)
RANKS = "start N ranks on this machine with DeepSpeed's launcher (one rank, or those of a launcher)"
DEVICE = re.compile(r"(cpu|cuda|hpu|mps|npu|xpu)(:\d+)?")
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
            self.epilog, self.more_help = f"{self.epilog}\n\n{self.more_help()}".strip(), None
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
        self.error(f"{flag}: unknown flag{meant(likely(flag, known))}; --help lists all")

    def error(self, message: str) -> NoReturn:
        with told():
            super().error(message)


def help_of(name: str, text: str | None, script: str | None = None) -> dict[str, Any]:
    """Name and description of a command's help, as arguments of argparse's parsers and of `load_recipe`.

    Args:
        name: of the subcommand of `bpgo-video`.
        text: the command's docstring: a summary, indented examples, explanations.
        script: the docstring of the repository's script for the command; its examples replace the command's.
    """
    paragraphs = (text or "").strip().split("\n\n")
    if script is not None:
        paragraphs = [script.strip(), *(part for part in paragraphs if not part.startswith("    "))]
    prog = Path(sys.argv[0]).name if script else f"bpgo-video {name}"
    return {"prog": prog, "description": "\n\n".join(paragraphs)}


def add_ranks(command: argparse.ArgumentParser) -> None:
    """Add --ranks, which `run_command` acts on."""
    command.add_argument("--ranks", type=positive, metavar="N", help=RANKS)


def without_common_flags(words: Sequence[str]) -> list[str]:
    """A command line without the launcher's --local_rank=N, which RANK replaces, and --verbose, which acts here."""
    if "--verbose" in words:
        logging.getLogger("DeepSpeed").filters.clear()
    return [word for word in words if word != "--verbose" and not re.match("--local[_-]rank=", word)]


def split_ranks(words: Sequence[str]) -> tuple[int | None, list[str]]:
    """The N of `--ranks N`, if it is there, and the other words."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--ranks", type=positive)
    known, rest = early.parse_known_args(words)
    return known.ranks, rest


def free_port() -> int:
    """A free TCP port of this machine; the launcher's default port is the same for all jobs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def become_launcher(command: str, ranks: int, words: Sequence[str], restarts: int = 0, run_dir: str = "") -> NoReturn:
    """Replace this process with DeepSpeed's launcher of one machine, which runs a command on `ranks` ranks.

    The exit code is the launcher's. If OMP_NUM_THREADS is not set, the ranks share the machine's cores.

    Args:
        restarts: how often ranks that failed start again without progress in the checkpoints of `run_dir`.

    Raises:
        ValueError: this process already is a rank.
    """
    if "RANK" in os.environ:
        raise ValueError(
            f"--ranks {ranks} starts a launcher, but this process already is rank {os.environ['RANK']} of one; "
            "leave out --ranks"
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // ranks)))
    quiet, verbose = (["--log_level=critical"], []) if logging.getLogger("DeepSpeed").filters else ([], ["--verbose"])
    module = ["supervisor", str(restarts), run_dir] if restarts else ["launcher"]
    launcher = ["-m", f"bpgo_video.distributed.{module[0]}", *module[1:]]
    launcher += [str(ranks), *quiet, f"--master_port={free_port()}"]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *launcher, "--module", "bpgo_video", *verbose, command, *words])


def typed(command: str, words: Sequence[str]) -> str:
    """The line to type for a command with these arguments, on as many ranks as run now."""
    world = os.environ.get("WORLD_SIZE", "1")
    local = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", world))  # torchrun's, deepspeed's
    if world != local:
        return f"deepspeed --hostfile HOSTS --module bpgo_video {command} {shlex.join(words)}"
    return f"bpgo-video {command} {shlex.join(words)}" + (f" --ranks {world}" if world != "1" else "")


def _number(kind: Callable[[str], Number], rule: str, holds: Callable[[Number], bool]) -> Callable[[str], Number]:
    """An argument's type: a number for which the rule holds."""

    def parse(text: str) -> Number:
        try:
            value = kind(text)
        except ValueError:
            name = {int: "a whole number", float: "a number"}.get(kind, "a number")  # type: ignore[call-overload]
            raise argparse.ArgumentTypeError(f"{shown(text)} is not {name}") from None
        if not (holds(value) and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{value} must be {rule}")
        return value

    return parse


positive = _number(int, "1 or more, and at most 1,000,000", lambda value: 1 <= value <= 10**6)
samples = _number(int, "1 or more, and at most 10,000", lambda value: 1 <= value <= 10**4)
port = _number(int, "from 0 to 65535", lambda value: 0 <= value < 2**16)
above_zero = _number(float, "above 0, and finite", lambda value: value > 0)
share = _number(float, "0 or more, and below 1", lambda value: 0 <= value < 1)
above_zero_share = _number(float, "above 0, and at most 1", lambda value: 0 < value <= 1)
not_negative = _number(float, "0 or more, and finite", lambda value: value >= 0)


def device(text: str) -> str:
    """An argument's type: a device of torch."""
    if not DEVICE.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no device; write cpu, cuda or cuda:1")
    return text


def print_error(error: Exception) -> int:
    """Print an error that the user can fix, once on every host.

    Returns:
        the exit code: 2 for wrong input, else 1.
    """
    tell(explained(error))
    return exit_code(error)


def print_note(text: str) -> None:
    """Print what a user should know, once on every host."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"note: {text}", file=sys.stderr, flush=True)


def show_loading_once() -> None:
    """Hide progress bars of model loading, except on the terminal of rank 0: a log file keeps every redrawn bar."""
    import diffusers  # slow, and --help needs neither
    import transformers

    if os.environ.get("RANK", "0") != "0" or not sys.stderr.isatty():
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()


def run_command(parser: argparse.ArgumentParser, words: Sequence[str]) -> int:
    """Call the `run` that the chosen command has set; returns its exit code.

    A command with a default `more` receives unknown arguments there; `words` has all. With the --ranks of `add_ranks`,
    ranks of the command that the parser's default `ranked` names start instead. ValueError and OSError are wrong input;
    other exceptions keep their traceback.
    """
    args, more = parser.parse_known_args(words)
    if more and "more" not in args:
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    args.more, args.words = more, words
    try:
        if "ranked" in args and getattr(args, "ranks", None) is not None:
            become_launcher(args.ranked, args.ranks, split_ranks(words)[1])
        args.run(args)
    except (ValueError, OSError) as error:
        return print_error(error)
    return 0
