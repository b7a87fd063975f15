"""Help and mistakes in flags or recipes take no second: they import no torch, and end before ranks start."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from bpgo_video.__main__ import COMMANDS
from tests.made.recipes import ROOT

HEAVY = {"torch", "deepspeed", "diffusers", "transformers", "numpy"}
PROGRAM = f"""
import atexit, json, sys
from bpgo_video.__main__ import main
atexit.register(lambda: print("\\n" + json.dumps(sorted({HEAVY} & set(sys.modules)))))
sys.exit(main(sys.argv[1:]))
"""
NO_RECIPE = "recipe 'nope' is neither a file nor a shipped recipe"
SETTINGS = "--policy p --prompts q --output o --seed 0"
MISTAKES = [
    ("demo --sed 3", "--sed: unknown flag; perhaps you meant --seed"),
    ("recipes show nope", NO_RECIPE),
    ("prompts build --input a --output b --policy c --shard-sise 3", "perhaps you meant --shard-size"),
    ("videos build --num-frames 0", "0 must be 1 or more"),
    ("evaluate compare a b --outptu c", "perhaps you meant --output"),
    ("evaluate score --videos v --dimensions d --output o --device gpu", "'gpu' is no device"),
    ("fuse --policy p --output o --scale 0", "0.0 must be above 0, and finite"),
    ("plan nope --gpus 8", NO_RECIPE),
    ("plan tiny_wan_bpgo --gpus 8 --rollout.group-sise 4", "perhaps you meant --rollout.group-size"),
    ("plan --model wan2.1-t2v-14b --gpus 8 --sequenze 4", "--sequenze: unknown flag"),
    ("convert --checkpoint c --output o --format gguf", "invalid choice: 'gguf'"),
    ("generate --policy p", "required, and not given: --prompts, --output, --seed"),
    (f"generate {SETTINGS} --numsteps 3 --ranks 2", "--numsteps: unknown flag; perhaps you meant --num-steps"),
    (f"generate {SETTINGS} --batch-size 0", "batch_size: Input should be greater than or equal to 1"),
    ("study surrogate --output o --arms fames", "perhaps you meant frames"),
    ("study signals --sead 3", "perhaps you meant --seed"),
    ("reward-server --config nope --reward x --port 0", NO_RECIPE),
    ("reward-server --config tiny_wan_bpgo --reward nope --port 0", "--reward is 'nope'; known are"),
    *((f"{name} nope --ranks 2", NO_RECIPE) for name in ("train", "sft", "priors", "doctor")),
    *((f"{name} --config nope", NO_RECIPE) for name in ("train", "sft", "priors", "doctor")),
    ("train tiny_wan_bpgo --ranks 2 --run.sead 3", "--run.sead: unknown flag"),
    ("train tiny_wan_bpgo --ranks 2 --optim.updates-per-rollout 99", "each update needs one of its own"),
    ("train tiny_wan_bpgo --ranks 3", "do not divide into 3 ranks"),
    ("sft tiny_wan_sft --ranks 3", "do not divide into 3 ranks"),
    ("doctor tiny_wan_bpgo --deepspeed zero4 --ranks 2", "perhaps you meant zero3"),
]


def start(words: str) -> subprocess.CompletedProcess[str]:
    """The program's result; its last line lists the heavy modules that it imported."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words.split()], cwd=ROOT, capture_output=True, encoding="utf-8"
    )
    print(f"{time.perf_counter() - started:.2f} s  bpgo-video {words}")
    return done


@pytest.mark.parametrize("name", COMMANDS)
def test_help_imports_nothing_heavy(name: str) -> None:
    done = start(f"{name} --help")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []


@pytest.mark.parametrize(("words", "message"), MISTAKES)
def test_a_mistake_is_named_before_anything_heavy_is_imported(words: str, message: str) -> None:
    done = start(words)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_every_command_has_a_mistake() -> None:
    assert {words.split()[0] for words, _ in MISTAKES} == COMMANDS.keys()


@pytest.mark.parametrize("words", ["train --help", "recipes", "convert --help"])
def test_a_reader_that_stops_early_causes_no_error(words: str) -> None:
    command = f"{sys.executable} -u -m bpgo_video {words} | head -n 1"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""
