"""Comparisons of several models on the same prompts and noise: paired statistics, a verdict, a page."""
