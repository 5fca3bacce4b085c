"""What a compression costs: operations of its stages, and rates that give them a time."""
