"""Warnings about the installation and the host of a run: versions, cores, disk, home directory, size of samples."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.resources import files
from math import prod
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from bpgo_video.config.sft import Recipe
from bpgo_video.distributed.memory import available_cores, ranks_of_this_host
from bpgo_video.planning.job import readable
from bpgo_video.policies import Policy
from bpgo_video.training.session import PolicySession

FEW_TOKENS = 700  # on two CPU ranks, groups of two took 2.1 times a step's seconds at 162 tokens a rank, 1.8 at 648


def warnings(session: PolicySession) -> list[str]:
    """What may slow or stop a long run on this host; none of it is an error."""
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in session.engine.module.parameters() if p.requires_grad)
    host = [*other_versions(), *crowded_cores(), *small_disk(session.config, trained), *missing_home()]
    return [*host, *few_tokens(session.config, session.policy)]


def tested_versions() -> dict[str, str]:
    """The versions that this release was tested with, of the packages that it requires."""
    lines = files("bpgo_video").joinpath("constraints.txt").read_text("utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    required = map(Requirement, requires("bpgo-video") or ())
    used = {package.name for package in required if not package.marker or package.marker.evaluate({"extra": "rewards"})}
    return {name: tested for name, tested in pinned.items() if canonicalize_name(name) in used}


def other_versions() -> Iterator[str]:
    """A line for each installed package of another version than the tested one."""
    for name, tested in tested_versions().items():
        try:
            installed = version(name).partition("+")[0]  # torch's "+cpu" is a build, not a version
        except PackageNotFoundError:
            continue  # of an extra
        if installed != tested:
            yield f"{name} {installed} is installed; this release was tested with {tested}"


def crowded_cores() -> Iterator[str]:
    """A line if the ranks of this host have more threads than it has cores."""
    ranks, threads, cores = ranks_of_this_host(), torch.get_num_threads(), available_cores()
    if ranks * threads > cores:
        advice = f"set OMP_NUM_THREADS={max(1, cores // ranks)}"
        yield f"ranks x threads of this host is {ranks} x {threads}, but it has {cores} cores: {advice}"


def small_disk(config: Recipe, trained: int) -> Iterator[str]:
    """A line if the disk cannot hold the checkpoints that a run keeps and the one being written.

    Args:
        trained: number of trained weights over all ranks; frozen ones are not saved.
    """
    run = config.run
    numbers = 1 + 2 * (config.optim.name != "sgd") + config.averages  # in fp32: weights, moments, averages
    needed = (run.keep_checkpoints + 1) * trained * numbers * 4
    folder = Path(run.dir).absolute()
    free = shutil.disk_usage(next(parent for parent in (folder, *folder.parents) if parent.is_dir())).free
    if free < needed:
        yield (
            f"run.dir {run.dir} has {readable(free)} free; {run.keep_checkpoints + 1} checkpoints take about "
            f"{readable(needed)}: set run.keep_checkpoints, or name another folder"
        )


def few_tokens(config: Recipe, policy: Policy) -> Iterator[str]:
    """A line if a sequence group divides samples so small that its exchanges cost more than they save."""
    tokens = prod(policy.latent_shape(config.video)[1:]) // prod(policy.patch) // config.parallel.sequence
    if config.parallel.sequence > 1 and tokens < FEW_TOKENS:
        yield (
            f"parallel.sequence is {config.parallel.sequence}, and a rank computes {tokens} tokens of each sample: "
            f"below about {FEW_TOKENS} a group was slower than its ranks alone; set it to 1 if samples fit"
        )


def missing_home() -> Iterator[str]:
    """A line if the home directory, where libraries keep caches, is not writable."""
    home = Path("~").expanduser() if "HOME" in os.environ else None
    if home is None or not os.access(home, os.W_OK):
        yield f"HOME ({home}) cannot be written: set HF_HOME, MPLCONFIGDIR and data.cache to writable folders"
