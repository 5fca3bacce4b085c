"""Names in, folders out: one file for each thing that pared does."""
