"""The worker's side of `model: worker`: describes a reward model, then answers each line of JSON with one line.

Needs only the standard library of Python 3.8 or later. A script that a recipe names as `rewards.NAME.options.script`:

    from reward_worker import serve

    class MyReward:
        name, version, range = "my_reward", "weights-of-2024-05", (0.0, 1.0)

        def __init__(self, device, **settings):  # rewards.NAME.options.settings
            ...

        def __call__(self, clips):
            return [[...], ...]          # one row of one number per video
            return rows, times           # or one row of scores per video, with the seconds of the scored frames
            return rows, times, std      # and rows of the standard deviations of their errors; times may be None

    serve(MyReward)

Optional members: higher_is_better (True), kind ("real"), frames, frames_per_second. The script's own output goes to
stderr; replies have a separate channel.
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
        fps: frames per second.
        shape: (samples, frames, height, width) of the videos.
        has_images: whether each video continues a conditioning image.
    """

    def __init__(self, header, memory):
        self.texts, self.fps, self.has_images = header["texts"], header["fps"], header["images"]
        self.shape = tuple(header["videos"])
        self._memory = memory

    def frame(self, sample, frame):
        """RGB bytes of one frame, row by row: `PIL.Image.frombytes("RGB", (width, height), ...)` reads them."""
        return self._picture(sample * self.shape[1] + frame)

    def image(self, sample):
        """RGB bytes of a video's conditioning image."""
        return self._picture(self.shape[0] * self.shape[1] + sample)

    def _picture(self, number):
        size = self.shape[2] * self.shape[3] * 3
        return self._memory[number * size : (number + 1) * size]

    def array(self):
        """All videos as numpy: uint8 (samples, frames, height, width, 3), read-only."""
        import numpy

        count = self.shape[0] * self.shape[1] * self.shape[2] * self.shape[3] * 3
        return numpy.frombuffer(self._memory, numpy.uint8, count).reshape(*self.shape, 3)


def serve(build):
    """Builds the model as `build(device=..., **settings)`, and answers until the run closes the connection."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # other output, also of C libraries, must not mix with the replies
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # a run that is stopped first finishes its step, which needs its rewards
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    arguments = json.loads(sys.argv[1])
    model = build(device=arguments["device"], **arguments["settings"])
    if getattr(model, "listens", False):
        raise TypeError("this reward listens, but a worker receives no sound; name it as the recipe's model")
    _send(replies, {"hello": {key: getattr(model, key) for key in MEMBERS if hasattr(model, key)}})
    for line in sys.stdin:
        request = json.loads(line)
        _send(replies, dict(_answer(model, request, arguments["memory"]), id=request["id"]))


def _answer(model, request, descriptor):
    try:
        with mmap.mmap(descriptor, request["bytes"], access=mmap.ACCESS_READ) as memory:
            scores = model(Clips(request["clips"], bytes(memory)))
    except Exception as error:  # whatever the model raises ends the run, which names the videos
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}
    rows, times, std = (*scores, None)[:3] if isinstance(scores, tuple) else (scores, None, None)
    answer = {"values": _numbers(rows), "times": None if times is None else [float(t) for t in times]}
    return answer if std is None else dict(answer, std=_numbers(std))


def _numbers(rows):
    return [[float(value) for value in row] for row in rows]


def _send(replies, message):
    replies.write(json.dumps(message) + "\n")
    replies.flush()


def _end_with(parent):
    """Ends the worker when its parent has ended, also while the model is busy."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(0)
