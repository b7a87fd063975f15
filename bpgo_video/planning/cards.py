"""Rates that a plan's seconds follow from: a card's published ones, or those that `--calibrate` measured.

The figures of the cards are NVIDIA's, dense (without structured sparsity), of the data sheets of H200, H100 SXM, A100
SXM and L40S and of the Ada architecture's white paper (RTX 4090, bf16 with sums in fp32). Links are bytes a second in
one direction: NVLink, or PCIe where a card has none. The network between hosts is that of usual machines: DGX H200
and H100 (400 Gb/s a GPU), DGX A100 (200 Gb/s), and our guess for the other two.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from bpgo_video.config.bpgo import ConfigError
from bpgo_video.documents import plain_json, read_text
from bpgo_video.errors import unknown

MFU = 0.4  # an assumption: published training runs of large transformers reach .3 to .5 of the peak rate
LINK_SHARE = 0.7  # of a link's rate that large collectives reach: an assumption, not measured
GPUS_PER_HOST = 8  # an assumption
HOST_MEMORY = 50e9  # bytes a second that one rank's share of a host's memory moves: an assumption
TERA, GIGA = 1e12, 1e9


@dataclass(frozen=True)
class Card:
    """A GPU's published figures.

    Attributes:
        gigabytes: of memory.
        bf16, tf32, fp32: operations a second of matrix products.
        bandwidth: of its memory, bytes a second.
        link, network, host_link: bytes a second in one direction to a GPU of the same host, of another host, and to
            the host.
    """

    name: str
    gigabytes: int
    bf16: float
    tf32: float
    fp32: float
    bandwidth: float
    link: float
    network: float
    host_link: float


def _card(name: str, gigabytes: int, tera: tuple[float, float, float], giga: tuple[float, float, float, float]) -> Card:
    return Card(name, gigabytes, *(TERA * rate for rate in tera), *(GIGA * rate for rate in giga))


CARDS: Mapping[str, Card] = {  # tera-operations: bf16, TF32, fp32; GB/s: memory, link, network, host
    "h200": _card("H200 SXM", 141, (989, 494.5, 67), (4800, 450, 50, 64)),
    "h100": _card("H100 SXM", 80, (989, 494.5, 67), (3350, 450, 50, 64)),
    "a100-80gb": _card("A100 SXM 80 GB", 80, (312, 156, 19.5), (2039, 300, 25, 32)),
    "a100-40gb": _card("A100 SXM 40 GB", 40, (312, 156, 19.5), (1555, 300, 25, 32)),
    "l40s": _card("L40S", 48, (362, 183, 91.6), (864, 32, 12.5, 32)),
    "rtx4090": _card("RTX 4090", 24, (165.2, 82.6, 82.6), (1008, 16, 1.25, 32)),
}


def card_of(name: str | None, gigabytes: float | None) -> Card:
    """The card of that name; without one the smallest of at least that memory; without either an H100.

    Raises:
        ConfigError: no such card.
    """
    if name is not None:
        if name not in CARDS:
            raise ConfigError(unknown("--card", name, CARDS))
        return CARDS[name]
    if gigabytes is None:
        return CARDS["h100"]
    large = [card for card in CARDS.values() if card.gigabytes >= gigabytes]
    return min(large, key=lambda card: card.gigabytes) if large else CARDS["h200"]


@dataclass(frozen=True)
class Rates:
    """What a rank reaches.

    Attributes:
        source: where the numbers come from.
        forward, replay, decode: operations a second of the transformer's forward, of its forward with backward, and of
            the VAE.
        reward, half_reward: of reward models in fp32 and in 16 bits.
        memory: bytes a second that elementwise work moves, such as the optimizer's.
        decode_memory: the same while decoding; None if `decode` includes it.
        link, network, host_link: bytes a second of collectives within a host and between hosts, and to the host.
        video_seconds: of scoring one video, if it was measured; it replaces `reward`.
        gpus_per_host: ranks of one host.
    """

    source: str
    forward: float
    replay: float
    decode: float
    reward: float
    half_reward: float
    memory: float
    decode_memory: float | None
    link: float
    network: float
    host_link: float
    video_seconds: float | None = None
    gpus_per_host: int = GPUS_PER_HOST

    def between(self, ranks: int) -> float:
        """Bytes a second of a collective of neighbouring ranks: all network cards of a host carry it together."""
        return self.link if ranks <= self.gpus_per_host else min(self.link, self.gpus_per_host * self.network)


def rates_of(card: Card, mfu: float, *, bf16: bool, network_gbps: float | None = None) -> Rates:
    """A card's rates: `mfu` of the peak for all arithmetic, LINK_SHARE of the links.

    As torch chooses: matrix products in the policy's dtype, in fp32 without TF32; the VAE's convolutions in TF32.

    Args:
        bf16: whether the policy computes in it.
        network_gbps: of each GPU between hosts, in Gb/s; None takes the card's.
    """
    network = card.network if network_gbps is None else network_gbps * GIGA / 8
    products = mfu * (card.bf16 if bf16 else card.fp32)
    return Rates(
        source=f"{card.name}, {mfu:.0%} of its peak",
        forward=products,
        replay=products,
        decode=mfu * card.tf32,
        reward=mfu * card.fp32,
        half_reward=mfu * card.bf16,
        memory=card.bandwidth,
        decode_memory=card.bandwidth,
        link=LINK_SHARE * card.link,
        network=LINK_SHARE * network,
        host_link=LINK_SHARE * card.host_link,
    )


def read_rates(path: Path) -> Rates:
    """Rates that `--calibrate` wrote.

    Raises:
        ConfigError: the file lacks a rate, or one is not above 0.
    """
    stored = plain_json(read_text(path), str(path))
    try:
        rates = Rates(**stored)
        wrong = [name for name, value in asdict(rates).items() if not isinstance(value, str | None) and not value > 0]
    except TypeError as error:
        raise ConfigError(f"{path} holds no rates ({error}); measure them with --calibrate") from None
    if wrong:
        raise ConfigError(f"{path}: {wrong[0]} must be above 0; measure the rates again with --calibrate")
    return rates


def write_rates(path: Path, rates: Rates) -> None:
    path.write_text(json.dumps(asdict(rates), indent=1) + "\n", "utf-8")


def with_network(rates: Rates, gbps: float | None) -> Rates:
    return rates if gbps is None else replace(rates, network=LINK_SHARE * gbps * GIGA / 8)
