"""How does a command of all ranks end? Well on each; or by an error, without a traceback where it can be mended."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from bpgo_video.cli import print_error, show_loading_once
from bpgo_video.config.bpgo import ConfigError
from bpgo_video.data.records import ShardError
from bpgo_video.distributed import engine
from bpgo_video.distributed.zero_files import CheckpointError

MENDABLE = (ConfigError, ShardError, CheckpointError, FileNotFoundError, PermissionError)


@contextmanager
def launched() -> Iterator[None]:
    """The body of a command that every rank runs; wrong input ends it with exit code 2."""
    show_loading_once()
    try:
        yield
    except MENDABLE as error:
        print_error(error)
        raise SystemExit(2) from None
    engine.stop_ranks()
