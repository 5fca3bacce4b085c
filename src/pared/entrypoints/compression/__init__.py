"""What every compression of a model by name or from memory takes: texts, its state, blocks one by one, its result."""
