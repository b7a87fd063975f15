"""Stands in for torchvision where VBench's own code runs: what that code calls, after torchvision's documentation."""
