"""What the heartbeat makes of an exception, and of a world of one."""

from __future__ import annotations

import threading

import torch

from bpgo_video.distributed.heartbeat import Heartbeat, is_lost_contact
from bpgo_video.distributed.mesh import Mesh

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1941"


def test_a_lost_peer_is_known_by_its_error_and_by_what_followed_from_it() -> None:
    assert is_lost_contact(RuntimeError(GLOO))
    assert is_lost_contact(torch.distributed.DistNetworkError("Broken pipe"))
    followed = AssertionError("parameter is in flight")
    followed.__context__ = RuntimeError(GLOO)
    assert is_lost_contact(followed)


def test_errors_of_this_rank_are_its_own() -> None:
    assert not is_lost_contact(RuntimeError("the reward model ran out of patience"))
    assert not is_lost_contact(ConnectionResetError("Connection reset by peer")), "a reward's own connection"
    assert not is_lost_contact(RuntimeError("reward 'a' failed on prompt 'an igloo in the snow'"))
    assert not is_lost_contact(KeyboardInterrupt())


def test_a_rank_alone_watches_nobody() -> None:
    before = threading.active_count()
    with Heartbeat(Mesh(0, 1, torch.device("cpu")), timeout=1) as heartbeat:
        heartbeat.enter("reward", 0)
        assert threading.active_count() == before
