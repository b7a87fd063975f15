"""What does a reward server do with a request? It scores it once, whatever is sent how often, and keeps the scores.

One thread scores, a request at a time and in their order. Requests are never put into one batch: scores could then
depend, in their last bits, on who else asked.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import torch

from bpgo_video.rewards.ahead import own_stream
from bpgo_video.rewards.base import RewardModel
from bpgo_video.rewards.wire import Received, description_of, scores_message

log = logging.getLogger(__name__)


class OtherContent(ValueError):
    """An id that was used before, for something else."""


@dataclass
class Job:
    """One request.

    Attributes:
        digest: of its whole content.
        asked: dropped once scored.
        scores, error: the reply's, one of them, once `done` is set.
        ended: when, on the clock of time.monotonic.
    """

    digest: bytes
    asked: Received | None
    done: threading.Event = field(default_factory=threading.Event)
    scores: dict[str, Any] | None = None
    error: str | None = None
    ended: float = 0.0


class RewardService:
    """Scores requests by id, in a thread of its own.

    Args:
        device: where the model is.
        kept: finished requests whose scores are kept.
        keep_seconds: how long they are kept at most.
    """

    def __init__(self, model: RewardModel, device: torch.device, kept: int = 4096, keep_seconds: float = 3600.0):
        self.description = description_of(model)
        self.scored = 0
        self._device = device
        self._model, self._kept, self._keep_seconds = model, kept, keep_seconds
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._lock = threading.Lock()
        self._queue: SimpleQueue[Job | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, args=(torch.get_num_threads(),), name="scoring", daemon=True)
        self._thread.start()

    def submit(self, request_id: str, digest: bytes, asked: Received) -> Job:
        """The job of this id, which is queued where it is new.

        Raises:
            OtherContent: the id stands for another request.
        """
        with self._lock:
            self._forget()
            if request_id not in self._jobs:
                self._jobs[request_id] = Job(digest, asked)
                self._queue.put(self._jobs[request_id])
            job = self._jobs[request_id]
        if job.digest != digest:
            raise OtherContent(f"the id {request_id} was used for another request; every request needs its own")
        return job

    def close(self) -> None:
        """Ends once what is queued has been scored."""
        self._queue.put(None)
        self._thread.join()

    def _forget(self) -> None:
        """The oldest first; a job that is not done is never forgotten."""
        ended = [request_id for request_id, job in self._jobs.items() if job.done.is_set()]
        too_many = len(ended) - self._kept
        oldest = time.monotonic() - self._keep_seconds
        for number, request_id in enumerate(ended):
            if number < too_many or self._jobs[request_id].ended < oldest:
                del self._jobs[request_id]

    def _run(self, threads: int) -> None:
        torch.set_num_threads(threads)
        with own_stream(self._device):
            for job in iter(self._queue.get, None):
                self._score(job)

    @torch.no_grad()
    def _score(self, job: Job) -> None:
        asked, job.asked = job.asked, None
        assert asked is not None
        try:
            job.scores = scores_message(self._model(asked.clips()))
        except Exception as error:  # the request's failure: it is told to who asked, and the next one is served
            job.error = f"{type(error).__name__}: {error}"
            log.error("the model failed with %s", type(error).__name__)
            log.debug("its traceback", exc_info=True)
        self.scored += 1
        job.ended = time.monotonic()
        job.done.set()
