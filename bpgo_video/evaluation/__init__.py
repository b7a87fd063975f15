"""How good are a policy's videos, on a benchmark that others use? VBench's layout, dimensions and totals."""
