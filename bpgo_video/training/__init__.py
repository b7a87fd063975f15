"""Runs: what they stand on, their steps, what they write, and the doctor that examines them beforehand."""
