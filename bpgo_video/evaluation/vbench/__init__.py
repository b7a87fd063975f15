"""VBench: videos of a suite, dimensions by our code or by its own package, totals."""
