"""Checks and timings on one GPU within a time budget; see `python -m tools.gpu --help`."""
