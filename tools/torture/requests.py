"""Right and wrong requests to a reward server that is killed and restarted again and again: is every answer right?

    python -m tools.torture.requests --seed 0 --count 2000

Right requests come from the client that training uses, and must return the scores of an undisturbed server bit for
bit; those of an impatient client may fail instead, with an error that names the server. Wrong ones, written out or
random changes of right ones, come through raw sockets and must get a status 4xx or a closed connection. The server's
memory and open files stay bounded, and its log has no traceback. It is killed for every 200 requests, and twice at
least.
"""

from __future__ import annotations

import json
import os
import random
import re
import select
import socket
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from bpgo_video.rewards.remote import RemoteReward
from tools.torture.drafts import Values, clips_of, right
from tools.torture.messages import Answer, Message, messages, slow_message
from tools.torture.serving import START, Kills, Server
from tools.torture.tally import MISTAKES, Tallies, Tally, main_of

CLIENTS = 12
GROWTH = 200 * 2**20  # bytes of memory above those after the start; the server may hold 4 requests of 2 MiB
FILES = 8  # open files more than after the start
QUIET = 2.0  # seconds without an answer after which a client of a wrong request closes its side
WHOLE = re.compile(rb"HTTP/1\.1 (\d{3})[^\n]*\n(?:[^\n]+\n)*?content-length: (\d+)\r\n(?:[^\n]+\n)*?\r\n", re.I)


class Outcome(NamedTuple):
    """What a case did.

    Attributes:
        name: the kind of the case, or the kind, a colon, and what is special about this one.
        verdict: one of `tally.OUTCOMES`.
        shown: what came instead, if that is a mistake.
    """

    name: str
    verdict: str
    seconds: float = 0.0
    shown: str = ""


def exchange(port: int, message: Message) -> tuple[list[Answer], bytes]:
    """The answers to a message, and all that was received.

    Raises:
        TimeoutError: neither enough answers nor a closed connection in time.
    """
    deadline, received, ended = time.monotonic() + message.limit, b"", message.ends
    with socket.create_connection(("127.0.0.1", port), message.limit) as client, suppress(ConnectionError):
        with suppress(ConnectionError):  # the answer may be there all the same
            for piece in message.pieces:
                client.sendall(piece)
                if select.select([client], [], [], message.pause)[0] and not message.answers:
                    break
            if message.ends:
                client.shutdown(socket.SHUT_WR)
        while len(answers_in(received)) < max(1, len(message.answers)):
            hurries = not (ended or message.answers or message.limit > 60)
            client.settimeout(QUIET if hurries else max(0.001, deadline - time.monotonic()))
            try:
                piece = client.recv(2**16)
            except TimeoutError:
                if not hurries:
                    raise
                client.shutdown(socket.SHUT_WR)
                deadline, ended = time.monotonic() + message.limit, True
                continue
            if not piece:
                break
            received += piece
    return answers_in(received), received


def answers_in(received: bytes) -> list[Answer]:
    """The complete answers, and the last one if it states no length."""
    answers: list[Answer] = []
    while found := WHOLE.match(received):
        body, received = received[found.end() :], b""
        if len(body) >= (size := int(found[2])):
            reply, received = json.loads(body[:size]), body[size:]
            answers.append((int(found[1]), reply.get("values")))
    if re.match(rb"HTTP/1\.1 \d{3} (?s:.*)\r\n0\r\n\r\n\Z", received):
        answers.append((int(received[9:12]), None))
    return answers


def judge(message: Message, port: int) -> Outcome:
    """Send a message, and compare its answers with what it must get."""
    started = time.monotonic()
    try:
        answers, received = exchange(port, message)
    except TimeoutError:
        return Outcome(message.name, "slow", time.monotonic() - started, "no answer")
    statuses = [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", received)]
    if any(status >= 500 for status in statuses):
        verdict = "traceback"
    elif message.answers:
        verdict = "held" if answers == list(message.answers) else "silent"
    else:
        verdict = "detected" if all(400 <= status < 500 for status in statuses) else "silent"
    sent = b"".join(message.pieces)
    text = (
        "" if verdict in ("held", "detected") else f"expected {message.answers}; {received[:1500]!r} to {sent[:1500]!r}"
    )
    return Outcome(message.name, verdict, time.monotonic() - started, text)


class Torture:
    """Cases against one server; each is a function that returns its outcome."""

    def __init__(self, server: Server, rng: random.Random) -> None:
        self.server, self._rng = server, rng
        drafts = [right(rng, server.token) for _ in range(24)]
        self._clips = [clips_of(draft.header, draft.pixels) for draft in drafts]
        self._patient = RemoteReward(server.url, "TORTURE_TOKEN", patience=30.0, timeout=200.0)
        self._impatient = RemoteReward(server.url, "TORTURE_TOKEN", patience=1.0, timeout=2.0)
        self._undisturbed: list[Values] = [self._patient(clips).values.tolist() for clips in self._clips]
        if self._undisturbed != [draft.values for draft in drafts]:
            raise RuntimeError("the server's scores are not those of the model in this process")

    def cases(self) -> Iterator[Callable[[], Outcome]]:
        raw = messages(self._rng, self.server.token)
        while True:
            kind, number = self._rng.random(), self._rng.randrange(len(self._clips))
            if kind < 0.6:
                yield self.raw(next(raw))
            elif kind < 0.95:
                yield lambda number=number: self.client(self._patient, number)  # type: ignore[misc]
            else:
                yield lambda number=number: self.client(self._impatient, number)  # type: ignore[misc]

    def slow(self) -> Callable[[], Outcome]:
        return self.raw(slow_message(self._rng, self.server.token))

    def raw(self, message: Message) -> Callable[[], Outcome]:
        """The message, repeated until no kill comes in between."""

        def case() -> Outcome:
            while self.server.up.wait(START):
                epoch = self.server.epoch
                try:
                    outcome = judge(message, self.server.port)
                except ConnectionError:  # nobody listens
                    outcome = Outcome(message.name, "traceback", shown="the server ended by itself")
                if epoch == self.server.epoch:
                    return outcome
            return Outcome(message.name, "slow", START, "the server did not start")

        return case

    def client(self, remote: RemoteReward, number: int) -> Outcome:
        patient = remote is self._patient
        name, started = f"client: {'patient' if patient else 'impatient'}", time.monotonic()
        try:
            held = remote(self._clips[number]).values.tolist() == self._undisturbed[number]
            verdict, text = ("held", "") if held else ("silent", "other scores than those of the undisturbed server")
        except (TimeoutError, ConnectionError) as error:
            text = str(error)
            verdict = "slow" if patient else "detected" if self.server.url in text else "silent"
        except Exception as error:  # no error that the client promises
            verdict, text = "traceback", f"{type(error).__name__}: {error}"
        return Outcome(name, verdict, time.monotonic() - started, text)

    def afterwards(self) -> list[Outcome]:
        """What must hold in the end: a right answer, and bounded memory, files and log."""
        time.sleep(1.0)  # for the server to notice clients that left
        server, log = self.server, self.server.log.read_text("utf-8", "replace")
        files, grown = server.status.num_fds() - server.files, f"{server.peak / 2**20:.0f} MiB"
        print(f"the server had {grown} and has {files} open files more than after its start", flush=True)
        problem = next((line for line in log.splitlines() if re.search("Traceback|Error|never retrieved", line)), "")
        return [
            self.client(self._patient, 0),
            Outcome("afterwards: log", "traceback" if problem else "held", shown=problem),
            Outcome("afterwards: memory", "held" if server.peak <= GROWTH else "silent", shown=grown),
            Outcome("afterwards: open files", "held" if files <= FILES else "silent", shown=str(files)),
            Outcome("afterwards: no token in the log", "silent" if server.token in log else "held"),
        ]


def outcomes(torture: Torture, rng: random.Random, count: int) -> Iterator[Outcome]:
    """Three quarters of the requests during kills, then the others, beside clients that are slow."""
    slow = [torture.slow() for _ in range(max(2, count // 50))]
    quick = list(islice(torture.cases(), count - len(slow)))
    disturbed, rest = quick[: len(quick) * 3 // 4], quick[len(quick) * 3 // 4 :]
    with ThreadPoolExecutor(CLIENTS) as clients, ThreadPoolExecutor(len(slow)) as idlers:
        with Kills(torture.server, rng, max(2, count // 200), len(disturbed), clients) as kills:
            work = [clients.submit(case) for case in disturbed]
            for case in work:
                case.add_done_callback(kills.count)
            yield from (case.result() for case in work)
        work = [idlers.submit(case) for case in slow] + [clients.submit(case) for case in rest]
        yield from (case.result() for case in work)
    yield from torture.afterwards()


def run(seed: int, count: int) -> Tallies:
    """Send `count` requests. The tallies by kind of request; mistakes are printed as they come."""
    os.environ["OMP_NUM_THREADS"] = "1"
    rng, tallies = random.Random(seed), defaultdict[str, Tally](Tally)
    with tempfile.TemporaryDirectory(prefix="requests-") as name, closing(Server(Path(name))) as server:
        for outcome in outcomes(Torture(server, rng), rng, count):
            kind, _, detail = outcome.name.partition(": ")
            tallies[f"requests: {kind}"].add(outcome.verdict, outcome.seconds, detail)
            if outcome.verdict in MISTAKES:
                print(f"{outcome.verdict}: {outcome.name}, {outcome.seconds:.1f} s\n    {outcome.shown}", flush=True)
    return dict(sorted(tallies.items()))


if __name__ == "__main__":
    sys.exit(main_of(run, __doc__, 2000))
