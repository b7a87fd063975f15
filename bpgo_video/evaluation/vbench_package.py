"""VBench's own package, in the user's own interpreter, one process a dimension.

OUTPUT/{dimension}_eval_results.json     VBench's result, checked: every video, and numbers alone
OUTPUT/{dimension}.log                   the output of the process
OUTPUT/measured.yaml                     the videos and the suite that the results are of

VBench's own command hides exit codes, and goes on where videos are missing. Here a dimension that fails is named when
all others are done, and the same command measures what is not there yet.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

import bpgo_video
from bpgo_video.atomic import atomic_file
from bpgo_video.data.fingerprint import fingerprint
from bpgo_video.distributed.agreement import all_or_none, from_all
from bpgo_video.distributed.mesh import Mesh
from bpgo_video.evaluation.ranks import device_of, ranks_or_alone
from bpgo_video.evaluation.vbench_results import Result, ResultError, check_complete, read_results
from bpgo_video.evaluation.vbench_scoring import check_folder, videos_of
from bpgo_video.evaluation.vbench_suite import Suite, SuiteError, listing, read_suite
from bpgo_video.training.metrics import MalformedFile

OF_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")  # the package is one process, on any rank
CLASSES = {"vbench": ("vbench", "VBench"), "vbench-i2v": ("vbench2_beta_i2v", "VBenchI2V")}


class PackageError(ValueError):
    """VBench's own code did not measure everything; the message names each dimension and why."""


@dataclass(frozen=True)
class PackageRequest:
    """What to measure, and how.

    Attributes:
        python: an interpreter with the package `vbench`.
        videos: the folder; absolute, like `output` and `folder`.
        suite: VBench's list; with any other, every video is measured by the prompt in its name.
        device: of torch: cuda, cuda:1, cpu.
        folder: working directory of the processes; VBench-I2V looks for its images below it.
        options: more arguments of VBench's `evaluate`.
    """

    python: str
    videos: Path
    output: Path
    benchmark: str
    suite: Suite | None
    dimensions: tuple[str, ...]
    device: str
    folder: Path
    options: Mapping[str, Any] = field(default_factory=dict)


def measure_by_package(request: PackageRequest, mesh: Mesh) -> list[Result]:
    """Every dimension that has no complete result yet, dealt to the ranks; all results, in the requested order.

    Every rank calls it, with its own device, and all see one OUTPUT.

    Raises:
        SuiteError: videos are missing, foreign or not alike; nothing was measured.
        PackageError: OUTPUT has results of other videos; or dimensions failed, and each is named.
        ConfigError: an error of another rank.
    """
    with all_or_none(mesh):
        videos = {name: videos_of(name, request.videos, request.suite) for name in request.dimensions}
        if mesh.is_main:
            check_folder(request.videos, request.suite, videos)
            write_record(request)
    results: dict[str, Result] = {}
    failures: dict[str, str] = {}
    for name in mesh.round_robin(request.dimensions):
        try:
            results[name] = finished(request, name, videos[name]) or run_dimension(request, name, videos[name])
        except (PackageError, ResultError, MalformedFile, OSError) as error:
            failures[name] = str(error)
            print(f"{name} failed", flush=True)
    for other_results, other_failures in from_all((results, failures), mesh):
        results |= other_results
        failures |= other_failures
    if failures:
        reasons = listing(failures[name] for name in request.dimensions if name in failures)
        raise PackageError(f"{len(failures)} of {len(videos)} dimensions were not measured:{reasons}")
    return [results[name] for name in request.dimensions]


def write_record(request: PackageRequest) -> None:
    """Writes measured.yaml.

    Raises:
        PackageError: OUTPUT holds results of something else.
    """
    path, suite = request.output / "measured.yaml", request.suite  # not .json: VBench takes each of those for a result
    record: dict[str, Any] = {"videos": fingerprint(request.videos, (".",)), "suite": None}
    record |= {"benchmark": request.benchmark, "options": dict(request.options)}
    if suite is not None:
        record["suite"] = sha256(suite.source.read_bytes()).hexdigest()[:16]
    if not path.is_file():
        with atomic_file(path) as aside:
            aside.write_text(yaml.safe_dump(record), "utf-8")
    earlier = yaml.safe_load(path.read_text("utf-8")) or {}
    if other := [name for name in record if earlier.get(name) != record[name]]:
        raise PackageError(f"{request.output} holds results of other {', '.join(other)}; name another --output")


def finished(request: PackageRequest, dimension: str, names: Collection[str]) -> Result | None:
    """The complete result of an earlier call; None where there is none, or it is damaged or partial."""
    try:
        return read_result(request, dimension, names)
    except (FileNotFoundError, ResultError, MalformedFile) as error:
        print(f"{dimension}: measuring ({error})", flush=True)
        return None


def run_dimension(request: PackageRequest, dimension: str, names: Collection[str]) -> Result:
    """One process.

    Raises:
        PackageError: its exit code is not 0; has its last lines.
        ResultError, MalformedFile, FileNotFoundError: it wrote no result, or one that cannot be used.
    """
    module, benchmark = CLASSES[request.benchmark]
    places = {name: str(getattr(request, name)) for name in ("device", "output", "videos")}
    suite = "" if request.suite is None else str(request.suite.source)
    mode = "vbench_standard" if request.suite is not None and request.suite.dimensions else "custom_input"
    options = {**({"mode": mode} if request.benchmark == "vbench" else {}), **request.options}
    task = {**places, "module": module, "benchmark": benchmark, "suite": suite, "options": options}
    worker = str(Path(bpgo_video.__file__).parent / "worker_side" / "vbench_dimension.py")
    command = [request.python, worker, json.dumps({**task, "dimension": dimension})]
    environment = {name: value for name, value in os.environ.items() if name not in OF_LAUNCHERS}
    log = request.output / f"{dimension}.log"
    with log.open("wb") as said:
        code = subprocess.run(command, stdout=said, stderr=said, cwd=request.folder, env=environment).returncode
    if code != 0:
        last = " / ".join(log.read_text("utf-8", "replace").splitlines()[-3:])
        raise PackageError(f"{dimension}: {request.python} ended with exit code {code}: {last} ({log})")
    return read_result(request, dimension, names)


def read_result(request: PackageRequest, dimension: str, names: Collection[str]) -> Result:
    path = request.output / f"{dimension}_eval_results.json"
    (result,) = read_results(path)
    if result.dimension != dimension:
        raise ResultError(f"{path} has the dimension {result.dimension}")
    check_complete(result, names)
    return result


def run(args: argparse.Namespace) -> None:
    """The subcommand `vbench`."""
    with ranks_or_alone() as mesh:
        with all_or_none(mesh):
            request = requested(args, str(device_of(args.device, mesh)))
        results = measure_by_package(request, mesh)
        if mesh.is_main:
            for result in results:
                print(f"{result.dimension:24} {result.score:.4f}  {len(result.videos)} videos")


def requested(args: argparse.Namespace, device: str) -> PackageRequest:
    """Raises SuiteError where no dimension or no list is named."""
    suite = None if args.suite is None else read_suite(args.suite, args.samples)
    i2v, options = args.benchmark == "vbench-i2v", {"local": args.local}
    dimensions = tuple(dict.fromkeys(args.dimensions or (suite.dimensions if suite is not None else ())))
    if not dimensions:
        raise SuiteError("say which --dimensions: only VBench's own list, by --suite, names them itself")
    if i2v and suite is None:
        raise SuiteError("vbench-i2v needs its own list, vbench2_i2v_full_info.json: --suite FILE")
    options |= {"resolution": args.resolution} if i2v else {}
    videos, output, folder = (path.absolute() for path in (args.videos, args.output, args.folder))
    return PackageRequest(args.python, videos, output, args.benchmark, suite, dimensions, device, folder, options)
