"""What can be set: the recipes `bpgo` and `sft`, their sections, how they are read, and what does not go together."""
