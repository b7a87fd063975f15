"""What memory does a recipe take on each rank? Reckoned on shapes alone, before a GPU is asked for."""
