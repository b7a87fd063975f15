"""What a recipe needs before it runs: memory, time, disk and money, from shapes alone."""
