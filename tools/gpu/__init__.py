"""Checks and timings on one GPU within a time budget; `python -m tools.gpu --help`."""
