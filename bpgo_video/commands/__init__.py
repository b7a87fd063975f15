"""Subcommands of `bpgo-video`, one file each; `bpgo_video/__main__.py` lists them.

Each module also runs alone, as launchers start it: `python -m bpgo_video.commands.NAME`.
"""

from bpgo_video.cli import adapt_to_locale

adapt_to_locale()
