"""What runs under another interpreter: one file of the standard library alone, found on its PYTHONPATH."""
