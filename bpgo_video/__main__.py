"""The console command `bpgo-video`: a table of subcommands, each imported when it is called."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

COMMANDS = {  # name -> function of the arguments that returns an exit code, and what it is for
    "demo": ("demo:main", "post-train the embedded policy with BPGO in minutes, on any CPU"),
    "recipes": ("recipes:main", "list, show and copy the recipes that ship with the package"),
    "prompts": ("prompts:main", "embed prompts into shards for training; inspect and verify shards"),
    "videos": ("videos:main", "encode videos with captions into shards for a warm start"),
    "plan": ("plan:main", "compute the memory of a recipe on each GPU, before you request one"),
    "doctor": ("doctor:main", "check a recipe on its own ranks, in minutes, before a long run"),
    "priors": ("priors:main", "measure the prior of every prompt: what the starting policy earns on it"),
    "train": ("train:main", "run a recipe: BPGO on rewards, or a warm start on videos"),
    "sft": ("sft:main", "run a warm start on videos, and nothing else"),
    "generate": ("generate:main", "make videos with a base model, a run, a checkpoint or adapters"),
    "evaluate": ("evaluate:main", "score a policy on held-out prompts, compare models, run VBench"),
    "convert": ("convert:main", "export a checkpoint for diffusers, as LoRA, for ComfyUI, or for any number of ranks"),
    "reward-server": ("reward_server:main", "serve a reward to runs on other machines"),
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {line}" for name, (_, line) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: bpgo-video COMMAND ...",
            "",
            "Post-train video diffusion policies with BPGO under DeepSpeed.",
            "",
            *lines,
            "",
            "`bpgo-video COMMAND --help` explains a command with examples; `bpgo-video --version` prints the version.",
        ]
    )


def main(words: Sequence[str] | None = None) -> int:
    """Call the subcommand that the first word names; its exit code, or 2 where there is no such subcommand."""
    name, *rest = (sys.argv[1:] if words is None else words) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name == "--version":
        print(f"bpgo-video {version('bpgo-video')}")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; perhaps you meant {near[0]}" if near else ""
        print(f"error: {name}: unknown command{hint}; bpgo-video --help lists all", file=sys.stderr)
        return 2
    module, _, function = COMMANDS[name][0].partition(":")
    code: int = getattr(import_module(f"bpgo_video.commands.{module}"), function)(rest)
    return code


if __name__ == "__main__":
    sys.exit(main())
