"""Reward models: one file each, a protocol and a suite of several in base.py."""
