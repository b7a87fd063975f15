"""The policy under DeepSpeed: the engine, its optimiser, and the fp32 weights and averages in its shards."""
