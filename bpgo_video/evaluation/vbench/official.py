"""What does VBench's own code measure? Its package, in the user's own interpreter, one dimension a process.

OUTPUT/{dimension}_eval_results.json     VBench's result, checked: every video, and numbers alone
OUTPUT/{dimension}.log                   what the process said
OUTPUT/measured.yaml                     of which videos and suite the results are

VBench's own command hides exit codes, and goes on where videos are missing. Here a dimension that fails is named when
all others are done, and the same command measures what is not there yet.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from bpgo_video.data.atomic import atomic_file
from bpgo_video.data.fingerprint import fingerprint
from bpgo_video.evaluation.vbench.result_files import Result, ResultError, check_videos, read_results
from bpgo_video.evaluation.vbench.scoring import videos_of
from bpgo_video.evaluation.vbench.suite import Suite, listing
from bpgo_video.evaluation.vbench.video_folder import check_videos as check_folder
from bpgo_video.parallel.agreement import from_all, same_verdict
from bpgo_video.parallel.mesh import Mesh
from bpgo_video.worker_side import vbench_dimension

RECORD = "measured.yaml"  # no .json: VBench's scripts take every one for a result
SHOWN = 3  # last lines of a process that failed
OF_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")  # the package is one process, on any rank
CLASSES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {"vbench": ("vbench", "VBench"), "vbench-i2v": ("vbench2_beta_i2v", "VBenchI2V")}
)


class OfficialError(ValueError):
    """VBench's own code did not measure everything; the message names each dimension and why."""


@dataclass(frozen=True)
class Official:
    """What is to be measured, and how.

    Attributes:
        python: an interpreter with the package `vbench`.
        videos: the folder; absolute, as `output` and `folder` are.
        suite: VBench's list; or prompts of one's own, then every video is measured by the prompt in its name.
        device: of torch: cuda, cuda:1, cpu.
        folder: in which the processes run; VBench-I2V looks for its images below it.
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

    @property
    def standard(self) -> bool:
        """Whether the suite is a list of VBench's form, which names the dimensions of each prompt."""
        return self.suite is not None and bool(self.suite.dimensions)


def measure_officially(asked: Official, mesh: Mesh) -> list[Result]:
    """Every dimension that has no whole result yet, dealt to the ranks; all results, in the order asked.

    Every rank calls it, with its own device, and all see one OUTPUT.

    Raises:
        SuiteError: videos are missing, foreign or not alike; nothing was measured.
        OfficialError: OUTPUT is of other videos; or dimensions failed, and each is named.
        ConfigError: an error of another rank.
    """
    with same_verdict(mesh):
        wanted = {name: [path for path, _ in videos_of(name, asked.videos, asked.suite)] for name in asked.dimensions}
        if mesh.is_main:
            every = sorted({path for paths in wanted.values() for path in paths})
            check_folder(asked.videos, asked.suite, every, None)
            remember(asked)
    results: dict[str, Result] = {}
    failures: dict[str, str] = {}
    for name in mesh.dealt(asked.dimensions):
        names = [path.name for path in wanted[name]]
        try:
            results[name] = finished(asked, name, names) or run_dimension(asked, name, names)
        except (OfficialError, ResultError, OSError) as error:
            failures[name] = str(error)
            print(f"{name} failed", flush=True)
    for other_results, other_failures in from_all((results, failures), mesh):
        results |= other_results
        failures |= other_failures
    if failures:
        told = listing(failures[name] for name in asked.dimensions if name in failures)
        raise OfficialError(f"{len(failures)} of {len(wanted)} dimensions were not measured:{told}")
    return [results[name] for name in asked.dimensions]


def finished(asked: Official, dimension: str, names: Sequence[str]) -> Result | None:
    """The whole result of an earlier call; None where there is none, or it is damaged or partial."""
    try:
        return _read(asked, dimension, names)
    except (FileNotFoundError, ResultError) as error:
        print(f"{dimension}: measuring ({error})", flush=True)
        return None


def run_dimension(asked: Official, dimension: str, names: Sequence[str]) -> Result:
    """One process.

    Raises:
        OfficialError: it ended with another exit code than 0; has its last lines.
        ResultError, FileNotFoundError: it wrote no result, or one that cannot be used.
    """
    module, benchmark = CLASSES[asked.benchmark]
    task = {
        "module": module,
        "benchmark": benchmark,
        "device": asked.device,
        "suite": str(asked.suite.source) if asked.suite is not None else "",
        "output": str(asked.output),
        "videos": str(asked.videos),
        "dimension": dimension,
        "options": {**_mode(asked), **asked.options},
    }
    environment = {name: value for name, value in os.environ.items() if name not in OF_LAUNCHERS}
    log = asked.output / f"{dimension}.log"
    with log.open("wb") as said:
        command = [asked.python, str(vbench_dimension.__file__), json.dumps(task)]
        code = subprocess.run(
            command, stdout=said, stderr=subprocess.STDOUT, cwd=asked.folder, env=environment, check=False
        ).returncode
    if code != 0:
        last = " / ".join(log.read_text("utf-8", "replace").splitlines()[-SHOWN:])
        raise OfficialError(f"{dimension}: {asked.python} ended with exit code {code}: {last} ({log})")
    return _read(asked, dimension, names)


def remember(asked: Official) -> None:
    """Write of which videos the results in OUTPUT are.

    Raises:
        OfficialError: it holds results of others.
    """
    suite = asked.suite
    record = {
        "videos": fingerprint(asked.videos, (".",)),
        "suite": None if suite is None else sha256(suite.source.read_bytes()).hexdigest()[:16],
        "benchmark": asked.benchmark,
        "options": dict(asked.options),
    }
    path = asked.output / RECORD
    if path.is_file():
        earlier = yaml.safe_load(path.read_text("utf-8"))
        if other := [name for name in record if (earlier or {}).get(name) != record[name]]:
            raise OfficialError(f"{asked.output} holds results of other {', '.join(other)}; name another --output")
        return
    with atomic_file(path) as aside:
        aside.write_text(yaml.safe_dump(record), "utf-8")


def _read(asked: Official, dimension: str, names: Sequence[str]) -> Result:
    path = asked.output / f"{dimension}_eval_results.json"
    (result,) = read_results(path)
    if result.dimension != dimension:
        raise ResultError(f"{path} is of {result.dimension}")
    check_videos(result, names)
    return result


def _mode(asked: Official) -> dict[str, str]:
    """VBench-I2V has its own list alone, and no such argument."""
    if asked.benchmark != "vbench":
        return {}
    return {"mode": "vbench_standard" if asked.standard else "custom_input"}
