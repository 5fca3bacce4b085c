"""What a compression costs: memory and disk, operations of its stages, and rates that give them a time."""
