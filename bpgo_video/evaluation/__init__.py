"""Evaluation: held-out scores of a policy, comparisons of models (compare*), and VBench (vbench_*)."""
