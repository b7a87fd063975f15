"""Where a run computes: code, package versions and hardware."""

from __future__ import annotations

import platform
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bpgo_video.distributed.mesh import from_all
from bpgo_video.training.inputs import PACKAGES
from bpgo_video.training.session import PolicySession


def environment(session: PolicySession) -> dict[str, Any]:
    """Code, package versions and hardware of a run, the same on every rank; every rank calls it."""
    device = session.mesh.device
    ranks = from_all((platform.node(), hardware(device)), session.mesh)
    models, hosts = Counter(model for _, model in ranks), len({host for host, _ in ranks})
    found = ", ".join(f"{count} x {model}" for model, count in models.items())
    return {
        "code": session.code,
        "packages": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "hardware": f"{found} on {hosts} {'host' if hosts == 1 else 'hosts'}",
        "device": device.type,
    }


def hardware(device: torch.device) -> str:
    """The model of a rank's device; of a CPU, with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text("utf-8").splitlines() if listed.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()} (threads: {torch.get_num_threads()})"
