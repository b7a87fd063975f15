"""Commands of `bpgo-video`; the table in `bpgo_video/__main__.py` lists their functions."""
