"""The console command `bpgo-video`: a table of commands, each imported when it is called."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

from bpgo_video.cli import adapt_to_locale, without_common_flags
from bpgo_video.errors import install_excepthook, suggestion, tell
from bpgo_video.processes import watch_launcher

COMMANDS = {  # name -> module of bpgo_video.commands, its function of (words, script's docstring), summary
    "demo": ("shipped", "demo", "post-train the embedded policy with BPGO in minutes, on any CPU"),
    "recipes": ("shipped", "recipes", "list, show and copy the recipes that ship with the package"),
    "prompts": ("prompts", "main", "embed prompts into shards for training; inspect and verify shards"),
    "videos": ("videos", "main", "encode videos with captions into shards for a warm start"),
    "fuse": ("fuse", "main", "fuse adapters, such as a distilled model's, into a pipeline to train from"),
    "plan": ("plan", "main", "compute the memory of a recipe on each GPU, before you request one"),
    "doctor": ("runs", "doctor", "check a recipe on its own ranks, in minutes, before a long run"),
    "priors": ("runs", "priors", "measure the prior of every prompt: the starting policy's rewards on it"),
    "train": ("runs", "train", "run a recipe: BPGO on rewards, or a warm start on videos"),
    "sft": ("runs", "sft", "run a recipe for a warm start on videos"),
    "generate": ("generate", "main", "make videos with a base model, a run, a checkpoint or adapters"),
    "evaluate": ("evaluate", "main", "score a policy on held-out prompts, compare models, run VBench"),
    "study": ("study", "main", "study which trust gains against GRPO, and what each knows of real groups"),
    "convert": ("convert", "main", "export a checkpoint for diffusers, as LoRA, for ComfyUI, or for any ranks"),
    "reward-server": ("reward_server", "main", "serve a reward to runs on other machines"),
}
USAGE = """usage: bpgo-video COMMAND ...

Post-train video diffusion policies with BPGO under DeepSpeed.

{commands}

Start with `bpgo-video demo`. `bpgo-video COMMAND --help` explains a command with examples. With --verbose every command
also shows what DeepSpeed logs. `bpgo-video --version` prints the version."""


def main(words: Sequence[str] | None = None, script: str | None = None) -> int:
    """Call the command that the first word names; returns its exit code, or 2 if there is no such command.

    Args:
        words: the command line; None takes the program's own.
        script: docstring of the repository's script that calls this; --help shows its examples.
    """
    install_excepthook()
    watch_launcher()
    adapt_to_locale()
    name, *rest = without_common_flags(sys.argv[1:] if words is None else words) or ["--help"]
    if words is None and {name, *rest} & {"-h", "--help", "recipes"}:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends a command that only prints, without an error
    if name in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        print(USAGE.format(commands="\n".join(f"  {name:<{width}}  {line}" for name, (*_, line) in COMMANDS.items())))
        return 0
    if name == "--version":
        print(f"bpgo-video {version('bpgo-video')}")
        return 0
    if name not in COMMANDS:
        tell(f"error: {name}: unknown command{suggestion(name, COMMANDS)}; --help lists all")
        return 2
    module, function, _ = COMMANDS[name]
    return int(getattr(import_module(f"bpgo_video.commands.{module}"), function)(rest, script))


if __name__ == "__main__":
    sys.exit(main())
