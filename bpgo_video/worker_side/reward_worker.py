"""Worker side of `model: worker`: describes a reward model, then answers each line of JSON with one.

Needs only the standard library of Python 3.8 or later. A script that a recipe names as `rewards.NAME.options.script`:

    from reward_worker import serve

    class MyReward:
        name, version, range = "my_reward", "weights-of-2024-05", (0.0, 1.0)

        def __init__(self, device, **settings):  # rewards.NAME.options.settings
            ...

        def __call__(self, clips):
            return [[...], ...]          # one score a video: a row of one number for each
            return rows, times           # or a row of scores a video, with the seconds of the scored frames

    serve(MyReward)

Optional members: higher_is_better (True), kind ("real"), frames, frames_per_second. What the script prints goes to
stderr; the replies have their own channel.
"""

import json
import mmap
import os
import signal
import sys
import threading
import time
import traceback

MEMBERS = ("name", "version", "range", "higher_is_better", "kind", "frames", "frames_per_second")


class Clips:
    """The videos to score.

    Attributes:
        texts: the prompt of each video.
        fps: frames a second.
        shape: (samples, frames, height, width) of the videos.
        has_images: whether each video continues an image.
    """

    def __init__(self, header, memory):
        self.texts, self.fps, self.has_images = header["texts"], header["fps"], header["images"]
        self.shape = tuple(header["videos"])
        self._memory = memory

    def frame(self, sample, frame):
        """RGB bytes of one frame, row by row: `PIL.Image.frombytes("RGB", (width, height), ...)` reads them."""
        _, frames, height, width = self.shape
        size = height * width * 3
        start = (sample * frames + frame) * size
        return self._memory[start : start + size]

    def image(self, sample):
        """RGB bytes of the image that a video continues."""
        samples, frames, height, width = self.shape
        size = height * width * 3
        start = samples * frames * size + sample * size
        return self._memory[start : start + size]

    def array(self):
        """All videos as numpy: uint8 (samples, frames, height, width, 3), read only."""
        import numpy

        count = self.shape[0] * self.shape[1] * self.shape[2] * self.shape[3] * 3
        return numpy.frombuffer(self._memory, numpy.uint8, count).reshape(*self.shape, 3)


def serve(build):
    """Make the model as `build(device=..., **settings)`, and answer until the run closes the connection."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # output of anything, also of C libraries, must not mix with the replies
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # a run that is stopped finishes its step first, with its rewards
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    arguments = json.loads(sys.argv[1])
    model = build(device=arguments["device"], **arguments["settings"])
    _say(replies, {"hello": {key: getattr(model, key) for key in MEMBERS if hasattr(model, key)}})
    for line in sys.stdin:
        question = json.loads(line)
        _say(replies, dict(_answer(model, question, arguments["memory"]), id=question["id"]))


def _answer(model, question, descriptor):
    try:
        with mmap.mmap(descriptor, question["bytes"], access=mmap.ACCESS_READ) as memory:
            found = model(Clips(question["clips"], bytes(memory)))
    except Exception as error:  # whatever the model raises ends the run, which names the videos
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}
    rows, times = found if isinstance(found, tuple) else (found, None)
    return {
        "values": [[float(value) for value in row] for row in rows],
        "times": None if times is None else [float(t) for t in times],
    }


def _say(replies, message):
    replies.write(json.dumps(message) + "\n")
    replies.flush()


def _end_with(parent):
    """Ends the worker with a parent that was killed, also while the model is busy."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(0)
