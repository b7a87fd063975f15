"""A reward worker that needs only the standard library: brightness per frame, and every way to fail; run by path."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from reward_worker import serve


class Brightness:
    name, version, range = "brightness", "toy-1", (0.0, 255.0)

    def __init__(self, device: str, how: str = "", once: str = "") -> None:
        self.how, self.once = how, once
        if how == "never ready":
            sys.exit("no such weights")

    def __call__(self, clips):
        print("progress: 100%")  # as libraries do
        if self.how and self.how != "states its std" and self.is_due():
            self.fail()
        samples, frames, height, width = clips.shape
        size = height * width * 3
        rows = [[sum(clips.frame(sample, frame)) / size for frame in range(frames)] for sample in range(samples)]
        if clips.has_images:
            return [[sum(clips.image(sample)) / size] for sample in range(samples)]
        times = [frame / clips.fps for frame in range(frames)]
        return (rows, times, [[0.5] * frames] * samples) if self.how == "states its std" else (rows, times)

    def is_due(self) -> bool:
        """Whether to fail: always, or only if no earlier worker failed."""
        if not self.once:
            return True
        due = not Path(self.once).exists()
        Path(self.once).touch()
        return due

    def fail(self) -> None:
        if self.how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "raises":
            raise KeyError("no such weight")
        if self.how == "hangs":
            time.sleep(600)


serve(Brightness)
