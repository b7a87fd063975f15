"""Evaluation: held-out scores of a policy, comparisons of several (`comparing`), and VBench (`vbench`)."""
