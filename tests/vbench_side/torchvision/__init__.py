"""Substitute for torchvision with the functions that VBench's code calls, written from torchvision's documentation."""
