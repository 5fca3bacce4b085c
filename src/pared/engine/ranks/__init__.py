"""Decompositions at work: of a weight, of what is left of a narrower one, and of units whose ranks come later."""
