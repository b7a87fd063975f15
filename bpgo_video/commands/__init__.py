"""The subcommands of `bpgo-video`, one file each, by the table in `bpgo_video/__main__.py`.

Each module runs alone, too: `python -m bpgo_video.commands.NAME`, which is what launchers start.
"""

from bpgo_video.cli import adapt_to_locale

adapt_to_locale()
