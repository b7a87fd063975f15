"""Error messages: words that many share, what a typo may mean, and who prints why a launch failed.

A failed launch is explained once on every host, by the rank that knows first. A launcher ends the other ranks within a
second after one exits. So a rank prints before it exits or tells the others. The ranks of a host agree who prints by a
file in the folder for temporary files: they may fail before they have met, and each host may have a log of its own.
"""

from __future__ import annotations

import difflib
import errno
import fcntl
import os
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from types import TracebackType
from typing import ClassVar

LINES = 25  # of an error that its message explains
SHOWN = 100  # characters of a wrong value in a message
CALLS = 10  # of a traceback, the innermost ones
OTHER_NAMES = {  # key or flag -> what people type for it
    "ranks": "gpus num_gpus nproc_per_node num_processes world_size",
    "optim.learning_rate": "lr base_lr",
    "run.num_steps": "steps max_steps epochs num_epochs iterations",
    "run.dir": "output_dir output out save_dir logdir",
    "run.resume": "resume_from resume_from_checkpoint",
    "run.save_every": "save_steps",
    "rollout.prompts_per_step": "batch_size train_batch_size global_batch_size",
    "rollout.group_size": "num_samples num_generations",
    "rollout.micro_batch_size": "batch_size_per_gpu micro_batch",
    "sft.batch_size": "train_batch_size global_batch_size",
    "sft.micro_batch_size": "batch_size_per_gpu micro_batch",
    "policy.folder": "model model_path pretrained_model",
    "policy.lora.rank": "lora_rank",
    "policy.lora.alpha": "lora_alpha",
    "video.num_frames": "frames",
    "sampler.guidance_scale": "guidance cfg cfg_scale",
    "data.shards": "dataset train_data data_path prompts",
    "loss.kl_weight": "kl kl_coef kl_beta",
    "loss.clip_range": "clip clip_eps",
    "ema.decay": "ema_decay",
    "evaluation.every": "eval_steps",
    "parallel.sequence": "sequence_parallel",
    "num_steps": "steps",  # of bpgo-video generate, as the next ones
    "num_frames": "frames",
    "guidance_scale": "guidance cfg cfg_scale",
    "output": "output_dir out save_dir",
    "policy": "model model_path",
}

PATH_ERRORS = {errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP}


class InputError(ValueError):
    """Wrong input; the message says what happened, where, the rule, and what to type."""

    exit_code: ClassVar[int] = 2


def likely(word: str, known: Collection[str]) -> list[str]:
    """The known keys that an unknown one may mean: by another name, by its last part, or by spelling.

    Args:
        word: a key, `optim.lr`, or a flag, `--optim.lr`; known keys have the same form.
    """

    def key(name: str) -> str:
        return name.removeprefix("--").replace("-", "_")

    section, _, last = key(word).rpartition(".")
    parts = {name: key(name).rpartition(".") for name in known}
    named = [name for name in known if last in OTHER_NAMES.get(key(name), "").split()]
    same = [name for name, (_, _, part) in parts.items() if part == last]
    siblings = {part: name for name, (above, _, part) in parts.items() if above == section}
    near = [siblings[part] for part in difflib.get_close_matches(last, siblings, n=1, cutoff=0.5)]
    return named or same or near or difflib.get_close_matches(word, list(known), n=1)


def suggestion(word: str, known: Iterable[str], limit: int = 1, cutoff: float = 0.6) -> str:
    """`; perhaps you meant --output`, the nearest of the known names; empty if none is near."""
    return meant(difflib.get_close_matches(word, list(known), n=limit, cutoff=cutoff))


def meant(names: Collection[str]) -> str:
    """`; perhaps you meant --output`; empty for no names."""
    return f"; perhaps you meant {' or '.join(names)}" if names else ""


def unknown(name: str, value: object, known: Iterable[str], otherwise: str = "") -> str:
    """`scheduler is 'eular'; known are ddim, dpm, euler; perhaps you meant euler`

    Args:
        name: the setting, flag or key as the user writes it.
        otherwise: what is valid besides the known names, such as `, or module:Name`.
    """
    names = list(known)
    return f"{name} is {value!r}; known are {', '.join(names) or 'none'}{otherwise}{suggestion(str(value), names)}"


def some_of(names: Iterable[str], limit: int = 3) -> str:
    """`a, b, c and 5 more`, in sorted order."""
    ordered = sorted(names)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + more


def shown(value: object, quoted: bool = True) -> str:
    """A value for a message, as its repr or as it is, cut short."""
    try:
        text = repr(value) if quoted else str(value)
    except ValueError:  # an integer of more than 4300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def exit_code(error: BaseException) -> int:
    """2 if the input is wrong, which the message explains; else 1."""
    of_input = (FileExistsError, FileNotFoundError, PermissionError)
    if isinstance(error, of_input) or (isinstance(error, OSError) and error.errno in PATH_ERRORS):
        return 2
    return int(getattr(error, "exit_code", 1))


def is_one_of_several() -> bool:
    """Whether this process is a rank of a launch of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def tell(text: str) -> None:
    """Write to stderr, unless a rank of the same launch and host has already told why it fails."""
    if is_one_of_several():
        try:
            with open(_claims(), "a+", encoding="utf-8", opener=_own_file) as claims:
                fcntl.flock(claims, fcntl.LOCK_EX)  # held until the text is written: then others may exit
                claimed = os.fstat(claims.fileno())
                if claimed.st_size and claimed.st_mtime > _started():
                    return
                claims.write("x")
                claims.flush()
                _write(text)
            _remove_old_claims()
            return
        except OSError:  # no folder for temporary files: better twice than never
            pass
    _write(text)


def _claims() -> Path:
    """A file of the ranks with the same parent and port; a claim from before their start is of an earlier launch."""
    launch = (socket.gethostname(), os.getuid(), os.getppid(), os.environ.get("MASTER_PORT", "0"))
    return Path(tempfile.gettempdir(), "-".join(map(str, ("bpgo-video-failed", *launch))))


def _remove_old_claims() -> None:
    """Those of this user's launches that failed over a day ago; no rank reads them any more."""
    for path in Path(tempfile.gettempdir()).glob(f"bpgo-video-failed-{socket.gethostname()}-{os.getuid()}-*"):
        with suppress(OSError):  # another rank removed it
            if path.lstat().st_mtime < time.time() - 86400:
                path.unlink()


def _own_file(path: str, flags: int) -> int:
    """Open a file in a folder that others write to as well, unless it is a link of theirs."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _started() -> float:
    """When this process started, in seconds since the epoch."""
    import psutil  # only failing ranks need it

    return psutil.Process().create_time()


def _write(text: str) -> None:
    sys.stdout.flush()
    sys.stderr.write(text.rstrip() + "\n")
    sys.stderr.flush()


@contextmanager
def told() -> Iterator[None]:
    """Print what the block prints before it exits, but on the ranks of a host only once."""
    if not is_one_of_several():
        yield
        return
    printed = StringIO()
    try:
        with redirect_stdout(printed), redirect_stderr(printed):
            yield
    except SystemExit:
        tell(printed.getvalue())
        raise


def named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")


def explained(error: BaseException) -> str:
    """The text for an error that the user can fix; ranks that differ from others are named by its notes."""
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    lines = ": ".join(["error", *getattr(error, "__notes__", []), text]).splitlines()
    return "\n".join(lines if len(lines) <= LINES else [*lines[:LINES], f"... and {len(lines) - LINES} more lines"])


def traced(error: BaseException, summary: str) -> str:
    """The text for any other error: the innermost calls of its first cause, and the summary."""
    if isinstance(error, KeyboardInterrupt):
        return summary
    cause: BaseException = error
    while earlier := cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__):
        cause = earlier
    calls = "".join(traceback.format_tb(cause.__traceback__, limit=-CALLS))
    first = "" if cause is error else "".join(traceback.format_exception_only(cause))
    return f"Traceback (innermost calls last):\n{calls}{first}{summary}"


def install_excepthook() -> None:
    """Print an exception that ends this rank, unless another rank of its host has told."""
    if is_one_of_several():
        sys.excepthook = _excepthook


def _excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    who = f"rank {os.environ.get('RANK', '0')} ({socket.gethostname()}, pid {os.getpid()})"
    tell(traced(error, f"error: {who} failed: {named(error)}"))
