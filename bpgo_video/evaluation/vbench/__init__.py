"""VBench's dimensions and total: its videos laid out, measured by our formulas or by its own package."""
