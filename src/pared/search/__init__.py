"""Searches for the program that spreads zeros, or ranks, over a model best."""
