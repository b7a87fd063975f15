"""The embedded default: a world of moving shapes, its prompts, its judges and its weights."""
