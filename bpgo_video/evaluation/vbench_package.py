"""The command `evaluate vbench`: VBench's own package, in the user's own interpreter, one process per dimension.

OUTPUT/{dimension}_eval_results.json     VBench's result, checked: every video, and finite numbers
OUTPUT/{dimension}.log                   the output of the process
OUTPUT/measured.yaml                     the videos and the suite that the results belong to

VBench's own command hides exit codes, and continues when videos are missing. Here a failed dimension is named after all
others are done, and the same command measures what is still missing.
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
from bpgo_video.distributed.mesh import Mesh, all_or_none, from_all
from bpgo_video.documents import MalformedFile
from bpgo_video.errors import InputError
from bpgo_video.evaluation import vbench_files as vbench
from bpgo_video.evaluation.heldout import device_of, independent_ranks
from bpgo_video.files import atomic_file, fingerprint

LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")  # the package runs as a single process
CLASSES = {"vbench": ("vbench", "VBench"), "vbench-i2v": ("vbench2_beta_i2v", "VBenchI2V")}


class PackageError(ValueError):
    """VBench's own code did not measure everything; the message names each dimension and the reason."""


@dataclass(frozen=True)
class PackageRequest:
    """What to measure, and how.

    Attributes:
        python: an interpreter with the package `vbench`.
        videos: the folder; absolute, like `output` and `folder`.
        suite: VBench's list; with any other, every video is measured by the prompt in its name.
        device: of torch: cuda, cuda:1, cpu.
        folder: working directory of the processes; VBench-I2V looks for its images in it.
        options: more arguments of VBench's `evaluate`.
    """

    python: str
    videos: Path
    output: Path
    benchmark: str
    suite: vbench.Suite | None
    dimensions: tuple[str, ...]
    device: str
    folder: Path
    options: Mapping[str, Any] = field(default_factory=dict)


def run(args: argparse.Namespace) -> None:
    with independent_ranks() as mesh:
        with all_or_none(mesh):
            request = request_of(args, str(device_of(args.device, mesh)))
        results = measure_by_package(request, mesh)
        if mesh.is_main:
            for result in results:
                print(f"{result.dimension:24} {result.score:.4f}  {len(result.videos)} videos")


def request_of(args: argparse.Namespace, device: str) -> PackageRequest:
    """Raises SuiteError if no dimension or no list is given."""
    suite = None if args.suite is None else vbench.read_suite(args.suite, vbench.samples_of(args.videos, args.samples))
    i2v, options = args.benchmark == "vbench-i2v", {"local": args.local}
    dimensions = tuple(dict.fromkeys(args.dimensions or (suite.dimensions if suite is not None else ())))
    if not dimensions:
        raise vbench.SuiteError("no dimensions are given: add --dimensions D ..., or VBench's own list as --suite")
    if i2v and suite is None:
        raise vbench.SuiteError("vbench-i2v needs its own list: --suite vbench2_i2v_full_info.json")
    options |= {"resolution": args.resolution} if i2v else {}
    videos, output, folder = (path.absolute() for path in (args.videos, args.output, args.folder))
    return PackageRequest(args.python, videos, output, args.benchmark, suite, dimensions, device, folder, options)


def measure_by_package(request: PackageRequest, mesh: Mesh) -> list[vbench.Result]:
    """Measures every dimension without a complete result, divided among the ranks; all results, in the requested order.

    Every rank calls it, with its own device; all ranks must share OUTPUT.

    Raises:
        SuiteError: videos are missing, foreign or not alike; nothing was measured.
        PackageError: OUTPUT has results of other videos; or dimensions failed, and the message names each.
        ConfigError: an error of another rank.
    """
    with all_or_none(mesh):
        videos = {name: vbench.videos_of(name, request.videos, request.suite) for name in request.dimensions}
        if mesh.is_main:
            vbench.check_videos(request.videos, request.suite, videos)
            write_record(request)
    results: dict[str, vbench.Result] = {}
    failures: dict[str, str] = {}
    for name in mesh.round_robin(request.dimensions):
        try:
            results[name] = measure_dimension(request, name, videos[name])
        except (PackageError, vbench.ResultError, MalformedFile, OSError) as error:
            failures[name] = str(error)
            print(f"{name} failed", flush=True)
    for other_results, other_failures in from_all((results, failures), mesh):
        results |= other_results
        failures |= other_failures
    if failures:
        reasons = vbench.listing(failures[name] for name in request.dimensions if name in failures)
        raise PackageError(f"{len(failures)} of {len(videos)} dimensions were not measured:{reasons}")
    return [results[name] for name in request.dimensions]


def write_record(request: PackageRequest) -> None:
    """Writes measured.yaml, if there is none.

    Raises:
        InputError: OUTPUT has results of something else.
    """
    path, suite = request.output / "measured.yaml", request.suite  # not .json: VBench reads each .json as a result
    record: dict[str, Any] = {
        "videos": fingerprint(request.videos, (".",)),
        "suite": None if suite is None else sha256(suite.source.read_bytes()).hexdigest()[:16],
        "benchmark": request.benchmark,
        "options": dict(request.options),
    }
    if not path.is_file():
        with atomic_file(path) as partial:
            partial.write_text(yaml.safe_dump(record), "utf-8")
    earlier = yaml.safe_load(path.read_text("utf-8")) or {}
    if other := [name for name in record if earlier.get(name) != record[name]]:
        raise InputError(f"{request.output} has results of other {', '.join(other)}; choose another --output")


def measure_dimension(request: PackageRequest, dimension: str, names: Collection[str]) -> vbench.Result:
    """The complete result of an earlier call, or that of a new process.

    Raises:
        PackageError: the process failed; has its last lines.
        ResultError, MalformedFile, FileNotFoundError: it wrote no result, or an unusable one.
    """
    try:
        return read_result(request, dimension, names)
    except (FileNotFoundError, vbench.ResultError, MalformedFile) as error:
        print(f"{dimension}: measuring ({error})", flush=True)
    module, benchmark = CLASSES[request.benchmark]
    is_list = request.suite is not None and bool(request.suite.dimensions)
    mode = {"mode": "vbench_standard" if is_list else "custom_input"} if request.benchmark == "vbench" else {}
    task = {
        **{name: str(getattr(request, name)) for name in ("device", "output", "videos")},
        "module": module,
        "benchmark": benchmark,
        "suite": "" if request.suite is None else str(request.suite.source),
        "options": {**mode, **request.options},
        "dimension": dimension,
    }
    worker = str(Path(bpgo_video.__file__).parent / "worker_side" / "vbench_dimension.py")
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    log = request.output / f"{dimension}.log"
    with log.open("wb") as output:
        command = [request.python, worker, json.dumps(task)]
        code = subprocess.run(command, stdout=output, stderr=output, cwd=request.folder, env=environment).returncode
    if code != 0:
        last = " / ".join(log.read_text("utf-8", "replace").splitlines()[-3:])
        raise PackageError(f"{dimension}: {request.python} ended with exit code {code}: {last} ({log})")
    return read_result(request, dimension, names)


def read_result(request: PackageRequest, dimension: str, names: Collection[str]) -> vbench.Result:
    path = request.output / f"{dimension}_eval_results.json"
    (result,) = vbench.read_results(path)
    if result.dimension != dimension:
        raise vbench.ResultError(f"{path} has the dimension {result.dimension}")
    vbench.check_complete(result, names)
    return result
