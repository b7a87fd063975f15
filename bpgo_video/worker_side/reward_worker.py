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

`python SCRIPT --self-test [--settings JSON] [--device cuda]` scores two generated clips without a run, prints the
scores, and exits with 1 if a run would not take them. This file must be on PYTHONPATH.
"""

import argparse
import json
import math
import mmap
import os
import signal
import sys
import threading
import time
import traceback

MEMBERS = ("name", "version", "range", "higher_is_better", "kind", "frames", "frames_per_second")
SELF_TEST = ("a red square moving right", "a blue square that does not move")
FRAMES, HEIGHT, WIDTH, SIDE = 17, 128, 192, 48  # of the clips of a self-test, and of their squares, in pixels


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

    def picture(self, sample, frame):
        """One frame as a PIL image."""
        from PIL import Image

        return Image.frombytes("RGB", (self.shape[3], self.shape[2]), self.frame(sample, frame))

    def spread(self, count):
        """`count` of the frames evenly spread, both ends included; all of them if there are not so many."""
        total = self.shape[1]
        count = min(count, total)
        return [round(i * (total - 1) / max(1, count - 1)) for i in range(count)]

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
    if "--self-test" in sys.argv:
        sys.exit(self_test(build, sys.argv[1:]))
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # other output, also of C libraries, must not mix with the replies
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # a run that is stopped first finishes its step, which needs its rewards
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    arguments = json.loads(sys.argv[1])
    model = _built(build, arguments)
    _send(replies, {"hello": {key: getattr(model, key) for key in MEMBERS if hasattr(model, key)}})
    for line in sys.stdin:
        request = json.loads(line)
        _send(replies, dict(_answer(model, request, arguments["memory"]), id=request["id"]))


def _built(build, arguments):
    model = build(device=arguments["device"], **arguments["settings"])
    if getattr(model, "listens", False):
        raise TypeError("this reward listens, but a worker receives no sound; name it as the recipe's model")
    if getattr(model, "groupwise", False):
        raise TypeError("this reward compares samples, but a worker receives no groups; name it as the recipe's model")
    return model


def _answer(model, request, descriptor):
    try:
        with mmap.mmap(descriptor, request["bytes"], access=mmap.ACCESS_READ) as memory:
            scores = model(Clips(request["clips"], bytes(memory)))
    except Exception as error:  # whatever the model raises ends the run, which names the videos
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}
    return _message(scores)


def _message(scores):
    rows, times, std = (*scores, None)[:3] if isinstance(scores, tuple) else (scores, None, None)
    answer = {"values": _numbers(rows), "times": None if times is None else [float(t) for t in times]}
    return answer if std is None else dict(answer, std=_numbers(std))


def _numbers(rows):
    return [[float(value) for value in row] for row in rows]


def _send(replies, message):
    replies.write(json.dumps(message) + "\n")
    replies.flush()


def self_test(build, argv):
    """Scores two generated clips, prints the scores, and returns 1 if a run would refuse them."""
    parser = argparse.ArgumentParser(description="Score two generated clips, and check the scores.")
    parser.add_argument("--self-test", action="store_true")
    parser.add_argument("--settings", type=json.loads, default={}, help="options.settings of the recipe, as JSON")
    parser.add_argument("--device", default="cpu")
    model = _built(build, vars(parser.parse_args(argv)))
    header = {"texts": list(SELF_TEST), "fps": 8.0, "images": False, "videos": [2, FRAMES, HEIGHT, WIDTH]}
    scored = _message(model(Clips(header, _moving() + _still())))
    print(f"{model.name} {model.version}, range {model.range[0]} to {model.range[1]}")
    stds = [f", std {std}" for std in scored.get("std", ())] or [""] * len(SELF_TEST)
    for text, scores, std in zip(SELF_TEST, scored["values"], stds):  # noqa: B905
        print(f"{text}: {scores}{std}")
    problems = _problems(scored)
    print("refused: " + "; ".join(problems) if problems else f"as a run takes them; seconds {scored['times']}")
    return 1 if problems else 0


def _problems(scored):
    """What a run would refuse in the scores of the two clips of a self-test."""
    rows, times, std = scored["values"], scored["times"], scored.get("std")
    width, widths = 1 if times is None else len(times), [len(row) for row in rows]
    found = {
        f"{len(rows)} rows of scores for 2 videos": len(rows) != 2,
        f"rows of {widths} scores for {width} times": not width or set(widths) != {width},
        "a score that is not finite": not all(math.isfinite(value) for row in rows for value in row),
        "times that do not increase": times != sorted(set(times or ())) and times is not None,
    }
    if std is not None:
        found["another number of std than of scores"] = [len(row) for row in std] != widths
        found["a std that is negative or not finite"] = not all(0 <= value < math.inf for row in std for value in row)
    return [problem for problem, holds in found.items() if holds]


def _moving():
    """A red square that moves to the right, on gray."""
    return b"".join(_square((220, 30, 30), frame * (WIDTH - SIDE) // (FRAMES - 1)) for frame in range(FRAMES))


def _still():
    """A blue square in the middle, on gray."""
    return _square((30, 30, 220), (WIDTH - SIDE) // 2) * FRAMES


def _square(color, left):
    """A frame's RGB bytes."""
    empty = bytes((128, 128, 128)) * WIDTH
    filled = empty[: 3 * left] + bytes(color) * SIDE + empty[3 * (left + SIDE) :]
    above = (HEIGHT - SIDE) // 2
    return empty * above + filled * SIDE + empty * (HEIGHT - SIDE - above)


def _end_with(parent):
    """Ends the worker when its parent has ended, also while the model is busy."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(0)
