"""Golden values: reward, loss and gradient norm of five steps of three recipes, compared with recorded values.

    python -m tools.checks.golden          # compare with tests/golden/*.json; print the largest relative differences
    python -m tools.checks.golden --write  # record new numbers, where a change of numerics is intended

Include the output with every numerical change. Each recipe runs on one rank with two prompts of four samples per step,
a constant prior and no evaluation. `TOLERANCE` allows for processors with other vector units, which round differently.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bpgo_video.commands.shipped import PROMPTS

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
RECIPES = ("tiny_wan_bpgo", "tiny_wan_released", "tiny_wan_nft")
KEYS = ("reward", "loss", "grad_norm")
STEPS = 5
TOLERANCE = 1e-3  # relative to the key's scale
TERMS = {"loss": 1.0}  # size of the terms of a mean that may cancel: advantages are z-scores with mean 0
CHANGES = f"""
run: {{num_steps: {STEPS}, save_every: {STEPS}}}
rollout: {{prompts_per_step: 2, group_size: 4, micro_batch_size: 4}}
prior: {{kind: constant, mean: 0.2, scale: 0.2}}
evaluation: {{rewards: {{}}}}
"""

Numbers = dict[str, list[float]]


def bpgo_video(*words: str) -> None:
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **os.environ}
    subprocess.run([sys.executable, "-m", "bpgo_video", *words], check=True, env=environment, stdout=subprocess.DEVNULL)


def measure(recipe: str, folder: Path, shards: Path) -> Numbers:
    """The values of KEYS for each step of a recipe."""
    config, run = folder / f"{recipe}.yaml", folder / recipe
    config.write_text(f"base: {ROOT / 'pipelines' / 'configs' / recipe}.yaml\n{CHANGES}", encoding="utf-8")
    bpgo_video("train", "--ranks", "1", "--config", str(config), "--data.shards", str(shards), "--run.dir", str(run))
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {key: [record[key] for record in records if key in record] for key in KEYS}


def differences(measured: Numbers, golden: Numbers) -> Iterator[tuple[str, float]]:
    """Each key's largest difference, relative to its largest golden value, or to the terms that it is a mean of."""
    for key, values in golden.items():
        if len(measured[key]) != len(values):
            raise ValueError(f"{key}: {len(measured[key])} steps, where the golden file has {len(values)}")
        scale = max(*map(abs, values), TERMS.get(key, 0.0))
        yield key, max(abs(a - b) for a, b in zip(measured[key], values, strict=True)) / scale


def golden(args: argparse.Namespace) -> int:
    worst = 0.0
    with tempfile.TemporaryDirectory() as name:
        folder, shards = Path(name), Path(name) / "shards"
        policy = ["--policy", "package:bpgo_video.tiny/weights/wan", "--max-sequence-length", "16"]
        bpgo_video("prompts", "build", "--input", str(PROMPTS), "--output", str(shards), *policy)
        for recipe in args.recipes:
            measured, path = measure(recipe, folder, shards), GOLDEN / f"{recipe}.json"
            if args.write:
                path.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
                print(f"{path.relative_to(ROOT)}: written")
                continue
            rows = dict(differences(measured, json.loads(path.read_text(encoding="utf-8"))))
            print(f"{recipe:<20}", *(f"{key} {value:.1e}" for key, value in rows.items()), sep="  ", flush=True)
            worst = max(worst, *rows.values())
    if worst > TOLERANCE:
        print(f"error: a difference of {worst:.1e} exceeds {TOLERANCE:.0e}; if intended, record it with --write")
    return int(worst > TOLERANCE)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=RECIPES, help="recipes to run (default: all)")
    parser.add_argument("--write", action="store_true", help="record the values of this tree")
    return golden(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
